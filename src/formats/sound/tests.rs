use super::*;
use proptest::prelude::*;

/// Samples of 16 bits, one channel.
pub(in crate::formats) fn wav(rate: u32, samples: usize) -> Vec<u8> {
    wav_of(rate, u32::try_from(samples * 2).unwrap(), &vec![7; samples * 2])
}

fn wav_of(rate: u32, declared: u32, data: &[u8]) -> Vec<u8> {
    let mut file = b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0".to_vec();
    file.extend_from_slice(&rate.to_le_bytes());
    file.extend_from_slice(&(rate * 2).to_le_bytes());
    file.extend_from_slice(b"\x02\0\x10\0data");
    file.extend_from_slice(&declared.to_le_bytes());
    file.extend_from_slice(data);
    file
}

/// Frames of MPEG 1 layer III, 128 kilobits and 44,100 samples a second.
fn mp3(frames: usize) -> Vec<u8> {
    let mut frame = vec![0; 417];
    frame[..4].copy_from_slice(&[0xff, 0xfb, 0x90, 0x00]);
    frame.repeat(frames)
}

/// Frames of so many samples, from 1 to 65,536, with as few bytes as there can be, and a head that says `said`.
fn flac(rate: u64, said: u64, frames: usize, samples: u32) -> Vec<u8> {
    [b"fLaC\x80", &flac_info(rate, said)[..], &flac_frames(frames, samples, None)].concat()
}

/// The block that says what the stream is, without its type.
fn flac_info(rate: u64, said: u64) -> Vec<u8> {
    let packed = (rate << 44 | 15 << 36 | said).to_be_bytes();
    [&[0, 0, 34, 0, 16, 0xff, 0xff, 0, 0, 0, 0, 0, 0], &packed[..], &[0; 16]].concat()
}

/// Frames at the stream's rate, or at so many samples a second.
fn flac_frames(frames: usize, samples: u32, rate: Option<u16>) -> Vec<u8> {
    let mut head = vec![0xff, 0xf8, if rate.is_some() { 0x7d } else { 0x70 }, 0x08, 0x00];
    head.extend_from_slice(&u16::try_from(samples - 1).unwrap().to_be_bytes());
    head.extend(rate.iter().flat_map(|rate| rate.to_be_bytes()));
    head.push(flac::crc_8(&head));
    head.extend_from_slice(&[0, 0, 0, 0, 0]);
    head.repeat(frames)
}

fn ogg_page(flags: u8, granule: u64, packets: &[&[u8]]) -> Vec<u8> {
    let mut page = b"OggS\0".to_vec();
    page.push(flags);
    page.extend_from_slice(&granule.to_le_bytes());
    page.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let lacing: Vec<u8> = packets
        .iter()
        .flat_map(|packet| {
            let whole = packet.len() / 255;
            [vec![255; whole], vec![u8::try_from(packet.len() % 255).unwrap()]].concat()
        })
        .collect();
    page.push(u8::try_from(lacing.len()).unwrap());
    page.extend_from_slice(&lacing);
    page.extend_from_slice(&packets.concat());
    page
}

/// Packets of 20 milliseconds each, and a last page that says `granule` samples.
fn opus(packets: usize, granule: u64) -> Vec<u8> {
    let mut head = b"OpusHead\x01\x01".to_vec();
    head.extend_from_slice(&312_u16.to_le_bytes());
    head.extend_from_slice(&[0; 7]);
    let mut file = ogg_page(2, 0, &[&head]);
    file.extend(ogg_page(0, 0, &[b"OpusTags\0\0\0\0"]));
    // 0xf8: CELT, 20 milliseconds, one frame.
    let packets = vec![&[0xf8, 1, 2][..]; packets];
    let last = packets.len().div_ceil(50).saturating_sub(1);
    for (i, page) in packets.chunks(50).enumerate() {
        file.extend(ogg_page(0, if i == last { granule } else { 0 }, page));
    }
    file
}

