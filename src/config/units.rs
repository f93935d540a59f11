//! Durations and sizes as people write them, `"1m30s"` and `"16MiB"`, and back.
//!
//! Invariant: what is formatted here parses again to the same value, for every value. A number
//! without a unit is not a duration: seconds or milliseconds would be a guess.

use std::time::Duration;

/// Longest first, so that formatting picks the coarsest unit that is exact.
const DURATION_UNITS: &[(&str, u128)] = &[
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

/// Binary units for formatting; decimal ones are understood as well.
const SIZE_UNITS: &[(&str, u128)] =
    &[("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];
const DECIMAL_SIZE_UNITS: &[(&str, u128)] =
    &[("TB", 1_000_000_000_000), ("GB", 1_000_000_000), ("MB", 1_000_000), ("kB", 1_000), ("KB", 1_000)];

/// Reads `"5s"`, `"250ms"`, `"1.5s"`, `"1m30s"`, `"1d"`.
pub(super) fn duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut nanos: u128 = 0;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let (number, tail) = rest.split_at(rest.find(|c: char| !c.is_ascii_digit() && c != '.')?);
        let (unit, tail) =
            tail.split_at(tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len()));
        let scale = match unit {
            "d" => 24 * 3_600_000_000_000,
            _ => scale_of(unit, DURATION_UNITS)?,
        };
        nanos = nanos.checked_add(decimal(number, scale)?)?;
        rest = tail;
    }
    let seconds = u64::try_from(nanos / 1_000_000_000).ok()?;
    let fraction = u32::try_from(nanos % 1_000_000_000).ok()?;
    Some(Duration::new(seconds, fraction))
}

/// The coarsest exact form: `"2m"`, `"75s"`, `"250ms"`.
pub(super) fn format_duration(value: Duration) -> String {
    let nanos = value.as_nanos();
    if nanos == 0 {
        return "0s".to_owned();
    }
    coarsest(nanos, DURATION_UNITS)
}

/// Reads `"16MiB"`, `"64KiB"`, `"512B"`, `"10MB"`, `"1.5GiB"`.
pub(super) fn size(text: &str) -> Option<u64> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit() && c != '.')?);
    let scale = scale_of(unit, SIZE_UNITS).or_else(|| scale_of(unit, DECIMAL_SIZE_UNITS))?;
    u64::try_from(decimal(number, scale)?).ok()
}

/// The coarsest exact binary form: `"16MiB"`.
pub(super) fn format_size(value: u64) -> String {
    coarsest(u128::from(value), SIZE_UNITS)
}

fn scale_of(unit: &str, units: &[(&str, u128)]) -> Option<u128> {
    units.iter().find(|(name, _)| *name == unit).map(|&(_, scale)| scale)
}

fn coarsest(value: u128, units: &[(&str, u128)]) -> String {
    let exact = units.iter().find(|&&(_, scale)| value >= scale && value.is_multiple_of(scale));
    match exact {
        Some((unit, scale)) => format!("{}{unit}", value / scale),
        None => format!("{value}{}", units.last().map_or("", |&(unit, _)| unit)),
    }
}

/// `number` × `scale`, when that is a whole number.
fn decimal(number: &str, scale: u128) -> Option<u128> {
    let (whole, fraction) = match number.split_once('.') {
        Some((whole, fraction)) if !fraction.is_empty() => (whole, fraction),
        Some(_) => return None,
        None => (number, ""),
    };
    if whole.is_empty() || fraction.len() > 9 || fraction.contains('.') {
        return None;
    }
    let mut value = whole.parse::<u128>().ok()?.checked_mul(scale)?;
    if !fraction.is_empty() {
        let divisor = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
        let part = fraction.parse::<u128>().ok()?.checked_mul(scale)?;
        if !part.is_multiple_of(divisor) {
            return None;
        }
        value = value.checked_add(part / divisor)?;
    }
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn durations_are_read_as_people_write_them() {
        for (text, millis) in [
            ("5s", 5_000),
            ("250ms", 250),
            ("2m", 120_000),
            ("1m30s", 90_000),
            ("1.5s", 1_500),
            ("1d", 86_400_000),
            ("1h", 3_600_000),
            ("0s", 0),
        ] {
            assert_eq!(duration(text), Some(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "5", "s", "5 s", "5S", "-5s", "1.s", ".5s", "1.5.5s", "5sec", "5s5", "1e3s", "0.5ns"]
        {
            assert_eq!(duration(text), None, "{text}");
        }
    }

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("16MiB", 16 << 20),
            ("64KiB", 64 << 10),
            ("512B", 512),
            ("10MB", 10_000_000),
            ("1.5GiB", 3 << 29),
        ] {
            assert_eq!(size(text), Some(bytes), "{text}");
        }
        for text in ["", "16", "MiB", "16mb", "16 MiB", "-1B", "99999999999TiB"] {
            assert_eq!(size(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_formatted_parses_again(seconds in 0..u64::MAX / 2, nanos in 0..1_000_000_000_u32, bytes: u64) {
            let value = Duration::new(seconds, nanos);
            prop_assert_eq!(duration(&format_duration(value)), Some(value));
            prop_assert_eq!(size(&format_size(bytes)), Some(bytes));
        }

        #[test]
        fn any_text_is_read_or_refused(text in "\\PC{0,24}") {
            let _ = duration(&text);
            let _ = size(&text);
        }
    }
}
