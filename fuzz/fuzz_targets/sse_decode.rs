//! The split of a stream changes nothing. The first bytes of the input say where to cut the rest.
#![no_main]

use std::ops::ControlFlow;

use evergate::sse::Decoder;
use libfuzzer_sys::fuzz_target;

type Seen = (Option<Vec<u8>>, Vec<u8>, bool, Option<Vec<u8>>);

fn feed(chunks: &[&[u8]], bytes_max: usize) -> (Vec<Seen>, bool) {
    let mut decoder = Decoder::new(bytes_max);
    let mut seen = Vec::new();
    let mut fed = Vec::new();
    let mut forwarded = Vec::new();
    for chunk in chunks {
        fed.extend_from_slice(chunk);
        let result = decoder.feed(chunk, |event| {
            assert!(event.raw.ends_with(&chunk[event.start..event.end]));
            seen.push((
                event.name.map(<[u8]>::to_vec),
                event.data.to_vec(),
                event.has_data,
                event.error_field.map(<[u8]>::to_vec),
            ));
            ControlFlow::Continue(())
        });
        forwarded.extend_from_slice(decoder.carried());
        match result {
            Ok(whole) => forwarded.extend_from_slice(&chunk[..whole]),
            Err(_) => return (seen, true),
        }
        assert_eq!([&forwarded[..], decoder.pending()].concat(), fed);
    }
    (seen, false)
}

fuzz_target!(|input: &[u8]| {
    let Some((&[bytes_max, first, second], stream)) = input.split_first_chunk::<3>() else { return };
    for bytes_max in [usize::from(bytes_max), usize::MAX] {
        let first = usize::from(first).min(stream.len());
        let second = usize::from(second).clamp(first, stream.len());
        let whole = feed(&[stream], bytes_max);
        let cut = feed(&[&stream[..first], &stream[first..second], &stream[second..]], bytes_max);
        assert_eq!(whole, cut);
        let single: Vec<&[u8]> = stream.chunks(1).collect();
        assert_eq!(whole, feed(&single, bytes_max));
    }
});
