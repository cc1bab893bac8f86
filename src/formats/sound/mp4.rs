//! MP4 with AAC: a table of how many samples there are, each of 1,024 values.

use super::{Length, array, be32, nanos};

/// Values that a sample of AAC makes, at the rate of its core.
const VALUES: u64 = 1024;
/// By the index in an AudioSpecificConfig (ISO 14496-3, section 1.6.2.1).
const RATES: [u64; 13] =
    [96_000, 88_200, 64_000, 48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8000, 7350];
/// Boxes in one another deeper than any file has them.
const MAX_DEPTH: u8 = 8;

#[derive(Default)]
struct Tables {
    samples: u64,
    /// The slowest of its tracks.
    rate: Option<u64>,
    /// What its heads say that it lasts.
    said: u64,
}

pub(super) fn measure(file: &[u8]) -> Option<Length> {
    let mut tables = Tables::default();
    tables.walk(file, 0)?;
    let held = nanos(tables.samples.saturating_mul(VALUES), tables.rate?);
    (held > 0).then(|| Length::new(held, tables.said.clamp(1, held), 1)).map(|length| Length {
        // A head may say more than there are samples for.
        most_ms: length.most_ms.max(tables.said.div_ceil(super::NANOS_A_MILLISECOND)),
        ..length
    })
}

impl Tables {
    /// Reads the boxes of one level. `None` where something is in them that cannot be counted.
    fn walk(&mut self, boxes: &[u8], depth: u8) -> Option<()> {
        if depth > MAX_DEPTH {
            return None;
        }
        let mut at = 0;
        while at < boxes.len() {
            let rest = boxes.get(at..)?;
            let (size, head) = match be32(rest, 0)? {
                0 => (rest.len(), 8),
                1 => (usize::try_from(u64::from_be_bytes(array(rest, 8)?)).ok()?, 16),
                size => (usize::try_from(size).ok()?, 8),
            };
            let name: [u8; 4] = array(rest, 4)?;
            // The sound itself may be cut off.
            let body = match rest.get(head..size) {
                Some(body) => body,
                None if &name == b"mdat" && size > head => return Some(()),
                None => return None,
            };
            match &name {
                b"moov" | b"trak" | b"mdia" | b"minf" | b"stbl" | b"moof" | b"traf" => {
                    self.walk(body, depth + 1)?;
                }
                b"cmov" => return None,
                b"stsd" => self.describe(body)?,
                b"stsz" | b"stz2" => self.count(be32(body, 8)?),
                b"trun" => self.count(be32(body, 4)?),
                b"mvhd" | b"mdhd" => self.said = self.said.max(duration(body)?),
                _ => {}
            }
            at = at.checked_add(size)?;
        }
        Some(())
    }

    fn count(&mut self, samples: u32) {
        self.samples = self.samples.saturating_add(samples.into());
    }

    /// What a track is: AAC and nothing else.
    fn describe(&mut self, body: &[u8]) -> Option<()> {
        if be32(body, 4)? != 1 || body.get(12..16)? != b"mp4a" {
            return None;
        }
        let rate = aac_rate(body)?;
        self.rate = Some(self.rate.map_or(rate, |other| other.min(rate)));
        Some(())
    }
}

/// The rate of the core of what an `esds` box describes, of AAC with or without its extensions.
fn aac_rate(body: &[u8]) -> Option<u64> {
    let at = body.windows(4).position(|name| name == b"esds")? + 8;
    let mut descriptors = body.get(at..)?;
    // Each in the one before it: the stream, its decoder, what the decoder is told.
    descriptors = descriptor(descriptors, 3)?.get(3..)?;
    let decoder = descriptor(descriptors, 4)?;
    // 0x40: AAC.
    if *decoder.first()? != 0x40 {
        return None;
    }
    let config = descriptor(decoder.get(13..)?, 5)?;
    let bits = u64::from_be_bytes(array(&[config.get(..5.min(config.len()))?, &[0; 8]].concat(), 0)?);
    // 2: AAC-LC, 5: with SBR, 29: with PS.
    if !matches!(bits >> 59, 2 | 5 | 29) {
        return None;
    }
    match bits >> 55 & 0xf {
        15 => Some(bits >> 31 & 0xff_ffff).filter(|rate| *rate > 0),
        index => RATES.get(usize::try_from(index).ok()?).copied(),
    }
}

/// What is in a descriptor of this tag, which is the next one. Its size has up to four bytes.
fn descriptor(bytes: &[u8], tag: u8) -> Option<&[u8]> {
    let (first, mut rest) = bytes.split_first()?;
    let mut size = 0;
    for _ in 0..4 {
        let (byte, behind) = rest.split_first()?;
        rest = behind;
        size = size << 7 | usize::from(byte & 0x7f);
        if byte & 0x80 == 0 {
            break;
        }
    }
    (*first == tag).then(|| rest.get(..size.min(rest.len())).unwrap_or(rest))
}

/// What a `mvhd` or a `mdhd` box says: a number of units, and how many are a second.
fn duration(body: &[u8]) -> Option<u64> {
    let (scale, units) = match body.first()? {
        1 => (be32(body, 20)?, u64::from_be_bytes(array(body, 24)?)),
        _ => (be32(body, 12)?, be32(body, 16)?.into()),
    };
    // All bits set: not known.
    let is_known = units != u64::MAX && units != u64::from(u32::MAX);
    Some(if is_known { nanos(units, scale.into()) } else { 0 })
}
