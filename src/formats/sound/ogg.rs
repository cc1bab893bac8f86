//! Ogg: packets in pages, of one stream or several.

use std::collections::BTreeMap;

use super::{Length, array, le32, nanos, opus};

/// Samples a second that Opus counts in, whatever it was made of (RFC 7845, section 4).
const OPUS_RATE: u64 = 48_000;
/// More in one file are no recording.
const MAX_STREAMS: usize = 16;

#[derive(Copy, Clone)]
enum Codec {
    /// With the samples at the beginning that are not heard.
    Opus { skipped: u64 },
    /// Most samples that a packet makes, and how many are a second.
    Vorbis { most_samples: u64, rate: u64 },
}

struct Stream {
    codec: Codec,
    /// Packets so far, and whether the last one goes on in the next page.
    packets: u64,
    is_open: bool,
    /// The number of samples that the last page says.
    granule: u64,
}

pub(super) fn measure(file: &[u8]) -> Option<Length> {
    let mut streams: BTreeMap<u32, Stream> = BTreeMap::new();
    let mut held: u64 = 0;
    let mut at = 0;
    while at < file.len() {
        let Some(page) = Page::read(file, at)? else { break };
        if !streams.contains_key(&page.serial) {
            if streams.len() == MAX_STREAMS {
                return None;
            }
            let codec = Codec::read(page.body)?;
            streams.insert(page.serial, Stream { codec, packets: 0, is_open: false, granule: 0 });
        }
        // One that begins anew under a name that is taken may be of another kind.
        let is_known = streams.get(&page.serial).is_some_and(|stream| stream.packets > 0);
        if is_known && file.get(at + 5).is_some_and(|flags| flags & 2 != 0) {
            return None;
        }
        let stream = streams.get_mut(&page.serial)?;
        held = held.saturating_add(stream.take(&page));
        at = page.end;
    }
    let only = streams.values().next().filter(|_| streams.len() == 1);
    let said = only.map_or(held, Stream::said);
    let length = match only.map(|stream| stream.codec) {
        // How long its packets are is known, and players go by them: all that may not be heard is what is skipped at the
        // beginning, and cut off from the last (RFC 7845, sections 4.2 and 4.4).
        Some(Codec::Opus { skipped }) => {
            let unheard = nanos(skipped, OPUS_RATE).saturating_add(opus::MOST_NANOS);
            Length::within(unheard, held, said)
        }
        // Vorbis takes shorter blocks where the sound changes: how many, only its tables would tell.
        _ if streams.values().any(|stream| matches!(stream.codec, Codec::Vorbis { .. })) => {
            Length::new(held, said, 75)
        }
        _ => Length::new(held, said, 1),
    };
    (held > 0).then_some(length)
}

struct Page<'a> {
    is_continued: bool,
    granule: u64,
    serial: u32,
    lacing: &'a [u8],
    body: &'a [u8],
    end: usize,
}

impl<'a> Page<'a> {
    /// `None` where there is no page; nothing where the file breaks off in its head.
    fn read(file: &'a [u8], at: usize) -> Option<Option<Self>> {
        let rest = file.get(at..)?;
        if !rest.starts_with(b"OggS") {
            return None;
        }
        let (Some(flags), Some(granule), Some(serial)) = (rest.get(5), array(rest, 6), le32(rest, 14)) else {
            return Some(None);
        };
        let count = usize::from(*rest.get(26).unwrap_or(&0));
        let Some(lacing) = rest.get(27..27 + count) else { return Some(None) };
        let size: usize = lacing.iter().map(|size| usize::from(*size)).sum();
        let body = rest.get(27 + count..)?;
        Some(Some(Self {
            is_continued: flags & 1 == 1,
            granule: u64::from_le_bytes(granule),
            serial,
            lacing,
            // The last page may be cut off.
            body: body.get(..size).unwrap_or(body),
            end: at + 27 + count + size,
        }))
    }
}

impl Codec {
    /// By the packet that a stream begins with.
    fn read(packet: &[u8]) -> Option<Self> {
        if packet.starts_with(b"OpusHead") {
            return Some(Self::Opus { skipped: u64::from(u16::from_le_bytes(array(packet, 10)?)) });
        }
        if packet.starts_with(b"\x01vorbis") {
            let rate = u64::from(le32(packet, 12)?);
            // Of two blocks that overlap, half of each is new.
            let long_block = 1 << (packet.get(28)? >> 4);
            return (rate > 0).then_some(Self::Vorbis { most_samples: long_block / 2, rate });
        }
        None
    }

    /// Packets at the beginning that are no sound.
    fn heads(self) -> u64 {
        match self {
            Self::Opus { .. } => 2,
            Self::Vorbis { .. } => 3,
        }
    }

    fn packet_nanos(self, packet: &[u8]) -> u64 {
        match self {
            Self::Opus { .. } => opus::packet_nanos(packet),
            Self::Vorbis { most_samples, rate } => nanos(most_samples, rate),
        }
    }
}

impl Stream {
    /// The most that the packets last that begin in this page.
    fn take(&mut self, page: &Page<'_>) -> u64 {
        // All bits set: no packet ends here.
        if page.granule != u64::MAX {
            self.granule = self.granule.max(page.granule);
        }
        let mut goes_on = self.is_open && page.is_continued;
        let mut at = 0;
        let mut sum: u64 = 0;
        for size in page.lacing {
            // The rest of the last page is not there.
            if *size > 0 && at >= page.body.len() {
                break;
            }
            if !goes_on {
                if self.packets >= self.codec.heads() {
                    let packet = page.body.get(at..).unwrap_or(&[]);
                    // One without a byte is one that was lost, and made up for.
                    let packet = if *size == 0 { &[] } else { packet };
                    sum = sum.saturating_add(self.codec.packet_nanos(packet));
                }
                self.packets += 1;
            }
            goes_on = *size == 255;
            at += usize::from(*size);
        }
        self.is_open = goes_on;
        sum
    }

    fn said(&self) -> u64 {
        match self.codec {
            Codec::Opus { skipped } => nanos(self.granule.saturating_sub(skipped), OPUS_RATE),
            Codec::Vorbis { rate, .. } => nanos(self.granule, rate),
        }
    }
}
