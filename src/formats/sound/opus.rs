//! A packet of Opus says how long it is in its first bytes (RFC 6716, section 3).

/// No packet is longer.
pub(super) const MOST_NANOS: u64 = 120_000_000;

/// Of a packet that is not there, or not all of it, the most.
pub(super) fn packet_nanos(packet: &[u8]) -> u64 {
    let Some(first) = packet.first() else { return MOST_NANOS };
    let frame: u64 = match first >> 3 {
        config @ 0..=11 => [10_000_000, 20_000_000, 40_000_000, 60_000_000][usize::from(config % 4)],
        config @ 12..=15 => [10_000_000, 20_000_000][usize::from(config % 2)],
        config => 2_500_000 << (config % 4),
    };
    let frames = match first & 3 {
        0 => 1,
        1 | 2 => 2,
        _ => packet.get(1).map_or(48, |second| u64::from(second & 0x3f)),
    };
    (frame * frames).min(MOST_NANOS)
}
