//! The matrix as a document: a line for each row, the worst of its cells in each column, and what did not
//! keep its promise by name.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use crate::cell::{self, ADDED_MAX, Cell, Played, REPLICAS, REQUESTS};
use crate::rows::NOT_HERE;

/// Longest line of prose in a document (`tests/docs.rs`).
const LINE_CHARS_MAX: usize = 120;

/// The document, as Markdown.
pub fn markdown(played: &[(Cell, Played)], took: Duration) -> String {
    let kept = played.iter().filter(|(_, played)| played.wrong.is_empty()).count();
    let mut text = String::from("# The fault matrix\n\n");
    paragraph(
        &mut text,
        &format!(
            "{kept} of {} cells kept the promise. A cell is a fault at a kind of endpoint (chat stream, chat, \
             completions stream, embeddings, Anthropic messages stream; gRPC in F38), with backends of HTTP/1.1 or of \
             HTTP/2, and one, two or three of {REPLICAS} sick. Each is {REQUESTS} requests, 20 a second, behind a real \
             evergate with default settings (with three sick `attempts_max = 4`: three attempts could all meet sick \
             ones). The promise: every answer arrives, byte for byte that of one backend, within the p99 of the same \
             cell's healthy requests and {} s, and the connect clock where no connection stands; in F11, F14 and F31 \
             to F34 what the line says.",
            played.len(),
            ADDED_MAX.as_secs()
        ),
    );
    paragraph(
        &mut text,
        &format!(
            "Made by `EVERGATE_MATRIX_OUT=docs/matrix.md cargo test --test matrix -- --ignored whole` in {} minutes; \
             `cargo test` plays each line once. An unoptimized build on a shared machine: the times say whether a \
             promise was kept, not how fast evergate is.",
            took.as_secs().div_ceil(60)
        ),
    );
    paragraph(
        &mut text,
        "Of each line the worst cell: *added*, what the slowest request took longer than a healthy one; *after*, \
         requests that sick backends saw after the first of them was found out (trials included); *attempts*, those \
         that reached a backend, for each request; *back*, from being healed to serving again.",
    );
    text += "| id | fault | cells | kept | added | after | attempts | back |\n";
    text += "|---|---|---|---|---|---|---|---|\n";
    for line in played.chunk_by(|(a, _), (b, _)| Arc::ptr_eq(&a.row, &b.row)) {
        let row = &line[0].0.row;
        let of =
            |worst: &dyn Fn(&Played) -> Duration| line.iter().map(|(_, played)| worst(played)).max().unwrap();
        let after = line.iter().map(|(_, played)| played.after_ejection).max().unwrap();
        let attempts = line.iter().map(|(_, played)| played.amplification).fold(0.0, f64::max);
        let kept = line.iter().filter(|(_, played)| played.wrong.is_empty()).count();
        let kept = if kept == line.len() { "all".to_owned() } else { format!("**{kept}**") };
        let back = line.iter().filter_map(|(_, played)| played.returned).max();
        let back = back.map_or("–".to_owned(), seconds);
        let added = seconds(of(&Played::added));
        let _ = writeln!(
            text,
            "| {} | {} | {} | {kept} | {added} | {after} | {attempts:.2} | {back} |",
            row.id,
            row.what,
            line.len()
        );
    }
    not_kept(&mut text, played);
    text += "\n## Not here\n\n";
    for (what, why) in NOT_HERE {
        wrapped(&mut text, &format!("- {what}: {why}"));
    }
    text
}

/// A line for each row that broke its promise, and where: the names of all cells are in the test's own words.
fn not_kept(text: &mut String, played: &[(Cell, Played)]) {
    let mut told = String::new();
    for line in played.chunk_by(|(a, _), (b, _)| Arc::ptr_eq(&a.row, &b.row)) {
        let broken: Vec<&(Cell, Played)> =
            line.iter().filter(|(_, played)| !played.wrong.is_empty()).collect();
        if broken.is_empty() {
            continue;
        }
        let row = &line[0].0.row;
        let count = |holds: &dyn Fn(&Cell) -> bool| broken.iter().filter(|(cell, _)| holds(cell)).count();
        let by_sick = row.sick.iter().map(|sick| (format!("{sick} sick"), count(&|cell| cell.sick == *sick)));
        let by_http = row
            .https
            .iter()
            .map(|http| (cell::protocol(*http).to_owned(), count(&|cell| cell.http == *http)));
        let places: Vec<String> = by_sick
            .chain(by_http)
            .filter(|(_, cells)| *cells > 0)
            .map(|(place, cells)| format!("{place} {cells}"))
            .collect();
        let failed: usize = broken.iter().map(|(_, played)| played.failed).sum();
        let cells = format!("{} of {} cells ({})", broken.len(), line.len(), places.join(", "));
        let failed = match failed {
            0 => String::new(),
            1 => "1 request in ".to_owned(),
            _ => format!("{failed} requests in "),
        };
        wrapped(&mut told, &format!("- {} {}: {failed}{cells}", row.id, row.what));
    }
    if !told.is_empty() {
        text.push_str("\n## Not kept\n\n");
        paragraph(
            text,
            "Where no request is counted, every request got what it was promised, and something else was wrong: more \
             attempts (F32) or deaths (F33) than there may be, or a healed backend that saw no request for 30 s.",
        );
        text.push_str(&told);
    }
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

fn paragraph(text: &mut String, words: &str) {
    wrapped(text, words);
    text.push('\n');
}

/// Appends these words, broken into lines.
fn wrapped(text: &mut String, words: &str) {
    let mut chars = 0;
    for word in words.split_whitespace() {
        let length = word.chars().count();
        if chars > 0 && chars + 1 + length > LINE_CHARS_MAX {
            text.push_str(if words.starts_with("- ") { "\n  " } else { "\n" });
            chars = 2;
        } else if chars > 0 {
            text.push(' ');
            chars += 1;
        }
        text.push_str(word);
        chars += length;
    }
    text.push('\n');
}
