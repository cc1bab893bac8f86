//! Errors: how each client's format tells one, and what an upstream's says.

use serde::Deserialize;

use crate::formats::conversation::{ClientFormat, UpstreamFormat};
use crate::formats::json::{ObjectText, quote};
use crate::formats::sse::Event;

/// An error as a client is told it.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct ErrorText<'a> {
    pub status: u16,
    /// For programs.
    pub code: &'a str,
    /// For people.
    pub message: &'a str,
    /// The member of the request that it is about.
    pub param: Option<&'a str>,
    pub request_id: Option<&'a str>,
}

impl ErrorText<'_> {
    /// The body of an answer that is this error.
    pub fn body(&self, format: ClientFormat) -> String {
        match format {
            ClientFormat::Chat | ClientFormat::Responses => {
                ObjectText::new().json("error", &self.detail(self.openai_type())).end()
            }
            ClientFormat::Messages => ObjectText::new()
                .text("type", "error")
                .json("error", &self.detail(self.anthropic_type()))
                .maybe("request_id", self.request_id.map(quote))
                .end(),
        }
    }

    /// The last event of a stream that failed; `sequence` is its number in a stream of responses.
    pub fn event(&self, format: ClientFormat, sequence: u64) -> bytes::Bytes {
        let body = self.body(format);
        match format {
            ClientFormat::Chat => Event::from_data(body.as_bytes()),
            ClientFormat::Messages => Event::named("error", body.as_bytes()),
            // The members that are documented, and beside them the one by which OpenAI's own client
            // knows that a stream has failed.
            ClientFormat::Responses => {
                let event = ObjectText::new()
                    .text("type", "error")
                    .text("code", self.code)
                    .text("message", self.message)
                    .json("param", &self.param.map_or_else(|| "null".to_owned(), quote))
                    .number("sequence_number", sequence)
                    .json("error", &self.detail(self.openai_type()))
                    .end();
                Event::named("error", event.as_bytes())
            }
        }
    }

    fn detail(&self, kind: &str) -> String {
        ObjectText::new()
            .text("message", self.message)
            .text("type", kind)
            .text("code", self.code)
            .json("param", &self.param.map_or_else(|| "null".to_owned(), quote))
            .end()
    }

    fn openai_type(&self) -> &'static str {
        match self.status {
            401 => "authentication_error",
            402 => "billing_error",
            403 => "permission_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// Anthropic API reference, *Errors*.
    fn anthropic_type(&self) -> &'static str {
        match self.status {
            401 => "authentication_error",
            402 => "billing_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            503 | 529 => "overloaded_error",
            504 => "timeout_error",
            500.. => "api_error",
            _ => "invalid_request_error",
        }
    }
}

/// What an upstream's refusal means.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// The request is at fault; the upstream's words for it.
    BadRequest {
        message: Option<String>,
    },
    RateLimited,
    /// Our account there is empty: no limit that a client can wait out.
    Exhausted,
    /// It has too much to do.
    Overloaded,
    /// Anything else, which is between us and the upstream.
    Refused,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Body {
    /// Google's streams are lists until somebody asks for events. Tried first: a list of one could be
    /// taken for the object itself.
    List(Vec<ErrorBody>),
    One(ErrorBody),
}

