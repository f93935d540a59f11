//! KServe v2 / Triton `generate_stream`: the members are the model's outputs, named as its author liked
//! (`text_output` by custom), and nothing marks the end of a generation but the end of the body.

use super::error::classify_error_body;
use super::event::{EventFacts, TextKind, read_members};
use crate::policy::json::JsonError;

/// An event; also a whole answer of `generate`.
pub(super) fn read(json: &[u8]) -> Result<EventFacts, JsonError> {
    let mut facts = EventFacts::default();
    let mut is_error = false;
    read_members(json, |reader, name| {
        let value = reader.value()?;
        match name {
            b"error" => is_error |= !value.is_blank(),
            b"id" | b"model_name" | b"model_version" | b"parameters" => {}
            b"sequence_id" | b"sequence_start" | b"sequence_end" => {}
            b"text_output" => facts.say(value, TextKind::Content),
            _ => facts.say(value, TextKind::Other),
        }
        Ok(())
    })?;
    if is_error {
        (facts.meaningful, facts.text) = (false, None);
        facts.error = Some(classify_error_body(json));
    }
    Ok(facts)
}
