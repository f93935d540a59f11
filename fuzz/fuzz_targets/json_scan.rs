//! The readers of JSON agree with `serde_json` and with each other, and never panic.
#![no_main]

use std::ops::ControlFlow;

use evergate::policy::dialect::{
    Endpoint, EventFacts, EventReader, classify_error_body, read_event, request_facts,
};
use evergate::policy::json::{scan_top_level, validate};
use evergate::sse::Event;
use libfuzzer_sys::fuzz_target;

const DIFFERENCES: [&str; 4] =
    ["number out of range", "lone leading surrogate", "unexpected end of hex escape", "recursion limit"];

const ENDPOINTS: [Endpoint; 7] = [
    Endpoint::ChatCompletions,
    Endpoint::Responses,
    Endpoint::AnthropicMessages,
    Endpoint::OllamaChat,
    Endpoint::LlamaCompletion,
    Endpoint::GenerateStream,
    Endpoint::KserveGenerateStream,
];

fn event(data: &[u8]) -> Event<'_> {
    Event { name: None, data, has_data: true, error_field: None, raw: data, start: 0, end: data.len() }
}

fuzz_target!(|input: &[u8]| {
    let ours = validate(input);
    match serde_json::from_slice::<serde_json::Value>(input) {
        Ok(_) => assert_eq!(ours, Ok(())),
        Err(fault) => {
            let known = DIFFERENCES.iter().any(|known| fault.to_string().contains(known));
            assert!(ours.is_err() || known, "{fault}");
        }
    }
    let scanned = scan_top_level(input, |_, value| {
        assert_eq!(&input[value.span()], value.raw());
        let _ = (value.as_str(), value.members().count(), value.elements().count());
        ControlFlow::Continue(())
    });
    let is_object = input.trim_ascii_start().first() == Some(&b'{');
    assert!(scanned.is_ok() || !(ours.is_ok() && is_object));

    let _ = classify_error_body(input);
    for endpoint in ENDPOINTS {
        let _ = request_facts(endpoint, input);
        // Two events in one input: the second may be recognised by the first.
        let mut reader = EventReader::new(endpoint);
        for data in input.split(|&byte| byte == b'\n') {
            let recognised = reader.read(&event(data)).map(|facts| EventFacts { mould: 0, ..facts });
            assert_eq!(recognised, read_event(endpoint, &event(data)));
        }
    }
});
