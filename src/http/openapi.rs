//! What the API is, for programs and for people: `/openapi.json` (OpenAPI 3.1), `/docs`, `/llms.txt`.
//!
//! Paths, methods and who may call are those of the route table; the shapes of answers are those of the
//! types that are sent. What is written down here is what neither of them says.

use std::fmt::Write as _;
use std::sync::LazyLock;

use axum::extract::State;
use axum::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue};
use axum::http::{Method, StatusCode};
use axum::response::Response;
use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value, json};

use crate::app::App;
use crate::http::conversation::{self, CHAT, COMPLETIONS, MESSAGES, RESPONSES};
use crate::http::error::ErrorBody;
use crate::http::inference::{BodyType, Endpoint};
use crate::http::media::{EMBEDDINGS, IMAGE_EDITS, IMAGES, SPEECH, TRANSCRIPTIONS};
use crate::http::{Access, json as json_answer, key_limits, route_table};
use crate::http::{keys, requests, session, status, topup, usage, withdrawals};
use crate::pricing::{ModelKind, Unit};
use crate::reserves::{ProofBody, ReservesBody};

/// The page loads nothing and runs nothing.
const PAGE_POLICY: &str =
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'";
const JSON: &str = "application/json";
const EVENTS: &str = "text/event-stream";

pub async fn document(State(app): State<App>) -> Response {
    let mut document = DOCUMENT.clone();
    document["servers"] = json!([{"url": base_url(&app)}]);
    let catalog = app.catalog.current();
    for endpoint in [CHAT, RESPONSES, MESSAGES, COMPLETIONS, EMBEDDINGS, IMAGES, SPEECH] {
        if let Some(offer) = catalog.iter().find(|offer| offer.kind == endpoint.kind) {
            let body = &mut document["paths"][endpoint.path]["post"]["requestBody"]["content"][JSON];
            body["example"] = (endpoint.example)(&offer.id).body;
        }
    }
    json_answer(StatusCode::OK, &document)
}

/// The document as a page to read.
pub async fn page(State(app): State<App>) -> Response {
    let mut response = text_answer("text/html; charset=utf-8", html(&DOCUMENT, &base_url(&app)));
    response.headers_mut().insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(PAGE_POLICY));
    response
}

/// What a language model needs to know to use this gateway (llmstxt.org).
pub async fn llms(State(app): State<App>) -> Response {
    text_answer("text/plain; charset=utf-8", llms_text(&app))
}