fn element(id: &[u8], content: &[u8]) -> Vec<u8> {
    let size = u32::try_from(content.len()).unwrap() | 0x1000_0000;
    [id, &size.to_be_bytes(), content].concat()
}

const CLUSTER: [u8; 4] = [0x1f, 0x43, 0xb6, 0x75];

/// Of an element that does not say how long it is.
fn endless(id: &[u8], content: &[u8]) -> Vec<u8> {
    [id, &[0x01, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], content].concat()
}

/// A packet of 20 milliseconds.
fn webm_block() -> Vec<u8> {
    element(&[0xa3], &[0x81, 0, 0, 0x80, 0xf8, 1, 2])
}

fn webm_of(codec: &[u8], clusters: &[u8]) -> Vec<u8> {
    let track = element(&[0xae], &element(&[0x86], codec));
    let tracks = element(&[0x16, 0x54, 0xae, 0x6b], &track);
    let segment = endless(&[0x18, 0x53, 0x80, 0x67], &[&tracks, clusters].concat());
    [element(&[0x1a, 0x45, 0xdf, 0xa3], b""), segment].concat()
}

fn webm(blocks: usize, codec: &[u8]) -> Vec<u8> {
    webm_of(codec, &endless(&CLUSTER, &webm_block().repeat(blocks)))
}

fn boxed(name: &[u8; 4], content: &[u8]) -> Vec<u8> {
    let size = u32::try_from(content.len() + 8).unwrap();
    [&size.to_be_bytes()[..], name, content].concat()
}

/// So many samples of AAC at 44,100 values a second, and a head that says `said` of those.
fn mp4(samples: u32, said: u32) -> Vec<u8> {
    let decoder = [&[4, 17, 0x40][..], &[0; 12], &[5, 2, 0x12, 0x10]].concat();
    let esds = [&[0, 0, 0, 0, 3, 22, 0, 0, 0][..], &decoder].concat();
    let entry = boxed(b"mp4a", &[&[0; 28][..], &boxed(b"esds", &esds)].concat());
    let stsd = boxed(b"stsd", &[&[0, 0, 0, 0, 0, 0, 0, 1][..], &entry].concat());
    let stsz = boxed(b"stsz", &[&[0; 8][..], &samples.to_be_bytes()].concat());
    let mdhd =
        boxed(b"mdhd", &[&[0; 12][..], &44_100_u32.to_be_bytes(), &said.to_be_bytes(), &[0; 4]].concat());
    let stbl = boxed(b"minf", &boxed(b"stbl", &[stsd, stsz].concat()));
    let moov = boxed(b"moov", &boxed(b"trak", &boxed(b"mdia", &[mdhd, stbl].concat())));
    [boxed(b"ftyp", b"M4A \0\0\0\0"), moov, boxed(b"mdat", &[0; 100])].concat()
}

fn length(file: &[u8]) -> (u64, u64) {
    let length = measure(file).unwrap();
    assert!(length.ms <= length.most_ms);
    (length.most_ms, length.ms)
}

fn all() -> Vec<Vec<u8>> {
    let id3 = b"ID3\x04\0\0\0\0\0\x0aAAAAAAAAAA".to_vec();
    vec![
        wav(8000, 400),
        mp3(4),
        [id3, mp3(3)].concat(),
        flac(8000, 8192, 2, 4096),
        opus(60, 48_000),
        webm(9, b"A_OPUS"),
        mp4(100, 102_400),
    ]
}

#[test]
fn every_format_is_measured() {
    assert_eq!(length(&wav(16_000, 24_000)), (1500, 1500));
    // 39 frames of 1,152 samples.
    assert_eq!(length(&mp3(39)), (1019, 1019));
    assert_eq!(length(&flac(16_000, 24_000, 6, 4000)), (1500, 1500));
    assert_eq!(length(&opus(75, 312 + 71_688)), (1500, 1494));
    assert_eq!(length(&webm(75, b"A_OPUS")), (1500, 1500));
    // 65 samples of 1,024 values, the last of which is not full.
    assert_eq!(length(&mp4(65, 66_150)), (1510, 1500));
}

