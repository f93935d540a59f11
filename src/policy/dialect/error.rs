//! Whose fault an error is, judged by what it says: the HTTP status is 200 once a stream has begun, and
//! engines disagree about it before that.
//!
//! Order matters. A dead engine comes first: vLLM reports it with the defaults of its error helper, type
//! `BadRequestError` and code 400, and taking that for the client's fault would lose an answer that a peer
//! can give. Then what the request is known to have done wrong, then numbers, then names, then words.
//! What remains is the replica's fault: the worst that a retry costs is a second refusal.

use http::StatusCode;
use memchr::memmem;

use crate::policy::json::{Kind, Value, scan_top_level};

/// Whose fault an error is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// The replica failed (5xx-like).
    ServerFault,
    /// The replica is well but has no room or is loading (429, 503, 529, queue full).
    Overloaded,
    /// The request is at fault; the status the client should get.
    ClientFault(u16),
}

/// Judges an error body or the data of an error event, without an HTTP status to go by. Takes anything,
/// also text that is no JSON.
pub fn classify_error_body(json: &[u8]) -> ErrorClass {
    classify(&Words::of(json), None)
}

/// Judges an error answer (status 400 or above) by status and body.
pub fn classify_error_answer(status: StatusCode, body: &[u8]) -> ErrorClass {
    classify(&Words::of(body), Some(status.as_u16()))
}

/// Whether the answer says that this backend does not have the model: a peer may (F12).
pub fn is_model_not_found(status: StatusCode, body: &[u8]) -> bool {
    matches!(status.as_u16(), 400 | 404) && Words::of(body).name_an_unknown_model()
}

/// Whether the answer says that the prompt is too long for the model: a larger one may take it.
pub fn is_context_length(status: StatusCode, body: &[u8]) -> bool {
    matches!(status.as_u16(), 400 | 413 | 422) && Words::of(body).name_the_context_length()
}

/// Whether the answer says that a content filter refused: nobody else is to be asked.
pub fn is_content_filter(status: StatusCode, body: &[u8]) -> bool {
    status.is_client_error() && Words::of(body).name_a_content_filter()
}

/// Phrases of engines that are about to exit.
const DEATHS: &[&str] = &[
    "enginecore encountered an issue",
    "enginedeaderror",
    "engine is dead",
    "background loop has errored",
    "background loop is stopped",
    "cuda error:",
    "cuda out of memory",
    "device-side assert",
    "nccl error",
];

const OVERLOADS: &[&str] = &[
    "overloaded",
    "server busy",
    "server is busy",
    "too many requests",
    "rate limit",
    "queue is full",
    "queue full",
    "maximum pending requests",
    "no slot available",
    "loading model",
    "model is loading",
];

const CONTEXT_LENGTHS: &[&str] = &[
    "maximum context length",
    "context length is",
    "context window",
    "exceeds the available context size",
    "exceed_context_size",
    "longer than the model's context",
    "longer than the maximum model length",
    "prompt is too long",
    "input is too long",
    "`inputs` tokens + `max_new_tokens` must be",
    "`inputs` must have less than",
    "requested token count exceeds",
];

fn classify(words: &Words, status: Option<u16>) -> ErrorClass {
    if words.message_has(DEATHS) {
        return ErrorClass::ServerFault;
    }
    if words.name_the_context_length() || words.name_a_content_filter() {
        let client = status.filter(|status| (400..500).contains(status));
        return ErrorClass::ClientFault(client.or_else(|| words.named_client_fault()).unwrap_or(400));
    }
    if let Some(status) = status.or(words.status) {
        return match status {
            429 | 503 | 529 => ErrorClass::Overloaded,
            // The replica gave up on us, not on the client.
            408 | 499 => ErrorClass::ServerFault,
            // Not implemented: true of every replica, and so the request's.
            400..=498 | 501 | 505 => ErrorClass::ClientFault(status),
            _ if words.named_overload() || words.message_has(OVERLOADS) => ErrorClass::Overloaded,
            _ => ErrorClass::ServerFault,
        };
    }
    if words.named_overload() {
        return ErrorClass::Overloaded;
    }
    if let Some(status) = words.named_client_fault() {
        return ErrorClass::ClientFault(status);
    }
    if words.named_server_fault() {
        return ErrorClass::ServerFault;
    }
    if words.message_has(OVERLOADS) {
        return ErrorClass::Overloaded;
    }
    if words.name_an_unknown_model() {
        return ErrorClass::ClientFault(404);
    }
    ErrorClass::ServerFault
}