fn text_answer(content_type: &'static str, text: String) -> Response {
    let mut response = Response::new(text.into());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

fn base_url(app: &App) -> String {
    app.config.public_url.as_str().trim_end_matches('/').to_owned()
}

/// One path and method, as far as the route table does not say it.
struct Operation {
    summary: &'static str,
    /// Which part of a list is asked for.
    is_list: bool,
    /// The schema of the body, and whether there must be one.
    body: Option<(Value, bool)>,
    body_type: BodyType,
    /// Status, what it means, media type, schema.
    answers: Vec<(u16, &'static str, &'static str, Value)>,
    /// Errors beside those that all of its kind of caller may get.
    errors: &'static [u16],
}

impl Operation {
    fn new(summary: &'static str) -> Self {
        Self {
            summary,
            is_list: false,
            body: None,
            body_type: BodyType::Json,
            answers: Vec::new(),
            errors: &[],
        }
    }

    fn list(self) -> Self {
        Self { is_list: true, ..self }
    }

    fn body(self, schema: Value) -> Self {
        Self { body: Some((schema, true)), ..self }
    }

    fn body_if_any(self, schema: Value) -> Self {
        Self { body: Some((schema, false)), ..self }
    }

    fn answers<T: JsonSchema>(
        self,
        schemas: &mut SchemaGenerator,
        status: u16,
        meaning: &'static str,
    ) -> Self {
        let schema = schemas.subschema_for::<T>().to_value();
        self.answers_as(status, meaning, JSON, schema)
    }

    fn answers_as(mut self, status: u16, meaning: &'static str, media: &'static str, schema: Value) -> Self {
        self.answers.push((status, meaning, media, schema));
        self
    }

    fn errors(self, errors: &'static [u16]) -> Self {
        Self { errors, ..self }
    }
}

/// What is at a path, in the route table's order.
fn operation(method: &Method, path: &str, schemas: &mut SchemaGenerator) -> Option<Operation> {
    let new = Operation::new;
    let text = || json!({"type": "string"});
    Some(match (method.as_str(), path) {
        ("GET", "/health") => {
            new("Whether the process is up").answers::<status::Health>(schemas, 200, "It is")
        }
        ("GET", "/ready") => new("Whether requests can be served")
            .answers::<status::Ready>(schemas, 200, "They can")
            .answers::<status::Ready>(schemas, 503, "They cannot"),
        ("GET", "/openapi.json") => {
            new("This document").answers_as(200, "OpenAPI 3.1", JSON, json!({"type": "object"}))
        }
        ("GET", "/docs") => new("This document, to read").answers_as(200, "A page", "text/html", text()),
        ("GET", "/llms.txt") => new("How to use the gateway, for language models").answers_as(
            200,
            "Markdown",
            "text/plain",
            text(),
        ),
        ("GET", "/v1/status") => {
            new("Network, token, treasury, markup and bounds: what to know before paying")
                .answers::<status::Status>(schemas, 200, "The gateway's terms")
        }
        ("GET", "/v1/models") => {
            new("What is for sale, with prices").answers::<status::ModelList>(schemas, 200, "The models")
        }
        ("POST", "/v1/topup") => {
            new("Top up the paying wallet's balance: answered with x402 terms, then paid")
                .body_if_any(topup_request())
                .answers::<topup::Credited>(schemas, 200, "Credited")
                .answers::<topup::Pending>(schemas, 202, "Not mined yet: send the same payment again later")
        }
        ("GET", "/v1/topups/{wallet}") => {
            new("A wallet's top-ups").list().answers::<topup::TopupList>(schemas, 200, "Newest first")
        }
        ("POST", "/v1/withdrawals") => new("Send unspent balance back to the wallet that it is of")
            .body(withdrawal_request())
            .answers::<withdrawals::WithdrawalBody>(schemas, 202, "On its way: the amount is locked")
            .answers::<withdrawals::WithdrawalBody>(schemas, 200, "Asked for before, and at its end")
            .errors(&[403, 409, 501]),
        ("GET", "/v1/withdrawals") => new("The wallet's withdrawals, and what it could withdraw now")
            .list()
            .answers::<withdrawals::WithdrawalList>(schemas, 200, "Newest first"),
        ("GET", "/v1/withdrawals/{id}") => new("One withdrawal: its receipt")
            .answers::<withdrawals::WithdrawalBody>(schemas, 200, "The withdrawal")
            .errors(&[404]),
        ("GET", "/v1/auth/nonce") => {
            new("A nonce for a sign-in").answers::<session::NonceBody>(schemas, 200, "Good for five minutes")
        }
        ("POST", "/v1/auth/session") => new("Begin a session, by a signed message (EIP-4361)")
            .body(signed_request(Map::new()))
            .answers::<session::SessionBody>(schemas, 201, "A token"),
        ("POST", "/v1/auth/session/revoke") => {
            new("End the session whose token comes with it; by a signed message, all of the wallet's")
                .body_if_any(signed_if_any(Map::new()))
                .answers::<session::Revoked>(schemas, 200, "Ended")
        }
        ("POST", "/v1/auth/keys") => new("Make an API key")
            .body_if_any(signed_if_any(with_label(key_limits::schema())))
            .answers::<keys::NewKey>(schemas, 201, "The key, shown this once")
            .errors(&[409]),
        ("GET", "/v1/auth/keys") => {
            new("The wallet's API keys").list().answers::<keys::KeyList>(schemas, 200, "Newest first")
        }
        ("PATCH", "/v1/auth/keys/{key_id}") => new("Change a key's limits; null takes one away")
            .body_if_any(signed_if_any(key_limits::schema()))
            .answers::<keys::KeyBody>(schemas, 200, "The key as it is now")
            .errors(&[404, 409]),
        ("DELETE", "/v1/auth/keys/{key_id}") => new("Revoke a key")
            .body_if_any(signed_if_any(Map::new()))
            .answers::<session::Revoked>(schemas, 200, "Revoked")
            .errors(&[404]),
        ("POST", "/v1/auth/keys/{key_id}/rotate") => new("Give a key a new secret")
            .body_if_any(signed_if_any(Map::new()))
            .answers::<keys::NewKey>(schemas, 200, "The key with its new secret, shown this once")
            .errors(&[404, 409]),
        ("POST", "/v1/chat/completions") => sold("A chat completion, as OpenAI's API has it", &CHAT),
        ("POST", "/v1/responses") => sold("A response, as OpenAI's API has it", &RESPONSES),
        ("POST", "/v1/messages") => sold("A message, as Anthropic's API has it", &MESSAGES),
        ("POST", "/v1/completions") => sold("How a text goes on, as OpenAI's old API has it", &COMPLETIONS),
        ("POST", "/v1/embeddings") => sold("Embeddings, as OpenAI's API has them", &EMBEDDINGS),
        ("POST", "/v1/images/generations") => sold("Pictures, as OpenAI's API has them", &IMAGES),
        ("POST", "/v1/images/edits") => sold("Pictures changed, as OpenAI's API has it", &IMAGE_EDITS),
        ("POST", "/v1/audio/speech") => sold("A text spoken, as OpenAI's API has it", &SPEECH),
        ("POST", "/v1/audio/transcriptions") => {
            sold("A recording written down, as OpenAI's API has it", &TRANSCRIPTIONS)
        }
        ("POST", conversation::COUNT_TOKENS_PATH) => {
            new("How many tokens a message's prompt has, as Anthropic's API has it; free")
                .body((MESSAGES.request_schema)())
                .answers_as(200, "The count, or about as many", JSON, token_count())
                .errors(&[404, 413])
        }
        ("GET", "/v1/usage/{wallet}") => new("A wallet's balance, and what its keys have used")
            .answers::<usage::WalletUsage>(schemas, 200, "Balance and usage"),
        ("GET", "/v1/requests") => {
            new("The wallet's receipts").list().answers::<requests::ReceiptList>(schemas, 200, "Newest first")
        }
        ("GET", "/v1/requests/{id}") => new("One receipt")
            .answers::<requests::ReceiptBody>(schemas, 200, "The receipt")
            .errors(&[404, 410]),
        ("GET", "/v1/reserves") => {
            new("What all wallets are owed and what the treasury holds, as published last")
                .answers::<ReservesBody>(schemas, 200, "Signed")
                .errors(&[404, 503])
        }
        ("GET", "/v1/reserves/proof") => new("That the wallet's balance is among what was published")
            .answers::<ProofBody>(schemas, 200, "Its leaf, and the branch from there to the root")
            .errors(&[404]),
        _ => return None,
    })
}

fn sold(summary: &'static str, endpoint: &Endpoint) -> Operation {
    let schema = (endpoint.answer_schema)();
    let operation = Operation::new(summary).body((endpoint.request_schema)());
    let operation = Operation { body_type: endpoint.body_type, ..operation };
    let text = || json!({"type": "string"});
    let operation = match endpoint.answered_as {
        Some(media) if schema["format"] == "binary" => operation.answers_as(200, "The answer", media, schema),
        Some(media) => operation.answers_as(200, "The answer", JSON, schema).answers_as(
            200,
            "Or its text alone, where that is asked for",
            media,
            text(),
        ),
        None => operation.answers_as(200, "The answer", JSON, schema),
    };
    if endpoint.has_events {
        operation.answers_as(200, "With `stream`: its events", EVENTS, text())
    } else {
        operation
    }
}

fn token_count() -> Value {
    json!({
        "type": "object",
        "required": ["input_tokens"],
        "properties": {"input_tokens": {"type": "integer", "minimum": 0}},
    })
}

fn topup_request() -> Value {
    json!({
        "type": "object",
        "properties": {"amount": {
            "description": "USD, at most six decimals. Without it, beside a payment, what that authorises.",
            "oneOf": [{"type": "number"}, {"type": "string", "pattern": r"^\d+(\.\d{1,6})?$"}],
        }},
    })
}

fn withdrawal_request() -> Value {
    let mut members = Map::new();
    let amount = json!({
        "description": "USD, at most six decimals.",
        "oneOf": [{"type": "number"}, {"type": "string", "pattern": r"^\d+(\.\d{1,6})?$"}],
    });
    members.insert("amount".into(), amount);
    let mut schema = signed_request(members);
    schema["required"] = json!(["amount", "message", "signature"]);
    schema
}

fn with_label(mut members: Map<String, Value>) -> Map<String, Value> {
    members.insert("label".into(), json!({"type": ["string", "null"], "maxLength": 100}));
    members
}

/// A signed message beside other members.
fn signed_if_any(mut members: Map<String, Value>) -> Value {
    let message = json!({"type": "string", "description": "An EIP-4361 message."});
    let signature = json!({"type": "string", "description": "Its signature, 0x and hex."});
    members.insert("message".into(), message);
    members.insert("signature".into(), signature);
    json!({"type": "object", "properties": members})
}

fn signed_request(members: Map<String, Value>) -> Value {
    let mut schema = signed_if_any(members);
    schema["required"] = json!(["message", "signature"]);
    schema
}

/// All but the servers, which configuration names.
static DOCUMENT: LazyLock<Value> = LazyLock::new(|| {
    let settings = SchemaSettings::draft2020_12().with(|s| s.definitions_path = "/components/schemas".into());
    let mut schemas = settings.into_generator();
    let error = schemas.subschema_for::<ErrorBody>().to_value();
    let mut paths = Map::new();
    for (method, path, access) in route_table() {
        // A route that is not described is one that a test refuses.
        let Some(operation) = operation(&method, path, &mut schemas) else { continue };
        let entry = paths.entry(path).or_insert_with(|| json!({}));
        entry[method.as_str().to_ascii_lowercase()] = render(&method, path, access, operation, &error);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Farebox",
            "version": env!("CARGO_PKG_VERSION"),
            "summary": "An AI gateway where the wallet is the account",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "paths": paths,
        "components": {"securitySchemes": security_schemes(), "schemas": schemas.take_definitions(true)},
    })
});

