//! The canary of a backend in quarantine: what lets it be believed again (F22).
//!
//! A greedy question, long enough to show what the offences showed, in the words and for the model of the latest of
//! them. It passes if the answer does not repeat itself, and begins as a peer's answer to the same question does,
//! where a peer can be asked. When the next one is due, and what follows, is `policy::health::Quarantine`'s to say.

use std::time::Duration;

use http::Method;

use crate::clock;
use crate::policy::degenerate::run_in;
use crate::policy::dialect::{Endpoint, Question, answer_text, check_reply};
use crate::policy::health::{Administrative, Standing};
use crate::pool::{Canary, Place, Pool};
use crate::probe::ask::{self, Body};

/// Its answer is long, certain from the first token on, and not repetitive.
const PROMPT: &str = "Count from one to thirty in digits, separated by commas.";
/// Long enough for a fault that shows itself late in an answer.
const TOKENS_MAX: u32 = 64;
/// For the whole answer.
const DEADLINE: Duration = Duration::from_secs(30);
/// How much of an answer is read.
const BODY_BYTES_MAX: usize = 64 * 1024;
/// So many characters must be a peer's. No more: numerical noise may make healthy replicas differ further on.
const COMPARED_CHARS: usize = 16;

/// Asks the backend at `place` whenever it is in quarantine, until it is removed.
pub(super) async fn sing_for_good(place: &Place) {
    while let Some((pool, i)) = place.now() {
        let Some((record, canary, due)) = pool.next_canary(i) else {
            drop(pool);
            place.backend.canary_wanted().await;
            continue;
        };
        let now = clock::now();
        if due > now {
            drop(pool);
            tokio::select! {
                () = tokio::time::sleep(due.since(now)) => {}
                () = place.backend.canary_wanted() => {}
            }
            continue;
        }
        let passed = sings(&pool, i, &canary).await;
        drop(pool);
        // A reload may have come meanwhile.
        if let Some((pool, i)) = place.now() {
            pool.canary_told(i, &record, passed);
        }
    }
}

/// Whether member `i` answers as it should.
async fn sings(pool: &Pool, i: usize, canary: &Canary) -> bool {
    let Some(text) = answer(pool, i, canary).await else { return false };
    if run_in(text.as_bytes()).is_some() {
        return false;
    }
    let peers = (0..pool.members.len()).filter(|&peer| peer != i && is_witness(pool, peer, canary));
    for peer in peers {
        if let Some(theirs) = answer(pool, peer, canary).await {
            return beginning(&text) == beginning(&theirs);
        }
    }
    true
}

fn is_witness(pool: &Pool, i: usize, canary: &Canary) -> bool {
    let model = pool.judged_model(canary.model.as_deref());
    pool.members[i].backend.admin() == Administrative::Enabled
        && matches!(pool.standing(i, model, clock::now()), Standing::Eligible { .. })
}

fn beginning(text: &str) -> Vec<char> {
    text.trim_start().chars().take(COMPARED_CHARS).collect()
}

/// The text of its answer; none if there is no good one.
async fn answer(pool: &Pool, i: usize, canary: &Canary) -> Option<String> {
    let question = Question {
        endpoint: Endpoint::of(&Method::POST, &canary.path),
        model: canary.model.as_deref(),
        prompt: PROMPT,
        tokens_max: TOKENS_MAX,
    };
    let member = &pool.members[i];
    let answered = ask::post(member, &canary.path, question.body(), BODY_BYTES_MAX, DEADLINE).await.ok()?;
    let Body::Whole(body) = answered.body else { return None };
    check_reply(question.endpoint, answered.status, &body, None).ok()?;
    answer_text(question.endpoint, &body)
}