/// The words of an error, in lower case. Allocates: errors are rare.
#[derive(Debug, Default)]
struct Words {
    /// A number from 400 to 599 that stands for an HTTP status.
    status: Option<u16>,
    /// `type`, `code` and `error_type`, where they are names.
    names: Vec<String>,
    message: String,
    param: String,
}

/// Longest part of a message that is searched: engines quote prompts in theirs.
const MESSAGE_BYTES_MAX: usize = 4096;

impl Words {
    fn of(body: &[u8]) -> Self {
        let mut words = Self::default();
        let mut nested = None;
        let read = scan_top_level(body, |name, value| {
            match name {
                // The object is the error, whatever stands beside it.
                b"error" if value.kind() == Kind::Object => nested = Some(value),
                b"error" | b"message" | b"detail" | b"msg" if value.kind() == Kind::String => {
                    words.take_message(value);
                }
                // FastAPI's list of validation faults.
                b"detail" if value.kind() == Kind::Array => words.status = Some(422),
                _ => words.member(name, value),
            }
            std::ops::ControlFlow::Continue(())
        });
        if read.is_err() && words.message.is_empty() {
            words.message = lower(&String::from_utf8_lossy(&body[..body.len().min(MESSAGE_BYTES_MAX)]));
        }
        for (name, value) in nested.iter().flat_map(Value::members) {
            match &*name {
                b"message" => words.take_message(value),
                name => words.member(name, value),
            }
        }
        words
    }

    fn member(&mut self, name: &[u8], value: Value<'_>) {
        match name {
            b"code" | b"status" | b"status_code" | b"http_code" | b"type" | b"error_type" => {
                let text = value.as_str();
                let number = value.as_u64().or_else(|| text.as_deref()?.parse().ok());
                if let Some(number) = number {
                    if let Some(status) = u16::try_from(number).ok().filter(|n| (400..600).contains(n)) {
                        self.status = Some(status);
                    }
                } else if let Some(text) = text {
                    self.names.push(lower(&text));
                }
            }
            b"param" => self.param = value.as_str().as_deref().map(lower).unwrap_or_default(),
            _ => {}
        }
    }

    fn take_message(&mut self, value: Value<'_>) {
        if let Some(text) = value.as_str() {
            let mut end = text.len().min(MESSAGE_BYTES_MAX);
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            self.message = lower(&text[..end]);
        }
    }

    fn message_has(&self, phrases: &[&str]) -> bool {
        let message = self.message.as_bytes();
        phrases.iter().any(|phrase| memmem::find(message, phrase.as_bytes()).is_some())
    }

    fn is_named(&self, names: &[&str]) -> bool {
        self.names.iter().any(|own| names.contains(&own.as_str()))
    }

    fn name_the_context_length(&self) -> bool {
        self.is_named(&["context_length_exceeded", "exceed_context_size_error"])
            || self.message_has(CONTEXT_LENGTHS)
    }

    fn name_a_content_filter(&self) -> bool {
        self.is_named(&["content_filter", "content_policy_violation", "responsibleaipolicyviolation"])
            || self.message_has(&["content management policy"])
    }

    fn name_an_unknown_model(&self) -> bool {
        self.is_named(&["model_not_found"])
            || self.message_has(&["unknown model"])
            || (self.message_has(&["model"]) && self.message_has(&["not exist", "not found"]))
            || (self.is_named(&["not_found_error", "notfounderror"])
                && (self.param == "model" || self.message.starts_with("model")))
    }

    fn named_overload(&self) -> bool {
        self.is_named(&[
            "overloaded_error",
            "overloaded",
            "rate_limit_error",
            "rate_limit_exceeded",
            "ratelimiterror",
            "too_many_requests",
            "toomanyrequestserror",
            "unavailable_error",
            "service_unavailable",
            "serviceunavailableerror",
            "server_overloaded",
            "insufficient_quota",
            "queue_full",
        ])
    }

    fn named_client_fault(&self) -> Option<u16> {
        const NAMES: &[(&str, u16)] = &[
            ("invalid_request_error", 400),
            ("invalid_request", 400),
            ("badrequesterror", 400),
            ("bad_request", 400),
            ("bad_request_error", 400),
            ("invalid_value", 400),
            ("invalid_prompt", 400),
            ("valueerror", 400),
            ("authentication_error", 401),
            ("authenticationerror", 401),
            ("invalid_api_key", 401),
            ("permission_error", 403),
            ("permissiondeniederror", 403),
            ("not_found_error", 404),
            ("notfounderror", 404),
            ("model_not_found", 404),
            ("request_too_large", 413),
            ("validation", 422),
            ("validation_error", 422),
            ("unprocessableentityerror", 422),
            ("tool_error", 422),
            ("template_error", 422),
            ("not_supported_error", 501),
        ];
        let status = |own: &String| NAMES.iter().find(|(name, _)| name == own).map(|&(_, status)| status);
        self.names.iter().find_map(status)
    }