fn render(method: &Method, path: &str, access: Access, operation: Operation, error: &Value) -> Value {
    let mut parameters = Vec::new();
    for name in path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}')) {
        parameters.push(json!({
            "name": name, "in": "path", "required": true, "schema": {"type": "string", "minLength": 1},
        }));
    }
    let mut query = |name: &str, schema: Value, description: &str| {
        parameters.push(json!({"name": name, "in": "query", "schema": schema, "description": description}));
    };
    if operation.is_list {
        query(
            "limit",
            json!({"type": "integer", "minimum": 1, "maximum": 100}),
            "Rows of a page, 20 by default.",
        );
        query("cursor", json!({"type": "string"}), "The `next_cursor` of the page before.");
    }
    if matches!(access, Access::Caller | Access::Owner) && matches!(*method, Method::GET | Method::DELETE) {
        query("message", json!({"type": "string"}), "An EIP-4361 message, in place of another credential.");
        query("signature", json!({"type": "string"}), "Its signature.");
    }
    if access == Access::X402 {
        query("x402", json!({"type": "string"}), "`1` asks for terms of version 1 in the body.");
    }
    if access == Access::Priced {
        let description = "The request's name: sent again under it, it is not run again. Beside a payment, that is the name.";
        parameters.push(json!({
            "name": "Idempotency-Key", "in": "header", "schema": {"type": "string", "maxLength": 255},
            "description": description,
        }));
    }
    let mut answers = Map::new();
    for (status, meaning, media, schema) in operation.answers {
        let answer = answers.entry(status.to_string());
        let answer = answer.or_insert_with(|| json!({"description": "", "content": {}}));
        let so_far = answer["description"].as_str().filter(|so_far| !so_far.is_empty());
        answer["description"] =
            so_far.map_or(meaning.to_owned(), |so_far| format!("{so_far}. {meaning}")).into();
        answer["content"][media] = json!({"schema": schema});
    }
    for status in errors_of(access).iter().chain(operation.errors) {
        let schema = match (*status, access) {
            (402, _) => json!({"anyOf": [error, payment_required()]}),
            _ => error.clone(),
        };
        let mut answer = json!({"description": meaning(*status), "content": {JSON: {"schema": schema}}});
        answer["headers"] = headers_of(*status);
        answers.entry(status.to_string()).or_insert(answer);
    }
    let mut rendered = json!({
        "operationId": operation_id(method, path),
        "summary": operation.summary,
        "responses": answers,
        "security": security_of(access),
    });
    if !parameters.is_empty() {
        rendered["parameters"] = parameters.into();
    }
    if let Some((schema, required)) = operation.body {
        let media = operation.body_type.media_type();
        rendered["requestBody"] = json!({"required": required, "content": {media: {"schema": schema}}});
    }
    rendered
}