#[test]
fn a_head_that_says_less_than_there_is_is_not_believed() {
    let hour = vec![7; 16_000 * 2 * 3600];
    assert_eq!(length(&wav_of(16_000, 32_000, &hour)), (3_600_000, 3_600_000));
    // 65,536 samples, 8 seconds, in 13 bytes.
    assert_eq!(length(&flac(8000, 8000, 450, 65_536)), (3_686_400, 3_686_400));
    assert_eq!(length(&opus(180_000, 48_000)), (3_600_000, 3_600_000));
    assert_eq!(length(&mp4(155_040, 44_100)), (3_600_022, 3_600_022));
    // Not half of it either, nor a tenth less.
    assert_eq!(length(&wav_of(16_000, 160_000, &hour[..320_000])), (10_000, 10_000));
    assert_eq!(length(&wav_of(16_000, 288_000, &hour[..320_000])), (10_000, 10_000));
    assert_eq!(length(&wav_of(16_000, 319_000, &hour[..320_000])), (10_000, 9969));
    assert_eq!(length(&flac(16_000, 150_000, 16, 10_000)), (10_000, 10_000));
    assert_eq!(length(&opus(500, 48_000 * 9)), (10_000, 10_000));
}

#[test]
fn a_head_that_says_more_is_held_for() {
    assert_eq!(length(&opus(50, 48_000 * 3600 + 312)), (3_600_000, 3_600_000));
    assert_eq!(length(&flac(8000, 8000 * 3600, 1, 8000)), (3_600_000, 3_600_000));
    assert_eq!(length(&mp4(44, 44_100 * 3600)).0, 3_600_000);
    // Unknown while it was written: as much as there is.
    assert_eq!(length(&wav_of(16_000, u32::MAX, &[7; 32_000])), (1000, 1000));
    assert_eq!(length(&wav_of(16_000, 0, &[7; 32_000])), (1000, 1000));
}

#[test]
fn a_wav_is_as_long_as_its_slowest_reading() {
    let mut file = wav(16_000, 16_000);
    // The size of a sample, which some read and some work out.
    file[32] = 200;
    assert_eq!(length(&file).0, 1000);
    file[32] = 1;
    assert_eq!(length(&file).0, 2000);
    for (at, value) in [(32, 0), (34, 0), (22, 0), (20, 2), (8, b'X')] {
        let mut file = wav(16_000, 100);
        file[at] = value;
        assert_eq!(measure(&file), None, "{at}");
    }
    // A chunk of an odd size before the format, behind which readers disagree.
    let file = wav(16_000, 100);
    let odd = [&file[..12], b"junk\x01\0\0\0xy", &file[12..]].concat();
    assert_eq!(measure(&odd), None);
    let even = [&file[..12], b"junk\x02\0\0\0xy", &file[12..]].concat();
    assert!(measure(&even).is_some());
}

#[test]
fn every_head_of_an_mp3_counts() {
    // A slower recording in the frames of a faster one: which of them is heard depends on where one begins.
    let mut frame = vec![0; 417];
    frame[..4].copy_from_slice(&[0xff, 0xfb, 0x90, 0x00]);
    // MPEG 2.5 layer III, 8 kilobits and 8,000 samples a second: 72 bytes, 72 milliseconds.
    for at in (10..=300).step_by(72) {
        frame[at..at + 4].copy_from_slice(&[0xff, 0xe3, 0x18, 0x00]);
    }
    let (most, ms) = length(&frame.repeat(100));
    assert_eq!(most, 100 * 5 * 72 + 2613);
    assert_eq!(ms, most);
    // What follows no other is no recording.
    assert_eq!(measure(&[vec![0; 1000], mp3(1), vec![0; 1000]].concat()), None);
    assert_eq!(measure(&[mp3(10), vec![0; 1000]].concat()).unwrap().ms, 262);
}

