//! Whose fault an error is, judged by what it says.
use http::StatusCode;

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

/// Judges an error body or the data of an error event.
pub fn classify_error_body(_json: &[u8]) -> ErrorClass {
    ErrorClass::ServerFault
}
/// Whether the answer says that this backend does not have the model.
pub fn is_model_not_found(_status: StatusCode, _body: &[u8]) -> bool {
    false
}
/// Whether the answer says that the prompt is too long for the model.
pub fn is_context_length(_status: StatusCode, _body: &[u8]) -> bool {
    false
}
/// Whether the answer says that a content filter refused.
pub fn is_content_filter(_status: StatusCode, _body: &[u8]) -> bool {
    false
}