fn operation_id(method: &Method, path: &str) -> String {
    let words = path.split(['/', '.', '_']).filter(|word| !word.is_empty() && *word != "v1");
    let words = words.map(|word| word.trim_matches(['{', '}']));
    words.fold(method.as_str().to_ascii_lowercase(), |id, word| id + "_" + word)
}

/// What any caller of this kind may be told.
fn errors_of(access: Access) -> &'static [u16] {
    match access {
        Access::Public => &[],
        Access::X402 => &[400, 402, 409, 413, 429, 503],
        Access::Priced => &[400, 401, 402, 403, 404, 409, 413, 422, 429, 502, 503, 504],
        Access::Caller => &[400, 401, 403, 429, 503],
        Access::Owner | Access::Siwe | Access::Session => &[400, 401, 413, 429, 503],
    }
}

fn meaning(status: u16) -> &'static str {
    match status {
        400 => "The request cannot be understood",
        401 => "No credential, or a wrong one",
        402 => "Payment is required: x402's terms, or what the balance lacks",
        403 => "The caller may not do this",
        404 => "There is no such thing",
        409 => "It contradicts what is there, or is under way",
        410 => "It is in the operator's archive",
        413 => "The body is too large",
        422 => "The upstream does not take the request",
        429 => "Too many: Retry-After says when again",
        502 => "The upstream failed; nothing was charged",
        503 => "Not possible at the moment; Retry-After says when again",
        504 => "The upstream did not answer in time; nothing was charged",
        _ => "An error",
    }
}

