//! FLAC: frames of any number of samples, whose heads have a check sum.

use super::{Length, array, be32, nanos};

/// The type of the block that says what the stream is (RFC 9639, section 8.1).
const STREAMINFO: u32 = 0;
/// By chance some bytes look like the head of a frame, and then at another rate: one in ten million.
const MOST_OTHERS: usize = 16;

/// How long a frame is at the rate of its own head and at that of the stream, whichever is slower: readers go by the
/// one or the other.
struct Frame {
    nanos: u64,
    is_at_streams_rate: bool,
}

pub(super) fn measure(file: &[u8]) -> Option<Length> {
    // The first block is STREAMINFO (RFC 9639, section 8.2), and has 34 bytes.
    if be32(file, 4)? & 0x7fff_ffff != 34 {
        return None;
    }
    let first = first_frame(file)?;
    let blocks = (be32(file, 8)? >> 16, be32(file, 8)? & 0xffff);
    if blocks.0 < 16 || blocks.1 < blocks.0 {
        return None;
    }
    let packed = u64::from_be_bytes(array(file, 18)?);
    let (rate, said) = (packed >> 44, packed & 0xf_ffff_ffff);
    if rate == 0 {
        return None;
    }
    // Whatever could be a frame counts. That something is none, and has the right check sum, is rarer than one in
    // four million bytes.
    let candidates = file.iter().enumerate().skip(42).filter(|(_, byte)| **byte == 0xff);
    let frames = candidates.filter_map(|(at, _)| Frame::read(file.get(at..)?, rate));
    let (mut held, mut others) = (0_u64, 0);
    for frame in frames {
        held = held.saturating_add(frame.nanos);
        others += usize::from(!frame.is_at_streams_rate);
    }
    // Some readers take the rate of the first frame for that of all.
    let begins_so = file.get(first..).and_then(|bytes| Frame::read(bytes, rate))?.is_at_streams_rate;
    if others > MOST_OTHERS || !begins_so {
        return None;
    }
    // 0 is not known.
    let said = if said == 0 { held } else { nanos(said, rate) };
    (held > 0).then(|| Length::new(held, said, 1))
}

/// Where the blocks before the sound end (RFC 9639, section 8.1). `None` if another of them says what the stream is:
/// readers take the first or the last.
fn first_frame(file: &[u8]) -> Option<usize> {
    let mut at = 4;
    loop {
        let head = be32(file, at)?;
        let (is_last, kind, size) = (head >> 31 == 1, head >> 24 & 0x7f, head & 0xff_ffff);
        if at > 4 && kind == STREAMINFO {
            return None;
        }
        at = at.checked_add(4)?.checked_add(usize::try_from(size).ok()?)?;
        if is_last {
            return Some(at);
        }
    }
}

impl Frame {
    /// The frame whose head these bytes begin with, if it is one.
    fn read(bytes: &[u8], stream_rate: u64) -> Option<Self> {
        let (samples, rate) = head(bytes, stream_rate)?;
        let nanos = nanos(samples, rate.min(stream_rate));
        Some(Self { nanos, is_at_streams_rate: rate == stream_rate })
    }
}

/// The samples and the rate in the head of a frame (RFC 9639, section 9.1).
fn head(bytes: &[u8], stream_rate: u64) -> Option<(u64, u64)> {
    let [0xff, second, codes, ..] = *bytes else { return None };
    if second & 0xfe != 0xf8 {
        return None;
    }
    let number = match bytes.get(4)?.leading_ones() {
        0 => 1,
        ones @ 2..=7 => usize::try_from(ones).ok()?,
        _ => return None,
    };
    let mut at = 4 + number;
    let mut field = |size: usize| {
        let taken = bytes.get(at..at + size)?;
        at += size;
        Some(taken.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    };
    let samples = match codes >> 4 {
        0 => return None,
        1 => 192,
        code @ 2..=5 => 576 << (code - 2),
        6 => field(1)? + 1,
        7 => field(2)? + 1,
        code => 256 << (code - 8),
    };
    let rate = match codes & 0xf {
        0 => stream_rate,
        1 => 88_200,
        2 => 176_400,
        3 => 192_000,
        4 => 8000,
        5 => 16_000,
        6 => 22_050,
        7 => 24_000,
        8 => 32_000,
        9 => 44_100,
        10 => 48_000,
        11 => 96_000,
        12 => field(1)? * 1000,
        13 => field(2)?,
        14 => field(2)? * 10,
        _ => return None,
    };
    (rate > 0 && crc_8(bytes.get(..at)?) == *bytes.get(at)?).then_some((samples, rate))
}

/// What each byte is the check sum of, by the polynomial x⁸ + x² + x + 1 (RFC 9639, section 9.1.8).
const CRC_8: [u8; 256] = {
    let mut sums = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut left = 8;
        #[expect(clippy::cast_possible_truncation, reason = "it is below 256")]
        let mut sum = byte as u8;
        while left > 0 {
            sum = if sum & 0x80 == 0 { sum << 1 } else { sum << 1 ^ 7 };
            left -= 1;
        }
        sums[byte] = sum;
        byte += 1;
    }
    sums
};

pub(super) fn crc_8(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |crc, byte| CRC_8[usize::from(crc ^ byte)])
}
