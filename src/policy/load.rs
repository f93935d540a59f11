//! What an engine says of its own load on its metrics page, and how much of it is other clients' work.
//!
//! Only a few gauges are looked for in the text (Prometheus exposition format 0.0.4), by their full names; everything
//! else is stepped over unread, whatever it looks like. Samples of one gauge are added up over their labels: vLLM has
//! one a data-parallel engine. Ranks of tensor and pipeline parallelism all say the same, so only the first
//! counts. A number that is no count (negative, NaN, absurd) is not there.
//!
//! Sources: metrics of vLLM (`gpu_cache_usage_perc` before 2025, `kv_cache_usage_perc` since; `swapped` before V1),
//! SGLang (`--enable-metrics`), llama.cpp (`--metrics`; no cache gauge in newer ones), TGI.
//! Not here: that an old number is forgotten, and what a load is compared with.

/// Beyond this a count is a defect: no engine holds a million requests.
const COUNT_MAX: f64 = 1e6;

/// What a page said.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Reported {
    /// Requests being worked on.
    pub running: u32,
    /// Requests waiting in the engine.
    pub waiting: u32,
    /// Share of the KV cache in use, 0..=1; none where the engine does not say.
    pub cache_used: Option<f64>,
}

impl Reported {
    /// Work of others there: what it has beyond our own `in_flight` requests. Never below zero, for ours may be on
    /// their way to it or back.
    pub fn foreign(&self, in_flight: u32) -> u32 {
        self.running.saturating_add(self.waiting).saturating_sub(in_flight)
    }
}

#[derive(Clone, Copy)]
enum Gauge {
    Running,
    Waiting,
    CacheUsed,
}

/// The gauges by name.
const GAUGES: &[(&[u8], Gauge)] = &[
    (b"vllm:num_requests_running", Gauge::Running),
    (b"vllm:num_requests_waiting", Gauge::Waiting),
    (b"vllm:num_requests_swapped", Gauge::Waiting),
    (b"vllm:kv_cache_usage_perc", Gauge::CacheUsed),
    (b"vllm:gpu_cache_usage_perc", Gauge::CacheUsed),
    (b"sglang:num_running_reqs", Gauge::Running),
    (b"sglang:num_queue_reqs", Gauge::Waiting),
    (b"sglang:token_usage", Gauge::CacheUsed),
    (b"llamacpp:requests_processing", Gauge::Running),
    (b"llamacpp:requests_deferred", Gauge::Waiting),
    (b"llamacpp:kv_cache_usage_ratio", Gauge::CacheUsed),
    (b"tgi_batch_current_size", Gauge::Running),
    (b"tgi_queue_size", Gauge::Waiting),
];

/// Labels of ranks that repeat what the first one says.
const RANKS: &[&[u8]] = &[b"tp_rank", b"pp_rank"];

/// Reads a metrics page. None when no engine's count of requests is on it.
pub fn parse(page: &[u8]) -> Option<Reported> {
    let (mut running, mut waiting, mut cache_used) = (None, None, None);
    for line in page.split(|&byte| byte == b'\n') {
        let Some((gauge, value)) = sample(line) else { continue };
        let (total, most) = match gauge {
            Gauge::Running => (&mut running, COUNT_MAX),
            Gauge::Waiting => (&mut waiting, COUNT_MAX),
            Gauge::CacheUsed => {
                // The fullest of several caches is the one that makes requests wait; old and new names say the same.
                if value <= 1.0 {
                    cache_used = Some(value.max(cache_used.unwrap_or(0.0)));
                }
                continue;
            }
        };
        let sum = total.unwrap_or(0.0) + value;
        if sum <= most {
            *total = Some(sum);
        }
    }
    if running.is_none() && waiting.is_none() {
        return None;
    }
    // In range by the bound above.
    let count = |total: Option<f64>| total.unwrap_or(0.0).round() as u32;
    Some(Reported { running: count(running), waiting: count(waiting), cache_used })
}

/// `name{labels} value [timestamp]`, when it is one of [`GAUGES`] and its value a number from zero up.
fn sample(line: &[u8]) -> Option<(Gauge, f64)> {
    let line = line.trim_ascii();
    let (name, gauge) = GAUGES.iter().find(|(name, _)| line.starts_with(name))?;
    let rest = &line[name.len()..];
    let rest = match rest.first()? {
        b'{' => {
            let end = labels_end(rest)?;
            let (labels, rest) = rest.split_at(end);
            if is_other_rank(labels) {
                return None;
            }
            rest
        }
        b' ' | b'\t' => rest,
        // A longer name.
        _ => return None,
    };
    let mut words = rest.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
    let value: f64 = std::str::from_utf8(words.next()?).ok()?.parse().ok()?;
    (value.is_finite() && value >= 0.0).then_some((*gauge, value))
}

/// Behind the brace that ends the labels; braces and quotes may stand in values.
fn labels_end(labels: &[u8]) -> Option<usize> {
    let (mut quoted, mut escaped) = (false, false);
    for (at, &byte) in labels.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'}' if !quoted => return Some(at + 1),
            _ => {}
        }
    }
    None
}