    fn named_server_fault(&self) -> bool {
        self.is_named(&[
            "server_error",
            "internalservererror",
            "internal_server_error",
            "internal_error",
            "api_error",
            "generation",
            "incomplete_generation",
        ])
    }
}

fn lower(text: &str) -> String {
    text.to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ErrorClass::{ClientFault, Overloaded, ServerFault};

    #[test]
    fn errors_are_judged_by_what_they_say() {
        for (body, class) in [
            (
                r#"{"error":{"message":"x","type":"server_error","param":null,"code":"replica_lost"}}"#,
                ServerFault,
            ),
            (r#"{"error":{"message":"x","type":"InternalServerError","code":500}}"#, ServerFault),
            (r#"{"error":{"message":"x","type":"BadRequestError","code":400}}"#, ClientFault(400)),
            (r#"{"error":{"message":"x","type":"invalid_request_error","code":null}}"#, ClientFault(400)),
            (r#"{"error":{"message":"x","type":"invalid_request_error","code":"401"}}"#, ClientFault(401)),
            (r#"{"error":{"message":"x","code":"rate_limit_exceeded"}}"#, Overloaded),
            (r#"{"error":{"message":"The request queue is full.","type":"x","code":503}}"#, Overloaded),
            (r#"{"error":{"message":"The queue is full","code":500}}"#, Overloaded),
            (r#"{"error":{"message":"CUDA error: an illegal memory access","code":400}}"#, ServerFault),
            (r#"{"error":{"code":501,"message":"x","type":"not_supported_error"}}"#, ClientFault(501)),
            (
                r#"{"error":{"code":400,"message":"x","type":"exceed_context_size_error","n_ctx":8}}"#,
                ClientFault(400),
            ),
            (r#"{"detail":[{"loc":["body","messages"],"msg":"Field required"}]}"#, ClientFault(422)),
            (r#"{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}"#, Overloaded),
            (r#"{"type":"error","error":{"type":"request_too_large","message":"x"}}"#, ClientFault(413)),
            (r#"{"error":"model 'x' not found"}"#, ClientFault(404)),
            (r#"{"error":"llama runner process has terminated: exit status 2"}"#, ServerFault),
            (r#"{"object":"error","message":"x","type":"NotFoundError","code":404}"#, ClientFault(404)),
            (r#"{"error":{"message":"request timed out","code":408}}"#, ServerFault),
            ("Internal Server Error", ServerFault),
            ("upstream server is busy", Overloaded),
            ("", ServerFault),
            ("{}", ServerFault),
            (r#"{"error":{"code":50001}}"#, ServerFault),
            // Too long for every replica, whatever the number beside it.
            (
                r#"{"error":{"message":"the request exceeds the available context size","code":500}}"#,
                ClientFault(400),
            ),
            (r#"{"error":{"message":"x","type":"content_filter","code":500}}"#, ClientFault(400)),
            (r#"{"detail":{"reason":"worker died"}}"#, ServerFault),
            // Words that are no message, and a message that quotes.
            (r#"{"input":"what is a rate limit"}"#, ServerFault),
            (
                r#"{"error":{"message":"rate limiter crashed: rate limit","type":"internal_error"}}"#,
                ServerFault,
            ),
        ] {
            assert_eq!(classify_error_body(body.as_bytes()), class, "{body}");
        }
    }

    #[test]
    fn the_status_of_an_answer_outweighs_the_body_but_not_a_death() {
        let judge = |status: u16, body: &str| {
            classify_error_answer(StatusCode::from_u16(status).unwrap(), body.as_bytes())
        };
        assert_eq!(judge(400, r#"{"error":{"message":"EngineCore encountered an issue."}}"#), ServerFault);
        assert_eq!(judge(422, r#"{"error":{"message":"x","code":500}}"#), ClientFault(422));
        assert_eq!(judge(503, ""), Overloaded);
        assert_eq!(judge(529, ""), Overloaded);
        assert_eq!(judge(502, "Bad Gateway"), ServerFault);
        assert_eq!(judge(500, r#"{"error":"Model is overloaded","error_type":"overloaded"}"#), Overloaded);
    }

    #[test]
    fn an_unknown_model_is_told_from_an_unknown_path() {
        for body in [
            r#"{"error":{"message":"The model `x` does not exist.","type":"NotFoundError","param":"model","code":404}}"#,
            r#"{"object":"error","message":"The model `x` does not exist.","type":"NotFoundError","code":404}"#,
            r#"{"error":{"message":"x","type":"invalid_request_error","code":"model_not_found"}}"#,
            r#"{"error":"model \"x\" not found, try pulling it first"}"#,
            r#"{"error":"Request for unknown model: 'x' is not found"}"#,
            r#"{"type":"error","error":{"type":"not_found_error","message":"model: claude-x"}}"#,
            r#"{"error":{"message":"`x` is not served here","type":"NotFoundError","param":"model","code":404}}"#,
        ] {
            assert!(is_model_not_found(StatusCode::NOT_FOUND, body.as_bytes()), "{body}");
            assert!(!is_model_not_found(StatusCode::INTERNAL_SERVER_ERROR, body.as_bytes()), "{body}");
        }
        for body in [
            r#"{"detail":"Not Found"}"#,
            r#"{"error":"file not found"}"#,
            "404 page not found",
            "",
            r#"{"error":{"message":"No such response","type":"not_found_error","param":"id"}}"#,
            r#"{"error":{"message":"models are listed elsewhere","type":"invalid_path"}}"#,
            r#"{"error":{"message":"x","type":"invalid_value","param":"model"}}"#,
        ] {
            assert!(!is_model_not_found(StatusCode::NOT_FOUND, body.as_bytes()), "{body}");
        }
    }

    #[test]
    fn a_long_prompt_and_a_filter_are_recognised() {
        for body in [
            // vLLM, three wordings.
            r#"{"error":{"message":"This model's maximum context length is 4096 tokens. However, you requested 5000","code":400}}"#,
            r#"{"object":"error","message":"The decoder prompt (length 9000) is longer than the maximum model length of 8192.","type":"BadRequestError","code":400}"#,
            r#"{"error":{"message":"'max_tokens' is too large: 9. This model's maximum context length is 8 tokens and your request has 7 input tokens","type":"BadRequestError","param":null,"code":400}}"#,
            // SGLang.
            r#"{"object":"error","message":"The input (9000 tokens) is longer than the model's context length (8192 tokens).","type":"BadRequestError","param":null,"code":400}"#,
            r#"{"object":"error","message":"Requested token count exceeds the model's maximum context length of 8192 tokens.","type":"BadRequestError","code":400}"#,
            // TGI.
            r#"{"error":"Input validation error: `inputs` must have less than 1024 tokens. Given: 2000","error_type":"validation"}"#,
            // llama.cpp, TGI, OpenAI, Anthropic.
            r#"{"error":{"code":400,"type":"exceed_context_size_error","message":"the request exceeds the available context size"}}"#,
            r#"{"error":"Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096","error_type":"validation"}"#,
            r#"{"error":{"message":"x","code":"context_length_exceeded"}}"#,
            r#"{"type":"error","error":{"type":"invalid_request_error","message":"prompt is too long: 9 tokens > 8"}}"#,
        ] {
            assert!(is_context_length(StatusCode::BAD_REQUEST, body.as_bytes()), "{body}");
            assert!(!is_content_filter(StatusCode::BAD_REQUEST, body.as_bytes()), "{body}");
        }
        // The same words with a status that says something else.
        let quoted = r#"{"error":{"message":"This model's maximum context length is 4096 tokens"}}"#;
        for status in [401, 404, 429, 500] {
            assert!(!is_context_length(StatusCode::from_u16(status).unwrap(), quoted.as_bytes()), "{status}");
        }
        for filtered in [
            r#"{"error":{"message":"The response was filtered due to our content management policy"}}"#,
            r#"{"error":{"message":"x","code":"content_filter"}}"#,
        ] {
            assert!(is_content_filter(StatusCode::BAD_REQUEST, filtered.as_bytes()));
            assert!(!is_context_length(StatusCode::BAD_REQUEST, filtered.as_bytes()));
        }
    }

    #[test]
    fn a_message_of_megabytes_is_cut_before_it_is_searched() {
        // The bound falls between two letters, and within one.
        for before in ["", "x"] {
            let body =
                format!(r#"{{"error":{{"message":"{before}{}queue is full"}}}}"#, "\u{e9}".repeat(100_001));
            assert_eq!(classify_error_body(body.as_bytes()), ServerFault);
        }
    }
}