/// What programs read of an answer besides its body.
fn headers_of(status: u16) -> Value {
    let header = |description: &str| json!({"schema": {"type": "string"}, "description": description});
    match status {
        402 => {
            json!({"PAYMENT-REQUIRED": header("x402's terms, version 2: base64 of JSON. Where paying would help.")})
        }
        429 | 503 => json!({"Retry-After": header("Seconds.")}),
        _ => json!({}),
    }
}

/// x402's terms in a body; the header `PAYMENT-REQUIRED` has those of version 2.
fn payment_required() -> Value {
    json!({
        "type": "object",
        "required": ["x402Version", "error"],
        "properties": {
            "x402Version": {"type": "integer"},
            "error": {"type": "string"},
            "accepts": {"type": "array", "items": {"type": "object"}},
        },
    })
}

fn security_schemes() -> Value {
    json!({
        "bearer": {"type": "http", "scheme": "bearer", "description": "An API key `sk-…`, or a session's token."},
        "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        "signInWithX": {
            "type": "apiKey", "in": "header", "name": "SIGN-IN-WITH-X",
            "description": "The answer to the challenge of a 402 (x402's sign-in-with-x).",
        },
        "payment": {
            "type": "apiKey", "in": "header", "name": "PAYMENT-SIGNATURE",
            "description": "An x402 payment, version 2 or 1; `X-PAYMENT` means the same.",
        },
    })
}

