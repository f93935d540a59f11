//! How much memory evergate may keep by default: half of what its container was given.
//!
//! Half, because connections, TLS and the allocator's slack need the rest. The whole machine's
//! memory is no measure: neighbours live there too.

use std::fs;

/// Where no limit is set.
const DEFAULT: u64 = 1 << 30;
/// A container this small still keeps something.
const SMALLEST: u64 = 1 << 20;
/// cgroup v1 says "no limit" with a number near 2^63, rounded down to pages.
const UNLIMITED: u64 = 1 << 60;

/// Half the cgroup limit (v2, then v1), else 1 GiB.
pub(super) fn memory_default() -> u64 {
    let limit = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .find_map(|text| limit(&text));
    limit.map_or(DEFAULT, |bytes| (bytes / 2).max(SMALLEST))
}

fn limit(text: &str) -> Option<u64> {
    text.trim().parse().ok().filter(|&bytes| bytes > 0 && bytes < UNLIMITED)
}

#[cfg(test)]
mod tests {
    use super::limit;

    #[test]
    fn a_cgroup_without_a_limit_is_no_limit() {
        assert_eq!(limit("max\n"), None);
        assert_eq!(limit("9223372036854771712\n"), None);
        assert_eq!(limit("536870912\n"), Some(536_870_912));
    }
}
