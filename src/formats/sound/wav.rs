//! WAV: samples of one size at one rate, so that the bytes are the length.

use super::{Length, le16, le32, length_of, mp3, nanos};

const PCM: u16 = 1;
const FLOAT: u16 = 3;
const A_LAW: u16 = 6;
const MU_LAW: u16 = 7;
const MP3: u16 = 0x55;
/// The real format stands in the first two bytes of the sub-format.
const EXTENSIBLE: u16 = 0xfffe;

pub(super) fn measure(file: &[u8]) -> Option<Length> {
    if file.get(8..12)? != b"WAVE" {
        return None;
    }
    let format = find(file, 12, b"fmt ")?;
    let samples = find(file, format.end, b"data")?;
    let rest = file.get(samples.start..)?;
    // A writer that does not know the length yet leaves it 0 or the largest there is.
    let declared = rest.get(..samples.size).filter(|declared| !declared.is_empty()).unwrap_or(rest);
    let tag = match le16(file, format.start)? {
        EXTENSIBLE => le16(file, format.start + 24)?,
        tag => tag,
    };
    // Of two heads readers take the one or the other.
    if find(file, format.end, b"fmt ").is_some_and(|second| second.start < samples.start) {
        return None;
    }
    match tag {
        PCM | FLOAT | A_LAW | MU_LAW => {
            let (rate, frame_bytes) = frames(file.get(format.start..format.end)?)?;
            // A decoder may read on behind the end that is declared.
            let length = |bytes: &[u8]| nanos(length_of(bytes).div_ceil(frame_bytes), rate);
            Some(Length::new(length(rest), length(declared), 1))
        }
        MP3 => mp3::measure(rest),
        _ => None,
    }
}

/// Whether what is in it are frames of MPEG sound.
pub(super) fn is_mpeg(file: &[u8]) -> bool {
    find(file, 12, b"fmt ").and_then(|format| le16(file, format.start)) == Some(MP3)
}

/// More samples a second than any recording has.
const MOST_RATE: u64 = 768_000;

/// The rate, and the bytes of a sample of all channels: the fewest that the head can mean.
fn frames(format: &[u8]) -> Option<(u64, u64)> {
    let (channels, rate) = (u64::from(le16(format, 2)?), u64::from(le32(format, 4)?));
    let (declared, bits) = (u64::from(le16(format, 12)?), u64::from(le16(format, 14)?));
    let computed = channels * bits.div_ceil(8);
    let mut frame_bytes = declared.min(computed);
    // Of an extensible head some readers go by the bits that are said to be in use.
    if le16(format, 0)? == EXTENSIBLE {
        let valid = u64::from(le16(format, 18)?);
        if valid > 0 {
            frame_bytes = frame_bytes.min(channels * valid.div_ceil(8));
        }
    }
    (rate > 0 && rate <= MOST_RATE && bits <= 64 && frame_bytes > 0).then_some((rate, frame_bytes))
}

struct Chunk {
    start: usize,
    size: usize,
    end: usize,
}

/// The first chunk of this name. Chunks before it of an odd size leave open where the next one begins: some readers
/// skip the byte that fills them up, and some do not.
fn find(file: &[u8], mut at: usize, name: &[u8; 4]) -> Option<Chunk> {
    loop {
        let size = usize::try_from(le32(file, at.checked_add(4)?)?).ok()?;
        let start = at.checked_add(8)?;
        let end = start.saturating_add(size);
        if file.get(at..at.checked_add(4)?)? == name {
            return Some(Chunk { start, size, end });
        }
        if size % 2 == 1 || file.get(at..at.checked_add(4)?)? == b"data" {
            return None;
        }
        at = end;
    }
}