/// Any one of these; `{}` is none.
fn security_of(access: Access) -> Value {
    let (bearer, key, sign_in) = (json!({"bearer": []}), json!({"apiKey": []}), json!({"signInWithX": []}));
    let (payment, none) = (json!({"payment": []}), json!({}));
    match access {
        Access::Public => json!([]),
        Access::X402 => json!([payment, none]),
        Access::Priced => json!([bearer, key, sign_in, payment, none]),
        Access::Caller => json!([bearer, key, sign_in, none]),
        Access::Owner => json!([bearer, sign_in, none]),
        // The message is in the body.
        Access::Siwe => json!([none]),
        Access::Session => json!([bearer, none]),
    }
}

fn html(document: &Value, base_url: &str) -> String {
    let mut page = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\"><title>Farebox API</title><style>\
         body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}}\
         code,pre{{font:14px/1.4 ui-monospace,monospace}}pre{{background:#f4f4f4;padding:.7rem;overflow:auto}}\
         section{{border-top:1px solid #ccc;margin-top:1.5rem}}summary{{cursor:pointer}}\
         td{{padding:.1rem 1rem .1rem 0;vertical-align:top}}h2 code{{font-size:1.15rem;font-weight:700}}</style>\
         <h1>Farebox API</h1><p>At <code>{}</code>. The same for programs: <a href=\"openapi.json\">openapi.json</a>; \
         for language models: <a href=\"llms.txt\">llms.txt</a>.</p>",
        escaped(base_url)
    );
    for (path, methods) in members(&document["paths"]) {
        for (method, operation) in members(methods) {
            let _ = write!(
                page,
                "<section><h2><code>{} {}</code></h2><p>{}</p>",
                method.to_ascii_uppercase(),
                escaped(path),
                escaped(operation["summary"].as_str().unwrap_or_default())
            );
            page += &html_parameters(&operation["parameters"]);
            for (media, body) in members(&operation["requestBody"]["content"]) {
                page += &html_schema(&format!("Body, {media}"), &body["schema"]);
            }
            for (status, answer) in members(&operation["responses"]) {
                let meaning = answer["description"].as_str().unwrap_or_default();
                let title = format!("{status}: {meaning}");
                page += &html_schema(&title, &answer["content"]);
            }
            page += "</section>";
        }
    }
    page += "<section><h2>Shapes</h2>";
    for (name, schema) in members(&document["components"]["schemas"]) {
        page += &html_schema(name, schema);
    }
    page + "</section></html>"
}

fn html_parameters(parameters: &Value) -> String {
    let rows = parameters.as_array().into_iter().flatten().map(|parameter| {
        let text = |name: &str| escaped(parameter[name].as_str().unwrap_or_default());
        format!("<tr><td><code>{}</code><td>{}<td>{}", text("name"), text("in"), text("description"))
    });
    let rows: String = rows.collect();
    if rows.is_empty() { rows } else { format!("<table>{rows}</table>") }
}

fn html_schema(title: &str, schema: &Value) -> String {
    let json = serde_json::to_string_pretty(schema).unwrap_or_default();
    format!("<details><summary>{}</summary><pre>{}</pre></details>", escaped(title), escaped(&json))
}

