//! MP3, and the other layers: frames that each have a head, and a length by their bit rate.

use super::{Length, length_of, nanos};

/// Kilobits a second by the index in a frame's head: MPEG 1, layers I to III, then later ones, I, and II and III.
const MPEG1: [[u64; 16]; 3] = [
    [0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448, 0],
    [0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 0],
    [0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0],
];
const MPEG2: [[u64; 16]; 2] = [
    [0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256, 0],
    [0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0],
];
const RATES: [u64; 3] = [44_100, 48_000, 32_000];

/// As much else as there may be in a file beside its frames, or a sixteenth: tags behind them, and what was cut off.
const MOST_OTHERS: u64 = 128 << 10;

/// A head of four bytes.
#[derive(Copy, Clone)]
struct Frame {
    /// Version, layer and rate: the same in all frames of a recording.
    kind: (u8, u8, u64),
    samples: u64,
    rate: u64,
    /// With its head; 0 where the bit rate is free, and its end to be looked for.
    bytes: usize,
}

impl Frame {
    fn read(file: &[u8], at: usize) -> Option<Self> {
        let [0xff, b, c, _] = *file.get(at..at.checked_add(4)?)? else { return None };
        if b & 0xe0 != 0xe0 {
            return None;
        }
        // 0: MPEG 2.5, 2: MPEG 2, 3: MPEG 1; 1 is none. 3: layer I, 2: II, 1: III; 0 is none.
        let (version, layer, bit_rate, rate) = (b >> 3 & 3, b >> 1 & 3, usize::from(c >> 4), c >> 2 & 3);
        if version == 1 || layer == 0 || bit_rate == 15 {
            return None;
        }
        let full = *RATES.get(usize::from(rate))?;
        let rate = match version {
            3 => full,
            2 => full / 2,
            _ => full / 4,
        };
        let kilobits = match (version, layer) {
            (3, layer) => MPEG1[usize::from(3 - layer)][bit_rate],
            (_, 3) => MPEG2[0][bit_rate],
            _ => MPEG2[1][bit_rate],
        };
        let samples = match (version, layer) {
            (_, 3) => 384,
            (3, _) | (_, 2) => 1152,
            _ => 576,
        };
        let padding = u64::from(c >> 1 & 1);
        // Layer I counts in slots of four bytes.
        let slot = if layer == 3 { 4 } else { 1 };
        let bytes = match kilobits {
            0 => 0,
            _ => (samples / 8 * kilobits * 1000 / rate / slot + padding) * slot,
        };
        Some(Self { kind: (version, layer, rate), samples, rate, bytes: usize::try_from(bytes).ok()? })
    }

    fn nanos(&self) -> u64 {
        nanos(self.samples, self.rate)
    }
}

/// The bytes of the frame at a place, if there is one.
pub(super) fn frame_bytes(file: &[u8], at: usize) -> Option<usize> {
    Frame::read(file, at).map(|frame| frame.bytes).filter(|bytes| *bytes > 0)
}

/// At most what all heads there can be say together: no decoder makes sound without one. By chance some are in
/// what is none, one in 5,000 bytes. What it is, is told by the frames that follow on one another.
pub(super) fn measure(file: &[u8]) -> Option<Length> {
    let mut all_ns: u64 = 0;
    let mut chained_ns: u64 = 0;
    let mut kind = None;
    // Where the frame ends that is being walked over.
    let mut end = 0;
    let mut chained_bytes = 0;
    for (at, _) in file.iter().enumerate().filter(|(_, byte)| **byte == 0xff) {
        let Some(frame) = Frame::read(file, at) else { continue };
        all_ns = all_ns.saturating_add(frame.nanos());
        if at < end || frame.bytes == 0 || kind.is_some_and(|kind| kind != frame.kind) {
            continue;
        }
        let next = at.saturating_add(frame.bytes);
        let is_followed = Frame::read(file, next).is_some_and(|next| next.kind == frame.kind);
        if is_followed || (at == end && kind.is_some()) || next == file.len() {
            kind = Some(frame.kind);
            chained_ns = chained_ns.saturating_add(frame.nanos());
            chained_bytes += frame.bytes;
            end = next;
        }
    }
    // Something else that looks like a frame here and there is no recording.
    let chained_bytes = u64::try_from(chained_bytes).ok()?;
    let others = length_of(file).saturating_sub(chained_bytes);
    let is_mostly_frames = others <= MOST_OTHERS.max(length_of(file) / 16);
    (chained_ns > 0 && is_mostly_frames).then(|| Length::new(all_ns, chained_ns, 50))
}
