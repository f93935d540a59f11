//! What the bytes mean: the wire shapes of inference APIs and engines.
//!
//! ```text
//! request head ─▶ Endpoint::of ─▶ request_facts(body)       may it be sent again, whose model, a stream?
//! answer       ─▶ EventReader (read_event) ─▶ StreamProgress   is this a token, an end, an error; is it whole?
//!              ─▶ check_answer(body)                        the same for an answer in one piece
//! own questions ─▶ Question, check_reply(body)               whether a token comes, asked by a probe
//! own errors   ─▶ error_body, error_event                   in the words the client's SDK understands
//! ```
//!
//! Answers are judged by one rule: a stream is broken when its body ended in any way, or an error event
//! or an `abort` came, before a good finish of every choice. `[DONE]` proves nothing: vLLM sends it after
//! errors too. Shapes and their sources: docs of the engines, as noted in each file.
//!
//! Nothing here decides what to do about an error; that is `policy::retry`.

mod answer;
mod anthropic;
mod endpoint;
mod engine;
mod error;
mod event;
mod grpc;
mod kserve;
mod native;
mod ollama;
mod openai;
mod question;
mod rejection;
mod request;

pub use answer::{BadAnswer, check_answer};
pub use endpoint::{Dialect, Endpoint};
pub use engine::Engine;
pub use error::{
    ErrorClass, classify_error_answer, classify_error_body, is_content_filter, is_context_length,
    is_model_not_found,
};
pub use event::{
    Choices, EventFacts, EventReader, Finish, InvalidEvent, StreamProgress, Text, TextKind, read_event,
};
pub use grpc::{grpc_class, grpc_message, grpc_status};
pub use question::{BadReply, Question, answer_text, check_reply};
pub use rejection::{Rejection, error_body, error_event};
pub use request::{RequestFacts, request_facts};
