//! What is for sale beside conversation: `POST /v1/embeddings`, `/v1/images/generations`, `/v1/images/edits`,
//! `/v1/audio/speech`, `/v1/audio/transcriptions`, as OpenAI's API has them.

use axum::extract::State;
use axum::response::Response;
use serde_json::{Value, json};

use crate::app::App;
use crate::formats::goods::Goods;
use crate::formats::media::Medium;
use crate::http::ApiError;
use crate::http::inference::{BodyType, Endpoint, Incoming, charged_usage_schema, sell};
use crate::payments::wire::Example;
use crate::pricing::ModelKind;

/// Sound, of whatever type.
const SOUND: &str = "audio/*";
const TEXT: &str = "text/plain";

pub const EMBEDDINGS: Endpoint = Endpoint {
    path: "/v1/embeddings",
    description: "Embeddings of one text or several",
    goods: Goods::Medium(Medium::Embeddings),
    kind: ModelKind::Embedding,
    body_type: BodyType::Json,
    answered_as: None,
    has_events: false,
    request_schema: embeddings_request,
    answer_schema: embeddings_answer,
    example: embeddings_example,
};

pub const IMAGES: Endpoint = Endpoint {
    path: "/v1/images/generations",
    description: "Pictures of what is described",
    goods: Goods::Medium(Medium::Images),
    kind: ModelKind::Image,
    body_type: BodyType::Json,
    answered_as: None,
    has_events: true,
    request_schema: images_request,
    answer_schema: images_answer,
    example: images_example,
};

pub const IMAGE_EDITS: Endpoint = Endpoint {
    path: "/v1/images/edits",
    description: "Pictures changed as is described",
    goods: Goods::Medium(Medium::ImageEdits),
    kind: ModelKind::Image,
    body_type: BodyType::Form,
    answered_as: None,
    has_events: true,
    request_schema: edits_request,
    answer_schema: images_answer,
    example: edits_example,
};

pub const SPEECH: Endpoint = Endpoint {
    path: "/v1/audio/speech",
    description: "A text, spoken",
    goods: Goods::Medium(Medium::Speech),
    kind: ModelKind::Speech,
    body_type: BodyType::Json,
    answered_as: Some(SOUND),
    has_events: true,
    request_schema: speech_request,
    answer_schema: bytes,
    example: speech_example,
};

pub const TRANSCRIPTIONS: Endpoint = Endpoint {
    path: "/v1/audio/transcriptions",
    description: "A recording, written down",
    goods: Goods::Medium(Medium::Transcriptions),
    kind: ModelKind::Transcription,
    body_type: BodyType::Form,
    answered_as: Some(TEXT),
    has_events: true,
    request_schema: transcription_request,
    answer_schema: transcription_answer,
    example: transcription_example,
};

pub async fn embeddings(State(app): State<App>, incoming: Incoming) -> Result<Response, ApiError> {
    sell(&app, &EMBEDDINGS, incoming).await
}

pub async fn images(State(app): State<App>, incoming: Incoming) -> Result<Response, ApiError> {
    sell(&app, &IMAGES, incoming).await
}

pub async fn image_edits(State(app): State<App>, incoming: Incoming) -> Result<Response, ApiError> {
    sell(&app, &IMAGE_EDITS, incoming).await
}

pub async fn speech(State(app): State<App>, incoming: Incoming) -> Result<Response, ApiError> {
    sell(&app, &SPEECH, incoming).await
}

pub async fn transcriptions(State(app): State<App>, incoming: Incoming) -> Result<Response, ApiError> {
    sell(&app, &TRANSCRIPTIONS, incoming).await
}

fn embeddings_request() -> Value {
    json!({
        "type": "object",
        "properties": {
            "model": {"type": "string"},
            "input": {"type": ["string", "array"], "description": "A text, texts, tokens, or lists of tokens."},
            "dimensions": {"type": "integer", "minimum": 1},
            "encoding_format": {"enum": ["float", "base64"]},
        },
        "required": ["model", "input"],
    })
}

fn embeddings_answer() -> Value {
    json!({
        "type": "object",
        "required": ["data"],
        "properties": {
            "data": {"type": "array", "items": {"type": "object"}},
            "model": {"type": "string"},
            "usage": charged_usage_schema(),
        },
    })
}

