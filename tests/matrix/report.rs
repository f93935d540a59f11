//! The matrix as a table: a line for each row, the worst of its cells in each column.

use std::fmt::Write as _;
use std::time::Duration;

use crate::cell::{Cell, Played};
use crate::rows::NOT_HERE;

/// The document, as Markdown.
pub fn markdown(_played: &[(Cell, Played)], _took: Duration) -> String {
    let mut text = String::new();
    for (what, why) in NOT_HERE {
        let _ = writeln!(text, "- {what}: {why}");
    }
    text
}
