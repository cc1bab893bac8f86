//! WebM, as browsers record it: elements one after the other, in which blocks of Opus stand.

use super::{Length, opus};

/// What is looked into; the rest is passed over. The names are those of RFC 9559.
mod id {
    pub const EBML: u64 = 0x1a45_dfa3;
    pub const SEEK_HEAD: u64 = 0x114d_9b74;
    pub const SEGMENT: u64 = 0x1853_8067;
    pub const CLUSTER: u64 = 0x1f43_b675;
    pub const TRACKS: u64 = 0x1654_ae6b;
    pub const TRACK_ENTRY: u64 = 0xae;
    pub const CODEC_ID: u64 = 0x86;
    pub const CONTENT_ENCODINGS: u64 = 0x6d80;
    pub const BLOCK_GROUP: u64 = 0xa0;
    pub const BLOCK: u64 = 0xa1;
    pub const SIMPLE_BLOCK: u64 = 0xa3;
}

/// What is where in the file names its clusters too, and is short.
const MOST_INDEX: u64 = 1 << 10;

/// Elements in one another deeper than any recording has them.
const MAX_DEPTH: usize = 8;

pub(super) fn measure(file: &[u8]) -> Option<Length> {
    let mut at = 0;
    let mut tracks: u64 = 0;
    let mut held: u64 = 0;
    // Where those end that are open, of which that is known: each within the one before it.
    let mut ends: Vec<usize> = Vec::new();
    while at < file.len() {
        while ends.last().is_some_and(|end| *end == at) {
            ends.pop();
        }
        let (id, id_bytes) = number(file.get(at..)?, true)?;
        let (size, size_bytes) = number(file.get(at + id_bytes..)?, false)?;
        let start = at + id_bytes + size_bytes;
        let end = start.checked_add(usize::try_from(size).ok()?)?;
        let is_endless = size == (1 << (7 * size_bytes)) - 1;
        let most = ends.last().copied().unwrap_or(usize::MAX);
        let is_opened =
            matches!(id, id::SEGMENT | id::CLUSTER | id::TRACKS | id::TRACK_ENTRY | id::BLOCK_GROUP);
        if is_endless {
            // Only these may be (RFC 9559, section 5.1), and are over where what they are in is.
            if !matches!(id, id::SEGMENT | id::CLUSTER) || start > most {
                return None;
            }
        } else if end > most || ends.len() == MAX_DEPTH {
            // Others go on behind the end of the one that it is in, and find something else there.
            return None;
        } else if is_opened {
            ends.push(end);
        }
        at = if is_opened { start } else { end };
        // A decoder that has lost its way looks for the next cluster, wherever that is.
        let is_index = id == id::SEEK_HEAD && size <= MOST_INDEX;
        if !is_opened && !is_index && has_cluster(file.get(start..at).unwrap_or_default()) {
            return None;
        }
        match (id, file.get(start..at)) {
            (id::CODEC_ID, Some(codec)) if codec != b"A_OPUS" => return None,
            (id::CODEC_ID, _) => tracks += 1,
            (id::CONTENT_ENCODINGS, _) => return None,
            (id::BLOCK | id::SIMPLE_BLOCK, Some(block)) => held = held.saturating_add(block_nanos(block)?),
            // The last block may be cut off, if no others could be found behind it.
            (id::BLOCK | id::SIMPLE_BLOCK, None) => {
                if has_cluster(file.get(start..)?) {
                    return None;
                }
                held = held.saturating_add(opus::MOST_NANOS);
            }
            (id::EBML, Some(_)) => {}
            (_, None) => return None,
            _ => {}
        }
    }
    (tracks == 1 && held > 0).then(|| Length::exactly(held))
}

fn has_cluster(bytes: &[u8]) -> bool {
    bytes.windows(4).any(|bytes| bytes == [0x1f, 0x43, 0xb6, 0x75])
}

/// What a block lasts: its track's number, its time and its flags, and then one packet, or several.
fn block_nanos(block: &[u8]) -> Option<u64> {
    let (_, track_bytes) = number(block, false)?;
    let flags = block.get(track_bytes + 2)?;
    let packet = block.get(track_bytes + 3..)?;
    if flags & 0x06 == 0 {
        return Some(opus::packet_nanos(packet));
    }
    Some((u64::from(*packet.first()?) + 1) * opus::MOST_NANOS)
}

/// A number of a length of its own (RFC 8794, section 4), and how many bytes it has. Of an element's name the mark
/// of its length is a part.
fn number(bytes: &[u8], is_id: bool) -> Option<(u64, usize)> {
    let first = *bytes.first()?;
    let length = usize::try_from(first.leading_zeros()).ok()? + 1;
    let mark = 0x80_u8.checked_shr(u32::try_from(length - 1).ok()?)?;
    let first = if is_id { first } else { first & !mark };
    let rest = bytes.get(1..length)?;
    Some((rest.iter().fold(u64::from(first), |value, byte| value << 8 | u64::from(*byte)), length))
}
