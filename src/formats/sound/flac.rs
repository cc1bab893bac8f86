//! FLAC: frames of any number of samples, whose heads have a check sum.

use super::{Length, array, be32, nanos};

pub(super) fn measure(file: &[u8]) -> Option<Length> {
    // The first block is STREAMINFO (RFC 9639, section 8.2), and has 34 bytes.
    if be32(file, 4)? & 0x7fff_ffff != 34 {
        return None;
    }
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
    let frames = candidates.filter_map(|(at, _)| frame_nanos(file.get(at..)?, rate));
    let held = frames.fold(0, u64::saturating_add);
    // 0 is not known.
    let said = if said == 0 { held } else { nanos(said, rate) };
    (held > 0).then(|| Length::new(held, said, 1))
}

/// How long the frame is whose head these bytes begin with (RFC 9639, section 9.1), if it is one.
fn frame_nanos(bytes: &[u8], stream_rate: u64) -> Option<u64> {
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
    (rate > 0 && crc_8(bytes.get(..at)?) == *bytes.get(at)?).then(|| nanos(samples, rate))
}

/// By the polynomial x⁸ + x² + x + 1.
pub(super) fn crc_8(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |crc, byte| {
        (0..8).fold(crc ^ byte, |crc, _| if crc & 0x80 == 0 { crc << 1 } else { crc << 1 ^ 7 })
    })
}
