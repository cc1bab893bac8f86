//! Conversation, as it is for sale: `POST /v1/chat/completions`, `/v1/responses` and `/v1/completions` as OpenAI's API
//! has them, `/v1/messages` as Anthropic's does, and `/v1/messages/count_tokens`, which is free.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Value, json};

use crate::app::App;
use crate::formats::conversation::ClientFormat;
use crate::formats::goods::Goods;
use crate::formats::messages::CountTokens;
use crate::http::extract::{Caller, RawBody};
use crate::http::inference::{BodyType, Endpoint, Incoming, charged_usage_schema, sell, unknown_model};
use crate::http::limits::Limit;
use crate::http::{ApiError, json_bytes, key_limits};
use crate::payments::wire::Example;
use crate::pricing::ModelKind;

pub const CHAT: Endpoint = Endpoint {
    path: "/v1/chat/completions",
    description: "One chat completion",
    goods: Goods::Conversation(ClientFormat::Chat),
    kind: ModelKind::Chat,
    body_type: BodyType::Json,
    answered_as: None,
    has_events: true,
    request_schema: chat_request_schema,
    answer_schema: chat_answer_schema,
    example: chat_example,
};

pub const MESSAGES: Endpoint = Endpoint {
    path: "/v1/messages",
    description: "One message",
    goods: Goods::Conversation(ClientFormat::Messages),
    kind: ModelKind::Chat,
    body_type: BodyType::Json,
    answered_as: None,
    has_events: true,
    request_schema: messages_request_schema,
    answer_schema: messages_answer_schema,
    example: messages_example,
};

pub const RESPONSES: Endpoint = Endpoint {
    path: "/v1/responses",
    description: "One response",
    goods: Goods::Conversation(ClientFormat::Responses),
    kind: ModelKind::Chat,
    body_type: BodyType::Json,
    answered_as: None,
    has_events: true,
    request_schema: responses_request_schema,
    answer_schema: responses_answer_schema,
    example: responses_example,
};

pub const COMPLETIONS: Endpoint = Endpoint {
    path: "/v1/completions",
    description: "How a text goes on",
    goods: Goods::Completions,
    kind: ModelKind::Chat,
    body_type: BodyType::Json,
    answered_as: None,
    has_events: true,
    request_schema: completions_request_schema,
    answer_schema: chat_answer_schema,
    example: completions_example,
};

pub const COUNT_TOKENS_PATH: &str = "/v1/messages/count_tokens";

/// Whether clients of this route know errors as Anthropic's API tells them.
pub fn speaks_messages(route: &str) -> bool {
    route == MESSAGES.path || route == COUNT_TOKENS_PATH
}

pub async fn chat(State(app): State<App>, incoming: Incoming) -> Result<Response, ApiError> {
    sell(&app, &CHAT, incoming).await
}

pub async fn messages(State(app): State<App>, incoming: Incoming) -> Result<Response, ApiError> {
    sell(&app, &MESSAGES, incoming).await
}

pub async fn responses(State(app): State<App>, incoming: Incoming) -> Result<Response, ApiError> {
    sell(&app, &RESPONSES, incoming).await
}

pub async fn completions(State(app): State<App>, incoming: Incoming) -> Result<Response, ApiError> {
    sell(&app, &COMPLETIONS, incoming).await
}

/// `POST /v1/messages/count_tokens`: how long a prompt is, for nothing.
pub async fn count_tokens(
    State(app): State<App>,
    Caller(principal): Caller,
    limit: Limit,
    RawBody(body): RawBody,
) -> Result<Response, ApiError> {
    limit.admit(&app, &principal)?;
    let request = CountTokens::parse(&body)?;
    let catalog = app.catalog.current();
    let offer = catalog.get(&request.model).ok_or_else(|| unknown_model(&request.model))?;
    key_limits::check_model(&principal, &offer.id)?;
    let counted = app.metering.count_tokens(principal.wallet, &request, offer).await?;
    Ok(json_bytes(StatusCode::OK, counted))
}

fn chat_request_schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "model": {"type": "string"},
            "messages": {"type": "array", "items": {"type": "object"}, "minItems": 1},
            "max_tokens": {"type": "integer", "minimum": 1},
            "stream": {"type": "boolean"},
        },
        "required": ["model", "messages"],
    })
}