#[derive(Deserialize)]
struct ErrorBody {
    error: ErrorMember,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct ErrorMember {
    message: Option<String>,
    r#type: Option<String>,
    code: Option<serde_json::Value>,
    status: Option<String>,
    details: Option<Vec<Detail>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Detail {
    reason: Option<String>,
}

/// Reads an answer with a status other than 200.
pub fn read_refusal(format: UpstreamFormat, status: u16, body: &[u8]) -> Refusal {
    let error = match serde_json::from_slice(body) {
        Ok(Body::One(body)) => body.error,
        Ok(Body::List(bodies)) => bodies.into_iter().next().map(|body| body.error).unwrap_or_default(),
        Err(_) => ErrorMember::default(),
    };
    match status {
        402 => Refusal::Exhausted,
        429 if error.is_empty_account(format) => Refusal::Exhausted,
        429 => Refusal::RateLimited,
        503 | 529 => Refusal::Overloaded,
        400 | 413 | 422 if error.is_empty_account(format) => Refusal::Exhausted,
        400 | 413 | 422 if error.is_ours(format) => Refusal::Refused,
        400 | 413 | 422 => Refusal::BadRequest { message: error.message },
        _ => Refusal::Refused,
    }
}

impl ErrorMember {
    fn is_empty_account(&self, format: UpstreamFormat) -> bool {
        let says = |what: &str| self.message.as_deref().is_some_and(|message| message.contains(what));
        match format {
            UpstreamFormat::Chat | UpstreamFormat::Responses => {
                let code = self.code.as_ref().and_then(|code| code.as_str());
                [code, self.r#type.as_deref()].contains(&Some("insufficient_quota"))
            }
            // It comes as a 400 like any wrong request.
            UpstreamFormat::Messages => {
                self.r#type.as_deref() == Some("billing_error") || says("credit balance is too low")
            }
            UpstreamFormat::Gemini => false,
        }
    }

    /// Google's 400 is also for keys that are wrong and places that it does not serve.
    fn is_ours(&self, format: UpstreamFormat) -> bool {
        let details = self.details.as_deref().unwrap_or_default();
        format == UpstreamFormat::Gemini
            && (self.status.as_deref() == Some("FAILED_PRECONDITION")
                || details.iter().any(|detail| detail.reason.as_deref() == Some("API_KEY_INVALID")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_format_tells_an_error_its_own_way() {
        let error = ErrorText {
            status: 400,
            code: "invalid_value",
            message: "no \"n\"",
            param: Some("n"),
            request_id: Some("req_1"),
        };
        let detail =
            r#"{"message":"no \"n\"","type":"invalid_request_error","code":"invalid_value","param":"n"}"#;
        assert_eq!(error.body(ClientFormat::Chat), format!(r#"{{"error":{detail}}}"#));
        assert_eq!(
            error.body(ClientFormat::Messages),
            format!(r#"{{"type":"error","error":{detail},"request_id":"req_1"}}"#)
        );
        let overloaded = ErrorText { status: 503, ..error };
        assert!(overloaded.body(ClientFormat::Messages).contains(r#""type":"overloaded_error""#));
        assert!(overloaded.body(ClientFormat::Responses).contains(r#""type":"server_error""#));
        let event = overloaded.event(ClientFormat::Responses, 7);
        assert!(event.starts_with(b"event: error\ndata: {\"type\":\"error\",\"code\":\"invalid_value\""));
        assert!(event.ends_with(b"}}\n\n"));
    }

    #[test]
    fn whose_fault_a_refusal_is() {
        let bad = |message: &str| Refusal::BadRequest { message: Some(message.to_owned()) };
        for (format, status, body, meant) in [
            (UpstreamFormat::Chat, 400, r#"{"error":{"message":"x","code":"y"}}"#, bad("x")),
            (UpstreamFormat::Chat, 429, r#"{"error":{"code":"insufficient_quota"}}"#, Refusal::Exhausted),
            (UpstreamFormat::Chat, 429, r#"{"error":{"code":7}}"#, Refusal::RateLimited),
            (UpstreamFormat::Chat, 401, r#"{"error":{"message":"key"}}"#, Refusal::Refused),
            (UpstreamFormat::Chat, 400, "<html>", Refusal::BadRequest { message: None }),
            (
                UpstreamFormat::Messages,
                400,
                r#"{"type":"error","error":{"type":"invalid_request_error","message":"Your credit balance is too low to access the Anthropic API."}}"#,
                Refusal::Exhausted,
            ),
            (
                UpstreamFormat::Messages,
                413,
                r#"{"type":"error","error":{"type":"request_too_large","message":"big"}}"#,
                bad("big"),
            ),
            (
                UpstreamFormat::Messages,
                529,
                r#"{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}"#,
                Refusal::Overloaded,
            ),
            (
                UpstreamFormat::Gemini,
                400,
                r#"{"error":{"code":400,"message":"bad","status":"INVALID_ARGUMENT"}}"#,
                bad("bad"),
            ),
            (
                UpstreamFormat::Gemini,
                400,
                r#"[{"error":{"code":400,"message":"API key not valid.","status":"INVALID_ARGUMENT","details":[{"@type":"x","reason":"API_KEY_INVALID"}]}}]"#,
                Refusal::Refused,
            ),
            (
                UpstreamFormat::Gemini,
                400,
                r#"{"error":{"code":400,"message":"User location","status":"FAILED_PRECONDITION"}}"#,
                Refusal::Refused,
            ),
            (
                UpstreamFormat::Gemini,
                429,
                r#"{"error":{"code":429,"status":"RESOURCE_EXHAUSTED"}}"#,
                Refusal::RateLimited,
            ),
        ] {
            assert_eq!(read_refusal(format, status, body.as_bytes()), meant, "{body}");
        }
    }
}