#[test]
fn an_opus_packet_says_how_long_it_is() {
    for (first, second, ms) in [
        (0x00, 0, 10),
        (0x18, 0, 60),
        (0x1b, 2, 120),
        (0x1b, 63, 120),
        (0x60, 0, 10),
        (0x69, 0, 40),
        (0xfa, 0, 40),
        (0xfb, 3, 60),
    ] {
        assert_eq!(opus::packet_nanos(&[first, second]), ms * 1_000_000, "{first:x}");
    }
    assert_eq!(opus::packet_nanos(&[0x80]), 2_500_000);
    assert_eq!(opus::packet_nanos(&[]), opus::MOST_NANOS);
}

#[test]
fn what_cannot_be_measured_is_not() {
    for file in [&b""[..], b"text", b"ID3\x04\0\0\x7f\x7f\x7f\x7f", b"RIFF\0\0\0\0AVI ", b"OggS", b"fLaC"] {
        assert_eq!(measure(file), None, "{file:?}");
    }
    assert_eq!(measure(&webm(3, b"A_VORBIS")), None);
    assert_eq!(measure(&webm(3, b"V_VP8")), None);
    let mut other = mp4(10, 10_240);
    let at = other.windows(4).position(|name| name == b"mp4a").unwrap();
    other[at..at + 4].copy_from_slice(b"alac");
    assert_eq!(measure(&other), None);
    // Something else behind the pages.
    assert_eq!(measure(&[opus(10, 9600), b"more".to_vec()].concat()), None);
}

#[test]
fn a_file_cut_off_anywhere_is_no_longer_than_the_whole() {
    for file in all() {
        let whole = measure(&file).unwrap();
        for end in 0..file.len() {
            let Some(part) = measure(&file[..end]) else { continue };
            // A block of which nobody can see how long it is counts as the longest.
            assert!(part.most_ms <= whole.most_ms + 120, "{end} of {}", file.len());
        }
    }
}

proptest! {
    #[test]
    fn nothing_panics(which in 0..7_usize, changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20)) {
        let mut file = all().swap_remove(which);
        for (at, value) in changes {
            let at = at.index(file.len());
            file[at] = value;
        }
        if let Some(length) = measure(&file) {
            prop_assert!(length.ms <= length.most_ms);
        }
    }

    #[test]
    fn no_frame_is_overlooked(frames in 1..200_usize, samples in 16..=65_536_u32, said in 0..1_000_000_u64) {
        let file = flac(44_100, said, frames, samples);
        let held = u64::try_from(frames).unwrap() * u64::from(samples) * 1000 / 44_100;
        prop_assert!(measure(&file).unwrap().most_ms >= held);
    }
}

/// What one reader takes for a second and another for a minute is nobody's to measure.
#[test]
fn what_could_be_another_recording_is_not_measured() {
    let sent = |file: &[u8]| measure_sent(file).map(|length| length.most_ms);
    for file in all() {
        let is_mp4 = file.get(4..8) == Some(b"ftyp");
        assert_eq!(measure_sent(&file), measure(&file).filter(|_| !is_mp4), "what is one thing is measured");
    }
    // Samples that are frames of something else.
    let frames = mp3(40);
    assert_eq!(sent(&wav_of(192_000, u32::try_from(frames.len()).unwrap(), &frames)), None);
    let mut adts = [0; 23];
    adts[..7].copy_from_slice(&[0xff, 0xf1, 0x50, 0x80, 0x02, 0xff, 0xfc]);
    let mut ac3 = [0; 128];
    ac3[..5].copy_from_slice(&[0x0b, 0x77, 0, 0, 0]);
    let packets: Vec<u8> = (0..188 * 12).map(|i| if i % 188 == 0 { 0x47 } else { 1 }).collect();
    let marks = [0x72, 0xf8, 0x1f, 0x4e, 0, 0, 0, 0].repeat(4);
    for hidden in [adts.repeat(6), ac3.repeat(6), packets, marks] {
        let data = [vec![9; 1000], hidden.clone()].concat();
        assert_eq!(sent(&wav_of(48_000, u32::try_from(data.len()).unwrap(), &data)), None);
        assert_eq!(sent(&[hidden, mp3(200)].concat()), None);
    }
    // One frame is chance, and the samples of a voice are not all alike.
    let lone = [vec![9; 1000], mp3(1), vec![7; 1000]].concat();
    assert!(sent(&wav_of(48_000, u32::try_from(lone.len()).unwrap(), &lone)).is_some());
    // Tags that are none, or that stand before what has none.
    for tag in [[0xff, 0, 0, 0, 0, 0, 10], [4, 0, 0, 0x80, 0, 0, 10]] {
        assert_eq!(sent(&[b"ID3", &tag[..], &[0; 10], &mp3(9)].concat()), None);
    }
    assert_eq!(sent(&[b"ID3\x04\0\0\0\0\0\x0aAAAAAAAAAA", &wav(8000, 400)[..]].concat()), None);
    assert_eq!(sent(&mp4(100, 102_400)), None);
}

