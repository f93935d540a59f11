//! `GET /v1/models`: what the live backends list between them, and the aliases.
//!
//! One backend that is down changes nothing but its own entries. While no backend's list is known the
//! request is passed on like any other.

use std::collections::HashSet;

use bytes::Bytes;
use http::{HeaderValue, Response, header};
use serde_json::{Value, json};

use crate::clock;
use crate::policy::health::{Administrative, Standing};
use crate::pool::{Pool, Snapshot};
use crate::proxy::headers::X_REQUEST_ID;
use crate::proxy::ledger::Ledger;
use crate::proxy::relay::AnswerBody;
use crate::telemetry::metrics::End;

/// The union, if any live backend's list is known.
pub(super) fn union(snapshot: &Snapshot) -> Option<Bytes> {
    let mut seen = HashSet::new();
    let mut data: Vec<Value> = Vec::new();
    let mut known = false;
    for pool in &snapshot.pools {
        for listed in live(pool) {
            known = true;
            for (id, entry) in listed.ids.iter().zip(&listed.entries) {
                if seen.insert(id.clone()) {
                    data.push(entry.clone());
                }
            }
        }
        for (alias, model) in &pool.config.aliases {
            let target = data.iter().find(|entry| entry["id"] == **model).cloned();
            if known && seen.insert(alias.clone()) {
                let mut entry = target.unwrap_or_else(|| json!({"object": "model", "owned_by": "evergate"}));
                entry["id"] = alias.clone().into();
                data.push(entry);
            }
        }
    }
    known.then(|| json!({"object": "list", "data": data}).to_string().into())
}

/// The union as an answer.
pub(super) fn answer(body: Bytes, mut ledger: Ledger) -> Response<AnswerBody> {
    let mut response = Response::new(());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response.headers_mut().insert(X_REQUEST_ID, ledger.id.clone());
    ledger.answered(response.status());
    ledger.ended(End::Complete);
    response.map(|()| AnswerBody::whole(body, None, ledger))
}

/// Every name a client may ask for, sorted: for errors.
pub(super) fn known(snapshot: &Snapshot, configured: &[String]) -> Vec<String> {
    let listed = snapshot.pools.iter().flat_map(|pool| live(pool));
    let mut names: Vec<String> = listed.flat_map(|listed| listed.ids.clone()).collect();
    names.extend_from_slice(configured);
    names.sort_unstable();
    names.dedup();
    names
}

fn live(pool: &Pool) -> Vec<std::sync::Arc<crate::pool::Listed>> {
    let now = clock::now();
    let up = |i: usize| !matches!(pool.standing(i, None, now), Standing::Out { .. });
    let members = pool.members.iter().enumerate();
    members
        .filter(|(i, member)| member.backend.admin() != Administrative::Disabled && up(*i))
        .filter_map(|(_, member)| member.backend.listed())
        .collect()
}