fn chat_answer_schema() -> Value {
    json!({
        "type": "object",
        "required": ["model", "usage"],
        "properties": {
            "model": {"type": "string"},
            "choices": {"type": "array", "items": {"type": "object"}},
            "usage": charged_usage_schema(),
        },
    })
}

fn chat_example(model: &str) -> Example {
    let message = |role: &str, content: &str| json!({"role": role, "content": content});
    Example {
        body: json!({"model": model, "messages": [message("user", "Hello")], "max_tokens": 200}),
        body_type: BodyType::Json.in_bazaar(),
        schema: chat_request_schema(),
        answer: json!({
            "object": "chat.completion",
            "model": model,
            "choices": [{"index": 0, "message": message("assistant", "Hello."), "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 8, "completion_tokens": 2, "total_tokens": 10, "charged_usdc": 3},
        }),
    }
}

fn messages_request_schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "model": {"type": "string"},
            "messages": {"type": "array", "items": {"type": "object"}, "minItems": 1},
            "max_tokens": {"type": "integer", "minimum": 1},
            "system": {"type": ["string", "array"]},
            "stream": {"type": "boolean"},
        },
        "required": ["model", "messages", "max_tokens"],
    })
}

fn messages_answer_schema() -> Value {
    json!({
        "type": "object",
        "required": ["type", "model", "content", "usage"],
        "properties": {
            "type": {"const": "message"},
            "model": {"type": "string"},
            "content": {"type": "array", "items": {"type": "object"}},
            "usage": charged_usage_schema(),
        },
    })
}

fn messages_example(model: &str) -> Example {
    Example {
        body: json!({"model": model, "max_tokens": 200, "messages": [{"role": "user", "content": "Hello"}]}),
        body_type: BodyType::Json.in_bazaar(),
        schema: messages_request_schema(),
        answer: json!({
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [{"type": "text", "text": "Hello."}],
            "stop_reason": "end_turn",
            "usage": {"input_tokens": 8, "output_tokens": 2, "charged_usdc": 3},
        }),
    }
}

fn responses_request_schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "model": {"type": "string"},
            "input": {"type": ["string", "array"]},
            "instructions": {"type": "string"},
            "max_output_tokens": {"type": "integer", "minimum": 1},
            "stream": {"type": "boolean"},
        },
        "required": ["model", "input"],
    })
}

fn responses_answer_schema() -> Value {
    json!({
        "type": "object",
        "required": ["object", "model", "output", "usage"],
        "properties": {
            "object": {"const": "response"},
            "model": {"type": "string"},
            "output": {"type": "array", "items": {"type": "object"}},
            "usage": charged_usage_schema(),
        },
    })
}

fn responses_example(model: &str) -> Example {
    let text = json!({"type": "output_text", "text": "Hello.", "annotations": []});
    Example {
        body: json!({"model": model, "input": "Hello", "max_output_tokens": 200}),
        body_type: BodyType::Json.in_bazaar(),
        schema: responses_request_schema(),
        answer: json!({
            "object": "response",
            "model": model,
            "status": "completed",
            "output": [{"type": "message", "role": "assistant", "status": "completed", "content": [text]}],
            "usage": {"input_tokens": 8, "output_tokens": 2, "total_tokens": 10, "charged_usdc": 3},
        }),
    }
}

fn completions_request_schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "model": {"type": "string"},
            "prompt": {"type": ["string", "array"], "description": "A text, texts, tokens, or lists of tokens."},
            "max_tokens": {"type": "integer", "minimum": 1},
            "stream": {"type": "boolean"},
        },
        "required": ["model", "prompt"],
    })
}

fn completions_example(model: &str) -> Example {
    Example {
        body: json!({"model": model, "prompt": "A wallet is", "max_tokens": 200}),
        body_type: BodyType::Json.in_bazaar(),
        schema: completions_request_schema(),
        answer: json!({
            "object": "text_completion",
            "model": model,
            "choices": [{"index": 0, "text": " enough.", "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6, "charged_usdc": 3},
        }),
    }
}