#[test]
fn the_check_sum_of_a_head_is_that_of_the_format() {
    // The check value of this polynomial, as catalogues of them have it.
    assert_eq!(flac::crc_8(b"123456789"), 0xf4);
}

#[test]
fn flac_is_at_one_rate() {
    let file =
        |blocks: &[&[u8]], frames: &[Vec<u8>]| [b"fLaC", &blocks.concat()[..], &frames.concat()].concat();
    let info = flac_info(8000, 0);
    let (first, last) = ([&[0][..], &info].concat(), [&[0x80][..], &info].concat());
    let of_rate = |count, rate| flac_frames(count, 8000, rate);
    assert_eq!(length(&file(&[&last], &[of_rate(2, None), of_rate(1, Some(8000))])).0, 3000);
    // What else stands before the sound is passed over.
    assert_eq!(length(&file(&[&first, &[0x84, 0, 0, 2, 1, 2]], &[of_rate(2, None)])).0, 2000);
    // Nobody knows which of two heads another reader takes.
    assert_eq!(measure(&file(&[&first, &last], &[of_rate(2, None)])), None);
    let short = [&[0][..], &flac_info(48_000, 0)].concat();
    assert_eq!(measure(&file(&[&short, &last], &[of_rate(2, None)])), None);
    // Nor which rate, if the first frame has another than the head. Where one is by chance, the slower counts.
    assert_eq!(measure(&file(&[&last], &[of_rate(1, Some(48_000)), of_rate(3, None)])), None);
    assert_eq!(length(&file(&[&last], &[of_rate(1, None), of_rate(9, Some(48_000))])).0, 10_000);
    assert_eq!(length(&file(&[&last], &[of_rate(1, None), of_rate(1, Some(1000))])).0, 9000);
    assert_eq!(measure(&file(&[&last], &[of_rate(1, None), of_rate(17, Some(48_000))])), None);
    // Without a frame where the sound begins.
    assert_eq!(measure(&file(&[&last, &[0, 0]], &[of_rate(2, None)])), None);
}

#[test]
fn what_is_not_heard_of_opus_is_at_its_ends() {
    // 312 samples are skipped, and the last packet may be cut off: up to 120 milliseconds.
    let hour = 180_000;
    assert_eq!(length(&opus(hour, 3600 * 48_000)), (3_600_000, 3_599_994));
    assert_eq!(length(&opus(hour, 3600 * 48_000 - 120 * 48)), (3_600_000, 3_599_874));
    // Less than that is not what players hear, who go by the packets.
    assert_eq!(length(&opus(hour, 3600 * 48_000 - 130 * 48)), (3_600_000, 3_600_000));
    assert_eq!(length(&opus(500, 10 * 48_000 - 200 * 48)), (10_000, 10_000));
}

