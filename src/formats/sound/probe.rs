//! What else a file could be taken for. A decoder that looks at more than the head may find another recording in
//! it than the one that the head tells of, and a longer one.

use super::{array, mp3};

/// As far as decoders look before they decide.
const PROBED: usize = 6 << 20;
const PROBED_FOR_PACKETS: usize = 1 << 20;
/// So many frames that follow on one another are no chance.
const CHAIN: usize = 4;
/// How packets of MPEG-TS (ISO 13818-1) and of what carries them follow on one another.
const STRIDES: [usize; 3] = [188, 192, 204];
/// What frames of DTS, of TrueHD and of what goes through S/PDIF begin with (ETSI TS 102 114, IEC 61937).
const MARKS: [[u8; 4]; 7] = [
    [0x7f, 0xfe, 0x80, 0x01],
    [0xfe, 0x7f, 0x01, 0x80],
    [0x1f, 0xff, 0xe8, 0x00],
    [0xff, 0x1f, 0x00, 0xe8],
    [0xf8, 0x72, 0x6f, 0xba],
    [0x72, 0xf8, 0x1f, 0x4e],
    [0xf8, 0x72, 0x4e, 0x1f],
];
/// In PCM one of them may be by chance.
const MOST_MARKS: usize = 2;
/// Kilobits a second of AC-3 by the code in a frame's head (ATSC A/52, table 5.18).
const AC3: [usize; 19] =
    [32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 576, 640];

/// Whether there are frames in it of what is no MPEG sound.
pub(super) fn hides_another(file: &[u8]) -> bool {
    let start = file.get(..PROBED).unwrap_or(file);
    let marks = start.windows(4).filter(|bytes| MARKS.iter().any(|mark| mark == bytes)).count();
    marks > MOST_MARKS || is_chained(file, adts) || is_chained(file, ac3) || is_in_packets(file)
}

/// Whether there are frames of MPEG sound in it.
pub(super) fn hides_mpeg(file: &[u8]) -> bool {
    is_chained(file, mp3::frame_bytes)
}

/// Whether frames follow on one another from some place on where decoders look. `bytes` says how long the frame at
/// a place is.
fn is_chained(file: &[u8], bytes: fn(&[u8], usize) -> Option<usize>) -> bool {
    (0..file.len().min(PROBED)).any(|first| {
        let mut at = first;
        (0..CHAIN).all(|_| {
            let length = bytes(file, at);
            at = at.saturating_add(length.unwrap_or(0));
            length.is_some()
        })
    })
}

/// ADTS (ISO 13818-7, section 6.2): AAC.
fn adts(file: &[u8], at: usize) -> Option<usize> {
    let [0xff, b, c, d, e, f] = array::<6>(file, at)? else { return None };
    if b & 0xf6 != 0xf0 || c >> 2 & 0xf > 12 {
        return None;
    }
    let length = usize::from(d & 3) << 11 | usize::from(e) << 3 | usize::from(f >> 5);
    (length > 7).then_some(length)
}

fn ac3(file: &[u8], at: usize) -> Option<usize> {
    let [0x0b, 0x77, _, _, code] = array::<5>(file, at)? else { return None };
    let kilobits = *AC3.get(usize::from(code & 0x3f) / 2)?;
    match code >> 6 {
        0 => Some(kilobits * 4),
        1 => Some((kilobits * 320 / 147 + usize::from(code & 1)) * 2),
        2 => Some(kilobits * 6),
        _ => None,
    }
}

fn is_in_packets(file: &[u8]) -> bool {
    let begins = |at: usize| file.get(at) == Some(&0x47);
    (0..file.len().min(PROBED_FOR_PACKETS))
        .filter(|at| begins(*at))
        .any(|first| STRIDES.iter().any(|stride| (0..10).filter(|i| begins(first + i * stride)).count() >= 7))
}