fn embeddings_example(model: &str) -> Example {
    let embedding = json!({"object": "embedding", "index": 0, "embedding": [0.0023, -0.0093, 0.0157]});
    Example {
        body: json!({"model": model, "input": "Hello"}),
        body_type: BodyType::Json.in_bazaar(),
        schema: embeddings_request(),
        answer: json!({
            "object": "list",
            "model": model,
            "data": [embedding],
            "usage": {"prompt_tokens": 1, "total_tokens": 1, "charged_usdc": 1},
        }),
    }
}

fn images_members() -> Value {
    json!({
        "model": {"type": "string"},
        "prompt": {"type": "string"},
        "n": {"type": "integer", "minimum": 1, "maximum": 10},
        "size": {"type": "string", "pattern": "^(auto|[0-9]+x[0-9]+)$"},
        "quality": {"type": "string", "pattern": "^[a-z]+$"},
    })
}

fn images_request() -> Value {
    let mut members = images_members();
    members["stream"] = json!({"type": "boolean"});
    json!({"type": "object", "properties": members, "required": ["model", "prompt"]})
}

fn edits_request() -> Value {
    let mut members = images_members();
    members["image"] = bytes();
    members["mask"] = bytes();
    json!({"type": "object", "properties": members, "required": ["model", "prompt", "image"]})
}

fn images_answer() -> Value {
    json!({
        "type": "object",
        "required": ["data"],
        "properties": {
            "data": {"type": "array", "items": {
                "type": "object",
                "properties": {"b64_json": {"type": "string"}, "url": {"type": "string"}},
            }},
            "usage": charged_usage_schema(),
        },
    })
}

fn images_example(model: &str) -> Example {
    Example {
        body: json!({"model": model, "prompt": "A wallet", "size": "1024x1024", "n": 1}),
        body_type: BodyType::Json.in_bazaar(),
        schema: images_request(),
        answer: json!({"created": 1_770_000_000, "data": [{"b64_json": "iVBORw0KGgo="}]}),
    }
}

fn edits_example(model: &str) -> Example {
    Example {
        body: json!({"model": model, "prompt": "Brighter", "size": "1024x1024", "image": "(a file)"}),
        body_type: BodyType::Form.in_bazaar(),
        schema: edits_request(),
        answer: json!({"created": 1_770_000_000, "data": [{"b64_json": "iVBORw0KGgo="}]}),
    }
}

fn speech_request() -> Value {
    json!({
        "type": "object",
        "properties": {
            "model": {"type": "string"},
            "input": {"type": "string"},
            "voice": {"type": ["string", "object"]},
            "response_format": {"type": "string"},
            "speed": {"type": "number", "minimum": 0.25, "maximum": 4},
            "stream_format": {"enum": ["audio", "sse"]},
        },
        "required": ["model", "input", "voice"],
    })
}

fn speech_example(model: &str) -> Example {
    Example {
        body: json!({"model": model, "input": "Hello", "voice": "alloy"}),
        body_type: BodyType::Json.in_bazaar(),
        schema: speech_request(),
        answer: json!({"audio": "(bytes)"}),
    }
}

fn transcription_request() -> Value {
    json!({
        "type": "object",
        "properties": {
            "model": {"type": "string"},
            "file": bytes(),
            "language": {"type": "string"},
            "prompt": {"type": "string"},
            "response_format": {"enum": ["json", "text", "srt", "verbose_json", "vtt", "diarized_json"]},
            "stream": {"type": "boolean"},
        },
        "required": ["model", "file"],
    })
}

fn transcription_answer() -> Value {
    json!({
        "type": "object",
        "required": ["text"],
        "properties": {"text": {"type": "string"}, "usage": charged_usage_schema()},
    })
}

fn transcription_example(model: &str) -> Example {
    Example {
        body: json!({"model": model, "file": "(a file)"}),
        body_type: BodyType::Form.in_bazaar(),
        schema: transcription_request(),
        answer: json!({"text": "Hello.", "usage": {"type": "duration", "seconds": 2, "charged_usdc": 240}}),
    }
}

/// A file.
fn bytes() -> Value {
    json!({"type": "string", "format": "binary"})
}