#[test]
fn an_element_of_webm_ends_within_the_one_that_it_is_in() {
    let opus =
        |clusters: &[Vec<u8>]| measure(&webm_of(b"A_OPUS", &clusters.concat())).map(|length| length.ms);
    let (block, group) = (webm_block(), element(&[0xa0], &element(&[0xa1], &[0x81, 0, 0, 0, 0xf8, 1, 2])));
    let cluster = element(&CLUSTER, &[block.clone(), group.clone()].concat());
    assert_eq!(opus(&[cluster.clone(), cluster.clone()]), Some(80));
    assert_eq!(opus(&[cluster.clone(), endless(&CLUSTER, &block), endless(&CLUSTER, &group)]), Some(80));
    // A block that goes on behind the end of its cluster, or of its group, may have others in it.
    let hiding = element(&[0xa3], &[&[0x81, 0, 0, 0x80, 0xf8, 1, 2][..], &block.repeat(50)].concat());
    let short = |id: &[u8], size: u8, content: &[u8]| [id, &[0x80 | size], content].concat();
    assert_eq!(opus(&[element(&CLUSTER, &hiding)]), Some(20));
    assert_eq!(opus(&[short(&CLUSTER, 12, &hiding)]), None);
    let hiding = element(&[0xa1], &[&[0x81, 0, 0, 0, 0xf8, 1, 2][..], &block.repeat(50)].concat());
    assert_eq!(opus(&[endless(&CLUSTER, &short(&[0xa0], 12, &hiding))]), None);
    assert_eq!(opus(&[endless(&CLUSTER, &short(&[0xa0], 0, &group))]), Some(20));
    // Nor may others be without an end.
    assert_eq!(
        opus(&[endless(&CLUSTER, &endless(&[0xa0], &element(&[0xa1], &[0x81, 0, 0, 0, 0xf8])))]),
        None
    );
    assert_eq!(opus(&[endless(&CLUSTER, &[&[0xa3, 0xff][..], &[0x81; 127]].concat())]), None);
    assert_eq!(opus(&[element(&CLUSTER, &endless(&CLUSTER, &block)), cluster]), Some(60));
    let deep = (0..9).fold(block, |content, _| element(&[0xa0], &content));
    assert_eq!(opus(&[endless(&CLUSTER, &deep)]), None);
}

#[test]
fn of_two_heads_the_one_that_makes_it_long_counts_or_none() {
    let data = vec![7; 16_000];
    // 1,024 bits a sample, of which eight are said to be in use.
    let format = |bits: u16, valid: u16| {
        let mut format = vec![0xfe, 0xff, 1, 0];
        format.extend_from_slice(&8000_u32.to_le_bytes());
        format.extend_from_slice(&[0; 4]);
        format.extend_from_slice(&(bits / 8).to_le_bytes());
        format.extend_from_slice(&bits.to_le_bytes());
        format.extend_from_slice(&22_u16.to_le_bytes());
        format.extend_from_slice(&valid.to_le_bytes());
        format.extend_from_slice(&[0, 0, 0, 0, 1, 0]);
        format.extend_from_slice(&[0; 14]);
        format
    };
    let wav = |formats: &[Vec<u8>]| {
        let chunk = |name: &[u8; 4], content: &[u8]| {
            [&name[..], &u32::try_from(content.len()).unwrap().to_le_bytes(), content].concat()
        };
        let formats: Vec<u8> = formats.iter().flat_map(|format| chunk(b"fmt ", format)).collect();
        [b"RIFF\0\0\0\0WAVE", &formats[..], &chunk(b"data", &data)].concat()
    };
    assert_eq!(length(&wav(&[format(64, 8)])).0, 2000);
    assert_eq!(length(&wav(&[format(16, 16)])).0, 1000);
    assert_eq!(measure(&wav(&[format(1024, 8)])), None);
    assert_eq!(measure(&wav(&[format(16, 16), format(16, 16)])), None);
    // A cluster in what is passed over.
    let mut webm = webm(2, b"A_OPUS");
    webm.extend(element(&[0xec], &[0x1f, 0x43, 0xb6, 0x75, 0x81, 0]));
    assert_eq!(measure(&webm), None);
}
