//! The fault matrix: every fault of the catalogue that needs no stream continued, at every kind of endpoint,
//! over HTTP/1.1 and HTTP/2, with one, two and three of four replicas sick.
//!
//! `cargo test --test matrix` plays the quick form: every row once, and the silent ones with three sick. The
//! whole form takes some minutes: `cargo test --test matrix -- --ignored whole`. `EVERGATE_MATRIX_ROWS="F08 F15"`
//! narrows either to some rows; `EVERGATE_MATRIX_OUT=docs/matrix.md` has the whole form write its table there.

// A test that unwraps in vain has failed, which is what it is for.
#![allow(clippy::unwrap_used)]
// Tests measure real time; only the crate itself must go through its clock.
#![allow(clippy::disallowed_methods)]
#![allow(unreachable_pub)]

mod acceptance;
mod api;
mod cell;
mod replica;
mod report;
mod rows;
#[path = "../support/mod.rs"]
mod support;

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::cell::{Cell, Played};
use crate::rows::{Row, rows};

/// Cells that run at a time. They mostly wait; more of them would wait for the processor.
const AT_A_TIME: usize = 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_fault_once() {
    let mut cells = Vec::new();
    for row in asked_for() {
        let with_return = false;
        let (endpoint, http, sick) = (row.endpoints[0], row.https[0], row.sick[0]);
        cells.push(Cell { row: Arc::clone(&row), endpoint, http, sick, with_return });
        if row.hangs && row.sick.contains(&3) {
            cells.push(Cell { row, endpoint, http, sick: 3, with_return });
        }
    }
    let played = play_all(cells).await;
    assert_is_well(&played);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "some minutes: cargo test --test matrix -- --ignored whole"]
async fn the_whole_matrix() {
    let begin = Instant::now();
    let mut cells = Vec::new();
    for row in asked_for() {
        for endpoint in row.endpoints.iter().copied() {
            for http in row.https.iter().copied() {
                for sick in row.sick.iter().copied() {
                    cells.push(Cell { row: Arc::clone(&row), endpoint, http, sick, with_return: true });
                }
            }
        }
    }
    let played = play_all(cells).await;
    let table = report::markdown(&played, begin.elapsed());
    println!("{table}");
    if let Ok(path) = std::env::var("EVERGATE_MATRIX_OUT") {
        std::fs::write(path, table).unwrap();
    }
    assert_is_well(&played);
}

/// The rows, or those the environment names.
fn asked_for() -> Vec<Arc<Row>> {
    let wanted = std::env::var("EVERGATE_MATRIX_ROWS").unwrap_or_default();
    let wanted: Vec<&str> = wanted.split_whitespace().collect();
    rows().into_iter().filter(|row| wanted.is_empty() || wanted.contains(&row.id)).map(Arc::new).collect()
}

/// Plays the cells, some at a time; they come back in their order.
async fn play_all(cells: Vec<Cell>) -> Vec<(Cell, Played)> {
    let room = Arc::new(Semaphore::new(AT_A_TIME));
    let mut playing = JoinSet::new();
    for (nth, cell) in cells.into_iter().enumerate() {
        let room = Arc::clone(&room);
        playing.spawn(async move {
            let _place = room.acquire_owned().await.unwrap();
            let played = cell::play(&cell).await;
            let verdict = if played.wrong.is_empty() { "ok" } else { "WRONG" };
            // Shown when the test fails.
            eprintln!(
                "{verdict} {cell}: {} failed, worst {:?} (healthy {:?}), found out after {:?}, {} after that, ×{:.2}, back {:?}",
                played.failed, played.worst, played.healthy_p99, played.found_out, played.after_ejection,
                played.amplification, played.returned
            );
            (nth, cell, played)
        });
    }
    let mut played = playing.join_all().await;
    played.sort_by_key(|(nth, ..)| *nth);
    played.into_iter().map(|(_, cell, played)| (cell, played)).collect()
}

#[track_caller]
fn assert_is_well(played: &[(Cell, Played)]) {
    /// Of one cell so many faults are told whole.
    const TOLD: usize = 3;
    let sick: Vec<&(Cell, Played)> = played.iter().filter(|(_, played)| !played.wrong.is_empty()).collect();
    let mut told = String::new();
    for (cell, played) in &sick {
        told += &format!("\n{cell}: {} things wrong\n", played.wrong.len());
        for wrong in played.wrong.iter().take(TOLD) {
            told += &format!("  {wrong}\n");
        }
    }
    assert!(sick.is_empty(), "{} of {} cells did not keep the promise:\n{told}", sick.len(), played.len());
}
