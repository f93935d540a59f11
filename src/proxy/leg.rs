//! One pool as an exchange asks it: what differs between the routed pool and one it falls back to.
//!
//! A leg has its own pool, and with it credentials, clocks, retry policy and budget; its own name of the
//! model, in body or path; its own end of time. The client's bytes are copied only where a name changes.
//! Which leg comes next is decided by `policy::fallback`; when to ask for one is the exchange's to say.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue};

use crate::clock;
use crate::policy::Moment;
use crate::policy::balance::{AffinityKey, stable_hash};
use crate::policy::fallback::Fallback;
use crate::policy::json;
use crate::policy::retry::{Replay, RetryPolicy};
use crate::pool::Pool;
use crate::proxy::admit::{self, Asked};
use crate::proxy::replay_body::ReplayBody;

/// One pool as an exchange asks it.
#[derive(Clone)]
pub(super) struct Leg {
    /// Its parameters and backends; of the latest generation that has it.
    pub(super) pool: Arc<Pool>,
    /// The pool's, with what the route overrides.
    pub(super) policy: RetryPolicy,
    /// As sent, but for a renamed model.
    pub(super) path: PathAndQuery,
    /// The model as its backends know it, where it was read.
    pub(super) model: Option<String>,
    /// The body for this pool, where it is another than the routed one's.
    pub(super) body: Option<Bytes>,
    /// Hash of what makes the request alike to others, where the pool's balance looks at that.
    pub(super) affinity: Option<u64>,
    /// End of the whole exchange, and of all this pool may take.
    pub(super) total: Option<Moment>,
    /// The pool is not the routed one.
    pub(super) is_fallback: bool,
}

impl Leg {
    /// The leg through `pool` instead of `routed`: `entry` named it. `client_model` is what the client asked
    /// for. None where the request cannot be given the name it needs there.
    pub(super) fn fallback(
        entry: &Fallback,
        pool: &Arc<Pool>,
        routed: &Self,
        asked: &Asked,
        body: &ReplayBody,
        client_model: Option<&str>,
    ) -> Option<Self> {
        let alias = || {
            let client = client_model?;
            pool.config.aliases.iter().find(|(alias, _)| alias == client).map(|(_, model)| model)
        };
        let wanted = entry.model.as_ref().or_else(alias).filter(|name| Some(*name) != routed.model.as_ref());
        let (mut path, mut renamed) = (routed.path.clone(), None);
        if let Some(name) = wanted {
            match (&asked.model_span, body.bytes(), admit::model_in_path(asked.endpoint, path.path())) {
                (Some(span), Some(bytes), _) => renamed = Some(renamed_body(bytes, span.clone(), name)),
                (None, _, Some(model)) => path = admit::renamed_target(&path, model, name)?,
                _ => return None,
            }
        }
        let bytes = renamed.as_ref().or(body.bytes()).map_or(&[][..], |bytes| bytes);
        let own_total = pool.config.clocks.total.map(|total| clock::now() + total);
        Some(Self {
            policy: policy(pool, asked.replay),
            model: wanted.cloned().or_else(|| routed.model.clone()),
            affinity: affinity(pool, &asked.headers, bytes),
            total: own_total.into_iter().chain(asked.total).min(),
            pool: pool.clone(),
            path,
            body: renamed,
            is_fallback: true,
        })
    }

    /// The pool's name for `x-evergate-pool`, where the client does not expect it.
    pub(super) fn named(&self) -> Option<HeaderValue> {
        let name = || HeaderValue::from_str(&self.pool.config.name).ok();
        if self.is_fallback { name() } else { None }
    }
}

/// How `pool` retries, with what the route overrides.
pub(super) fn policy(pool: &Pool, replay: Option<Replay>) -> RetryPolicy {
    let mut policy = pool.config.retry.clone();
    policy.replay = replay.unwrap_or(policy.replay);
    policy
}

/// The one documented edit of a client's body, by splicing: everything else stays as it was written.
pub(super) fn renamed_body(body: &Bytes, span: Range<usize>, name: &str) -> Bytes {
    json::splice(body, span, literal(name).into()).concat().into()
}

/// `name` as JSON writes it.
pub(super) fn literal(name: &str) -> Vec<u8> {
    let mut literal = Vec::with_capacity(name.len() + 2);
    json::write_string(&mut literal, name);
    literal
}

/// What makes this request alike to others, where the pool's balance looks at that.
pub(super) fn affinity(pool: &Pool, headers: &HeaderMap, body: &[u8]) -> Option<u64> {
    match pool.config.balance.affinity_key()? {
        AffinityKey::Header(name) => headers.get(name).map(|value| stable_hash(value.as_bytes())),
        AffinityKey::PromptPrefix { bytes } => {
            let mut prompt: &[u8] = &[];
            // The last member of a name counts; a body that is no object has no prompt.
            let _ = json::scan_top_level(body, |name, value| {
                if matches!(name, b"messages" | b"prompt" | b"input" | b"inputs" | b"text_input") {
                    prompt = value.raw();
                }
                ControlFlow::Continue(())
            });
            (!prompt.is_empty()).then(|| stable_hash(&prompt[..prompt.len().min(*bytes)]))
        }
    }
}
