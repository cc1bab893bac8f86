//! Models that do not chat, and what they are asked.

use serde_json::{Value, json};

use super::gateway::{Call, Gateway, Setup};

/// $0.02 a million tokens, and a hundredth of a cent a call: the published model server counts no tokens of texts.
pub const EMBEDDER: &str = "openai/embedder";
/// By the token alone.
pub const EMBEDDER_BY_TOKEN: &str = "openai/embedder-by-token";
/// $0.04, in a better quality $0.08, a picture.
pub const PAINTER: &str = "openai/painter";
/// $5 a million tokens of text, $10 of pictures, $40 of what it paints.
pub const PAINTER_BY_TOKEN: &str = "openai/painter-by-token";
/// $15 a million characters.
pub const VOICE: &str = "openai/voice";
/// $0.60 a million tokens of text, $12 of sound.
pub const VOICE_BY_TOKEN: &str = "openai/voice-by-token";
/// $0.0001 a second.
pub const LISTENER: &str = "openai/listener";
/// $2.50 a million tokens of text, $6 of sound, $10 of what it writes.
pub const LISTENER_BY_TOKEN: &str = "openai/listener-by-token";

/// A gateway that sells them beside the usual ones.
pub fn with_media(setup: Setup) -> Setup {
    let tables = setup.tables.clone() + &tables();
    Setup { tables, ..setup }
}

fn tables() -> String {
    let images = r#"per_image = [{ size = "1024x1024", quality = "standard", usd = "0.04" }, { size = "1024x1024", quality = "hd", usd = "0.08" }]"#;
    let image_tokens = "context_length = 65536\nimage_tokens = [{ size = \"1024x1024\", quality = \"low\", most = 272 }, { most = 6240 }]";
    let models = [
        (EMBEDDER, "embedding", "context_length = 8192", r#"prompt = "0.02", per_call = "0.0001""#),
        (EMBEDDER_BY_TOKEN, "embedding", "context_length = 8192", r#"prompt = "0.02""#),
        (PAINTER, "image", "", images),
        (PAINTER_BY_TOKEN, "image", image_tokens, r#"prompt = "5", image_in = "10", image_out = "40""#),
        (VOICE, "speech", "", r#"per_million_characters = "15""#),
        (VOICE_BY_TOKEN, "speech", "max_output_tokens = 2000", r#"prompt = "0.60", audio_out = "12""#),
        (LISTENER, "transcription", "", r#"per_second = "0.0001""#),
        (
            LISTENER_BY_TOKEN,
            "transcription",
            "context_length = 16000\nmax_output_tokens = 2000",
            r#"prompt = "2.50", audio_in = "6", completion = "10""#,
        ),
    ];
    let model = |(id, kind, more, price): &(&str, &str, &str, &str)| {
        format!(
            "\n[[models]]\nid = \"{id}\"\nkind = \"{kind}\"\nprovider = \"openai\"\n{more}\nprice = {{ {price} }}\n"
        )
    };
    models.iter().map(model).collect()
}

/// So many milliseconds of silence: 16,000 samples of 16 bits a second.
pub fn wav(ms: usize) -> Vec<u8> {
    let bytes = ms * 32;
    let size = |more: usize| u32::try_from(bytes + more).unwrap().to_le_bytes();
    let mut file =
        [b"RIFF", &size(36)[..], b"WAVEfmt \x10\0\0\0\x01\0\x01\0\x80\x3e\0\0\0\x7d\0\0\x02\0\x10\0data"]
            .concat();
    file.extend_from_slice(&size(0));
    file.resize(file.len() + bytes, 0);
    file
}

/// A form of these fields and a file, under this boundary.
pub fn form(boundary: &str, fields: &[(&str, &str)], (name, file): (&str, &[u8])) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, value) in fields {
        let head =
            format!("--{boundary}\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n");
        body.extend_from_slice(head.as_bytes());
    }
    let head = format!(
        "--{boundary}\r\nContent-Disposition: form-data; name=\"{name}\"; filename=\"a.bin\"\r\n\r\n"
    );
    body.extend_from_slice(head.as_bytes());
    body.extend_from_slice(file);
    body.extend_from_slice(format!("\r\n--{boundary}--\r\n").as_bytes());
    body
}

/// A form on its way.
pub fn post_form(gateway: &Gateway, path: &str, boundary: &str, body: Vec<u8>) -> Call {
    gateway.post(path).header("content-type", &format!("multipart/form-data; boundary={boundary}")).body(body)
}

/// A request that each of the routes serves.
pub fn usual_request(gateway: &Gateway, path: &str) -> Option<Call> {
    let json = |body: Value| gateway.post(path).json(&body);
    Some(match path {
        "/v1/completions" => json(json!({"model": super::gateway::MODEL, "prompt": "A wallet is"})),
        "/v1/embeddings" => json(json!({"model": EMBEDDER, "input": "Hello"})),
        "/v1/images/generations" => json(json!({"model": PAINTER, "prompt": "A wallet"})),
        "/v1/audio/speech" => json(json!({"model": VOICE, "input": "Hello", "voice": "alloy"})),
        "/v1/images/edits" => {
            let fields = [("model", PAINTER), ("prompt", "Brighter")];
            post_form(gateway, path, "b1", form("b1", &fields, ("image", b"\x89PNG")))
        }
        "/v1/audio/transcriptions" => {
            post_form(gateway, path, "b1", form("b1", &[("model", LISTENER)], ("file", &wav(1500))))
        }
        _ => return None,
    })
}