fn members(object: &Value) -> impl Iterator<Item = (&String, &Value)> {
    object.as_object().into_iter().flatten()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Basis points as a percentage: `20`, `12.5`.
fn percent(bps: u32) -> String {
    let text = format!("{}.{:02}", bps / 100, bps % 100);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn llms_text(app: &App) -> String {
    let base = base_url(app);
    let payments = &app.config.payments;
    let mut text = format!(
        "# Farebox\n\n\
         > An AI gateway where the wallet is the account: the OpenAI API, paid per request in {asset} on {network}. \
         Every request costs what it used at the provider's prices, plus {percent} %; a balance cannot go below zero.\n\n\
         Base URL: {base}/v1\n\n\
         ## Ways to pay\n\n\
         - With nothing but a wallet: POST {base}/v1/chat/completions. The answer is 402 with x402 terms \
         (`PAYMENT-REQUIRED` for version 2, the body for version 1). Sign a USDC authorization and send the same \
         request again with `PAYMENT-SIGNATURE` or `X-PAYMENT`. What the request did not cost stays the wallet's balance.\n\
         - With that balance: answer the challenge `extensions[\"sign-in-with-x\"]` of the 402 in a `SIGN-IN-WITH-X` \
         header, or make an API key with an EIP-4361 message: POST {base}/v1/auth/keys.\n\
         - Top up from {min} to {max} USD: POST {base}/v1/topup with {{\"amount\": 5}}, then pay its 402 the same way.\n\n\
         ## Rules\n\n\
         - A payment that is pending (402 `settlement_pending`, or 202) goes on by itself: send the same payment \
         again, never sign another.\n\
         - `Idempotency-Key` makes a request safe to send again: it is run and charged once. Of a request that is paid \
         for, the payment is the name: send the same one again.\n\
         - 429 and 503 say in `Retry-After` when to come back. Nothing is charged for a request that is refused.\n\
         - Amounts named `…_usdc` are millionths of a USDC.\n\n\
         ## Machine-readable\n\n\
         - [{base}/openapi.json]({base}/openapi.json): every endpoint\n\
         - [{base}/v1/models]({base}/v1/models): models and prices\n\
         - [{base}/v1/status]({base}/v1/status): network, token, treasury, bounds\n\n\
         ## Endpoints\n\n",
        asset = payments.token.name,
        network = payments.network(),
        percent = percent(app.config.markup.get()),
        min = payments.min_topup.to_usd(),
        max = payments.max_topup.to_usd(),
    );
    for (path, methods) in members(&DOCUMENT["paths"]) {
        for (method, operation) in members(methods) {
            let summary = operation["summary"].as_str().unwrap_or_default();
            let _ = writeln!(text, "- {} {path}: {summary}", method.to_ascii_uppercase());
        }
    }
    text += "\n## Models\n\n";
    for offer in app.catalog.current().iter() {
        if offer.kind != ModelKind::Chat {
            // Of pictures by size the dearest is shown.
            let rates = offer.prices.at(0);
            let rates = rates.iter().map(|(unit, price)| {
                let usd = price.to_billed_usd_per(unit.per(), app.config.markup);
                format!("${usd} for {} {}", unit.per(), unit.counted_key())
            });
            let rates: Vec<_> = rates.collect();
            let _ = writeln!(text, "- {}: {}; {}", offer.id, offer.kind.as_str(), rates.join(", "));
            continue;
        }
        let (prompt, completion) = (
            offer.prices.charged(Unit::Prompt).to_billed_usd_per_million(app.config.markup),
            offer.prices.charged(Unit::Completion).to_billed_usd_per_million(app.config.markup),
        );
        let _ =
            writeln!(text, "- {}: ${prompt} per million prompt tokens, ${completion} completion", offer.id);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_is_described_once() {
        let mut described: Vec<String> = Vec::new();
        for (path, methods) in members(&DOCUMENT["paths"]) {
            for (method, operation) in members(methods) {
                assert!(!operation["responses"].as_object().unwrap().is_empty(), "{method} {path}");
                described.push(operation["operationId"].as_str().unwrap().to_owned());
            }
        }
        let routes = route_table();
        assert_eq!(described.len(), routes.len());
        described.sort_unstable();
        described.dedup();
        assert_eq!(described.len(), routes.len(), "two operations have one id: {described:?}");
    }

    #[test]
    fn a_markup_is_a_percentage() {
        for (bps, text) in [(2000, "20"), (1250, "12.5"), (1, "0.01"), (0, "0"), (10_000, "100")] {
            assert_eq!(percent(bps), text);
        }
    }

    #[test]
    fn every_reference_leads_somewhere() {
        fn check(value: &Value) {
            match value {
                Value::Object(members) => {
                    if let Some(reference) = members.get("$ref").and_then(Value::as_str) {
                        let pointer = reference.strip_prefix('#').unwrap();
                        assert!(DOCUMENT.pointer(pointer).is_some(), "{reference}");
                    }
                    members.values().for_each(check);
                }
                Value::Array(items) => items.iter().for_each(check),
                _ => {}
            }
        }
        check(&DOCUMENT);
    }
}