/// Whether the labels name a rank other than 0.
fn is_other_rank(labels: &[u8]) -> bool {
    RANKS.iter().any(|rank| {
        let Some(at) = memchr::memmem::find(labels, rank) else { return false };
        // A longer label's end, such as `moe_tp_rank`, is another label.
        let starts = at.checked_sub(1).is_some_and(|before| matches!(labels[before], b'{' | b',' | b' '));
        let value = labels[at + rank.len()..].strip_prefix(b"=\"");
        starts && value.is_some_and(|value| !value.starts_with(b"0\""))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn pages_of_engines_are_read() {
        let vllm = "# HELP vllm:num_requests_running Number of requests in model execution batches.\n\
            # TYPE vllm:num_requests_running gauge\n\
            vllm:num_requests_running{engine=\"0\",model_name=\"org/m {x}, \\\"y\\\"\"} 3.0\n\
            vllm:num_requests_running{engine=\"1\",model_name=\"org/m\"} 2.0\n\
            vllm:num_requests_waiting{engine=\"0\",model_name=\"org/m\"} 4.0\n\
            vllm:num_requests_waiting_by_reason{reason=\"capacity\"} 9.0\n\
            vllm:kv_cache_usage_perc{engine=\"0\"} 0.25\n\
            vllm:kv_cache_usage_perc{engine=\"1\"} 0.5\n";
        assert_eq!(parse(vllm.as_bytes()), Some(Reported { running: 5, waiting: 4, cache_used: Some(0.5) }));
        let older = "vllm:num_requests_running 1\nvllm:num_requests_swapped 2\nvllm:num_requests_waiting 3\n\
            vllm:gpu_cache_usage_perc 1\n";
        assert_eq!(parse(older.as_bytes()), Some(Reported { running: 1, waiting: 5, cache_used: Some(1.0) }));
        let sglang = "sglang:num_running_reqs{model_name=\"m\",tp_rank=\"0\",pp_rank=\"0\"} 2.0\r\n\
            sglang:num_running_reqs{model_name=\"m\",tp_rank=\"1\",pp_rank=\"0\"} 2.0\r\n\
            sglang:num_queue_reqs{model_name=\"m\",moe_tp_rank=\"1\"} 1.0\r\n\
            sglang:token_usage{model_name=\"m\"} 0.28\r\n";
        assert_eq!(
            parse(sglang.as_bytes()),
            Some(Reported { running: 2, waiting: 1, cache_used: Some(0.28) })
        );
        let llama_cpp = "llamacpp:requests_processing 4\nllamacpp:requests_deferred 46 1712345678901\n\
            llamacpp:predicted_tokens_seconds nan\n";
        assert_eq!(parse(llama_cpp.as_bytes()), Some(Reported { running: 4, waiting: 46, cache_used: None }));
        let tgi = "tgi_batch_current_size 4\ntgi_queue_size 7\ntgi_batch_current_max_tokens 1\n";
        assert_eq!(parse(tgi.as_bytes()), Some(Reported { running: 4, waiting: 7, cache_used: None }));
    }

    #[test]
    fn what_is_no_count_is_not_there() {
        for value in ["NaN", "+Inf", "-1", "1e300", "two", "", "0x10"] {
            assert_eq!(parse(format!("tgi_queue_size {value}\n").as_bytes()), None, "{value}");
            let page = format!("tgi_queue_size {value}\ntgi_queue_size 2\nvllm:kv_cache_usage_perc {value}");
            assert_eq!(
                parse(page.as_bytes()),
                Some(Reported { running: 0, waiting: 2, cache_used: None }),
                "{value}"
            );
        }
        for page in
            ["", "up 1", "<html>", "tgi_queue_size", "tgi_queue_size{a=\"} 3", "vllm:kv_cache_usage_perc 1"]
        {
            assert_eq!(parse(page.as_bytes()), None, "{page}");
        }
    }

    #[test]
    fn braces_and_quotes_in_a_label_end_nothing() {
        for label in ["a}b", r#"a\"} 9 b"#, r"a\\", r#"\"}\""#, "}"] {
            let page = format!("tgi_queue_size{{name=\"{label}\"}} 7\n");
            let waiting = parse(page.as_bytes()).map(|reported| reported.waiting);
            assert_eq!(waiting, Some(7), "{page}");
        }
    }

    #[test]
    fn our_own_requests_are_not_counted_twice() {
        let reported = Reported { running: 5, waiting: 3, cache_used: None };
        assert_eq!(reported.foreign(0), 8);
        assert_eq!(reported.foreign(6), 2);
        assert_eq!(reported.foreign(9), 0);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_stepped_over(page in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = parse(&page);
        }

        #[test]
        fn lines_that_say_nothing_change_nothing(
            counts in prop::collection::vec(0u32..1000, 1..6),
            noise in prop::collection::vec("[a-z:_{}\"=\\\\ 0-9#.]{0,40}", 0..8),
            at in any::<prop::sample::Index>(),
        ) {
            let known = |line: &String| GAUGES.iter().any(|(name, _)| line.trim().as_bytes().starts_with(name));
            let noise: Vec<_> = noise.into_iter().filter(|line| !known(line)).collect();
            let mut lines: Vec<String> = counts
                .iter()
                .enumerate()
                .map(|(n, count)| format!("vllm:num_requests_running{{engine=\"{n}\"}} {count}"))
                .collect();
            let place = at.index(lines.len() + 1);
            lines.splice(place..place, noise);
            let read = parse(lines.join("\n").as_bytes()).unwrap();
            prop_assert_eq!(read.running, counts.iter().sum::<u32>());
        }
    }
}
