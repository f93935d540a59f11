//! A metrics page of any bytes is read or stepped over, within its bounds, whatever lines stand between.
#![no_main]

use evergate::policy::load::parse;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|page: &[u8]| {
    let read = parse(page);
    if let Some(reported) = read {
        assert!(reported.running <= 1_000_000 && reported.waiting <= 1_000_000);
        assert!(reported.cache_used.is_none_or(|used| (0.0..=1.0).contains(&used)));
        assert!(reported.foreign(0) >= reported.foreign(7));
    }
    // A comment and an empty line in front change nothing.
    assert_eq!(parse(&[b"# TYPE up gauge\n\n", page].concat()), read);
});
