//! How long a recording is, read from the frames that it holds. What its head claims of its length is believed
//! only where it is more than that, or where the frames bear it out: a file may say a second and hold an hour.
//!
//! One file a container: WAV (Multimedia Programming Interface 1.0, *RIFF WAVE*), MP3 (ISO 11172-3, 13818-3), FLAC
//! (RFC 9639), Ogg (RFC 3533) with Opus (RFC 6716, 7845) or Vorbis (Vorbis I), WebM with Opus (RFC 8794, 9559), MP4
//! with AAC (ISO 14496-12, 14496-3).

mod flac;
mod mp3;
mod mp4;
mod ogg;
mod opus;
mod probe;
mod wav;
mod webm;

/// What can be measured, for who is told that something cannot.
pub const MEASURED: &str = "WAV (PCM), MP3, FLAC, Ogg (Opus or Vorbis) and WebM (Opus), sound alone";

/// Most bytes of tags before the sound that are looked past, one after the other.
const MAX_TAGS: usize = 8;
const NANOS_A_SECOND: u64 = 1_000_000_000;
const NANOS_A_MILLISECOND: u64 = 1_000_000;
/// More than coders put around a recording.
const AROUND_NANOS: u64 = 250 * NANOS_A_MILLISECOND;

/// How long a recording is, in milliseconds, rounded up.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Length {
    /// No decoder finds more in it, whatever it does at places that are broken.
    pub most_ms: u64,
    /// What it is. The same where the file contradicts itself.
    pub ms: u64,
}

impl Length {
    /// What a file holds at most, and what it says, or seems, to hold. The two differ in good faith, by what a coder
    /// puts before and behind the sound and, where `percent` is not 0, by so much of the most; beyond that what is
    /// said is not believed.
    fn new(most_ns: u64, said_ns: u64, percent: u64) -> Self {
        let allowed = (most_ns / 100).saturating_mul(percent).saturating_add(AROUND_NANOS);
        Self::within(allowed, most_ns, said_ns)
    }

    /// The same where they may differ by this much and no more.
    fn within(allowed: u64, most_ns: u64, said_ns: u64) -> Self {
        let believed = said_ns <= most_ns && said_ns >= most_ns.saturating_sub(allowed);
        let ms = |ns: u64| ns.div_ceil(NANOS_A_MILLISECOND);
        let most_ms = ms(most_ns.max(said_ns));
        Self { most_ms, ms: if believed { ms(said_ns) } else { most_ms } }
    }

    fn exactly(ns: u64) -> Self {
        Self::new(ns, ns, 0)
    }
}

/// The length of a recording, `None` where its format is another or it is broken in a way that leaves it open.
pub fn measure(file: &[u8]) -> Option<Length> {
    let sound = without_id3(file)?;
    match sound {
        [b'R', b'I', b'F', b'F', ..] | [b'R', b'F', b'6', b'4', ..] => wav::measure(sound),
        [b'f', b'L', b'a', b'C', ..] => flac::measure(sound),
        [b'O', b'g', b'g', b'S', ..] => ogg::measure(sound),
        [0x1a, 0x45, 0xdf, 0xa3, ..] => webm::measure(sound),
        [_, _, _, _, b'f', b't', b'y', b'p', ..] => mp4::measure(sound),
        _ => mp3::measure(sound),
    }
}

/// The same of a file that is sent by somebody who would gain by its seeming short: `None` also where a decoder
/// might find another recording in it than its head tells of. Of MP4 the tables can say anything: how often a sample
/// is played, and how many frames are in it.
pub fn measure_sent(file: &[u8]) -> Option<Length> {
    let sound = without_id3(file)?;
    let is_mpeg = match sound {
        [b'R', b'I', b'F', b'F', ..] | [b'R', b'F', b'6', b'4', ..] => wav::is_mpeg(sound),
        [b'f', b'L', b'a', b'C', ..] | [b'O', b'g', b'g', b'S', ..] | [0x1a, 0x45, 0xdf, 0xa3, ..] => false,
        [_, _, _, _, b'f', b't', b'y', b'p', ..] => return None,
        _ => true,
    };
    let is_tagged = sound.len() < file.len();
    if probe::hides_another(sound) || (!is_mpeg && (is_tagged || probe::hides_mpeg(sound))) {
        return None;
    }
    measure(file)
}

/// What is behind the ID3v2 tags (id3.org, *ID3v2.4.0*, section 3.1) that a file begins with.
fn without_id3(mut file: &[u8]) -> Option<&[u8]> {
    for _ in 0..MAX_TAGS {
        let [b'I', b'D', b'3', major, minor, flags, a, b, c, d, ..] = file else { return Some(file) };
        // What is no tag to others is none to look past.
        if *major == 0xff || *minor == 0xff || (a | b | c | d) & 0x80 != 0 {
            return None;
        }
        let size = [a, b, c, d].iter().fold(0, |size, byte| size << 7 | usize::from(**byte & 0x7f));
        let footer = if flags & 0x10 == 0 { 0 } else { 10 };
        file = file.get(10 + size + footer..)?;
    }
    None
}

/// So many samples at so many a second.
fn nanos(samples: u64, rate: u64) -> u64 {
    samples.saturating_mul(NANOS_A_SECOND).div_ceil(rate.max(1))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn le16(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_le_bytes)
}

fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_le_bytes)
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_be_bytes)
}

fn length_of(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

#[cfg(test)]
pub(super) mod tests;
