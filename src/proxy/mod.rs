//! The journey of one request: admit → route → exchange → attempt → relay.
//!
//! Read downward: `admit` reads the head, `replay_body` takes the body in, `route` names the pool, `exchange`
//! loops over attempts, `attempt` tries one backend up to the gate, `relay` and `sse_relay` pass the answer
//! on. `respond` is where failures get their words.

mod admit;
mod attempt;
mod client;
mod exchange;
mod headers;
mod hedge;
mod inquest;
mod ledger;
mod leg;
mod models;
mod opinion;
mod relay;
mod replay_body;
mod respond;
mod resume;
mod sse_relay;
mod token_stream;
mod tunnel;
mod watch;
mod worker;

pub use client::{Client, HeadDefect};
pub use relay::{AnswerBody, BrokenAnswer};
pub use worker::{Memory, Worker};

use std::sync::Arc;
use std::time::Duration;

use http::{Method, Request, Response, header, request};
use http_body::Body;
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;

use crate::policy::dialect::{Dialect, Endpoint, request_facts};
use crate::policy::fallback::FallbackCause;
use crate::policy::route::{Head, NoRoute, Routed};
use crate::pool::{Class, Snapshot, Wanted};
use crate::proxy::admit::Asked;
use crate::proxy::exchange::Exchange;
use crate::proxy::ledger::Ledger;
use crate::proxy::leg::Leg;
use crate::proxy::replay_body::{Bounds, ReplayBody};
use crate::proxy::respond::{Refusal, refuse};

impl Worker {
    /// Answers one request. Dropping the future or the answer's body ends the work at the backend.
    pub async fn answer(
        self: Arc<Self>,
        client: Arc<Client>,
        request: Request<Incoming>,
        defect: Option<HeadDefect>,
    ) -> Response<AnswerBody> {
        let (mut head, incoming) = request.into_parts();
        let snapshot = self.directory.snapshot();
        let endpoint = Endpoint::of(&head.method, head.uri.path());
        let dialect = admit::dialect_of(endpoint, head.uri.path(), &head.headers);
        let mut ledger = self.open(&head, &client, endpoint);
        if let Err(refusal) =
            admit::check(&head, defect, &snapshot.config.limits, incoming.size_hint().exact())
        {
            return refuse(ledger, dialect, &refusal);
        }
        if lists_models(&head)
            && let Some(list) = models::union(&snapshot)
        {
            return models::answer(list, ledger);
        }
        match self.prepare(&snapshot, &mut head, incoming, &client, (endpoint, dialect), &mut ledger).await {
            Ok((asked, body, leg)) => {
                let switch = head.extensions.remove::<OnUpgrade>().filter(|_| asked.upgrade.is_some());
                Exchange::new(asked, body, ledger, leg, switch).run().await
            }
            Err(refusal) => refuse(ledger, dialect, &refusal),
        }
    }

    fn open(self: &Arc<Self>, head: &request::Parts, client: &Client, endpoint: Endpoint) -> Ledger {
        let id = self.with_rng(|rng| headers::request_id(&head.headers, rng));
        let ip = headers::client_ip(&head.headers, client);
        Ledger::open(self, id, ip, head.method.clone(), admit::target(head), endpoint)
    }

    /// Takes the body in and finds out where the request goes and what it is.
    async fn prepare(
        self: &Arc<Self>,
        snapshot: &Snapshot,
        head: &mut request::Parts,
        incoming: Incoming,
        client: &Client,
        (endpoint, dialect): (Endpoint, Dialect),
        ledger: &mut Ledger,
    ) -> Result<(Asked, ReplayBody, Leg), Refusal> {
        let config = &snapshot.config;
        if head.headers.contains_key(header::EXPECT) && !incoming.is_end_stream() {
            self.stand_by(snapshot, head).await?;
        }
        let bounds = Bounds {
            memory: &self.memory,
            limits: &config.limits,
            idle: config.client_clocks.upload_idle,
            keep: endpoint.is_inference() && dialect != Dialect::Grpc,
        };
        let mut body = ReplayBody::receive(incoming, &bounds, &self.alarms).await?;
        if body.was_shed() {
            self.telemetry().metrics.count_limit("memory_max");
            // Unread, it would go anywhere.
            if snapshot.routes.needs_model(&view(head)) {
                return Err(Refusal::Memory);
            }
        }
        ledger.bytes_in = body.bytes().map_or(0, |bytes| bytes.len() as u64);

        let readable = body.bytes().filter(|_| !head.headers.contains_key(header::CONTENT_ENCODING)).cloned();
        let bytes = readable.unwrap_or_default();
        // What is no JSON object the engine refuses in its own words.
        let facts = request_facts(endpoint, &bytes).unwrap_or_default();
        let in_path = admit::model_in_path(endpoint, head.uri.path());
        let decoded = in_path.map(admit::decoded);
        let named = facts.model.as_deref().or(decoded.as_deref());
        let routed = route(snapshot, head, named)?;
        let pool = &snapshot.pools[routed.pool];
        ledger.routed(pool, named);
        let mut model_span = facts.model_span.clone();
        if let (Some(rename), Some(span)) = (routed.rename, &mut model_span) {
            body.replace(leg::renamed_body(&bytes, span.clone(), rename));
            span.end = span.start + leg::literal(rename).len();
        }
        let mut path = admit::target(head);
        if let (Some(rename), None, Some(model)) = (routed.rename, &facts.model, in_path) {
            path = admit::renamed_target(&path, model, rename).unwrap_or(path);
        }
        let rule = routed.rule.map(|rule| &config.routes[rule]);
        let replay = rule.and_then(|rule| rule.replay);
        let total = rule.and_then(|rule| rule.total).or(pool.config.clocks.total);
        let total = total.map(|total| ledger.started + total);
        let mut nature = admit::nature(head, endpoint);
        nature.stateful = facts.stateful.is_some();
        let leg = Leg {
            pool: pool.clone(),
            policy: leg::policy(pool, replay),
            path,
            model: routed.rename.or(named).map(str::to_owned),
            body: None,
            affinity: leg::affinity(pool, &head.headers, &bytes),
            total,
            is_fallback: false,
        };
        let upgrade = headers::upgrade(head);
        let (fields, own) = admit::outgoing_headers(head, endpoint, client, &ledger.id);
        let asked = Asked {
            id: ledger.id.clone(),
            endpoint,
            dialect,
            method: head.method.clone(),
            upgrade,
            model_span,
            stream: facts.stream,
            choices: facts.choices.max(1),
            nature,
            class: Class::of(endpoint, facts.stream),
            prompt_bytes: ledger.bytes_in,
            uploads: body.is_streamed(),
            total,
            replay,
            priority: rule.and_then(|rule| rule.priority),
            limits: config.limits.clone(),
            headers: fields,
            own,
        };
        Ok((asked, body, leg))
    }

    /// `Expect: 100-continue` is answered (by reading the body) only when a backend connection stands.
    async fn stand_by(&self, snapshot: &Snapshot, head: &request::Parts) -> Result<(), Refusal> {
        let Ok(routed) = route(snapshot, head, None) else { return Ok(()) };
        let wanted = Wanted {
            tried: &[],
            class: Class::of(Endpoint::Other, false),
            model: None,
            affinity: None,
            prompt_bytes: 0,
            only: None,
            proven_since: None,
            replayable: false,
            paid: false,
        };
        if snapshot.routes.needs_model(&view(head)) {
            // Which pool it will be only the body says: a connection to any is promise enough.
            for pool in &snapshot.pools {
                if exchange::stand_by(self, pool, &wanted, Duration::ZERO).await.is_ok() {
                    return Ok(());
                }
            }
        }
        let pool = &snapshot.pools[routed.pool];
        for other in
            pool.config.fallbacks.iter().filter(|entry| entry.on.contains(&FallbackCause::Unavailable))
        {
            // The body will be taken at once by the one or the other.
            for pool in [Some(pool), snapshot.pool(&other.pool)].into_iter().flatten() {
                if exchange::stand_by(self, pool, &wanted, Duration::ZERO).await.is_ok() {
                    return Ok(());
                }
            }
        }
        exchange::stand_by(self, pool, &wanted, pool.config.retry.wait_max).await
    }
}

fn lists_models(head: &request::Parts) -> bool {
    head.method == Method::GET && matches!(head.uri.path(), "/v1/models" | "/models")
}

fn route<'s>(
    snapshot: &'s Snapshot,
    head: &request::Parts,
    model: Option<&str>,
) -> Result<Routed<'s>, Refusal> {
    let listed = |pool: usize, model: &str| snapshot.pools[pool].lists(model);
    snapshot.routes.route(&view(head), model, &listed).map_err(|none| match none {
        NoRoute::UnknownModel { models } => Refusal::UnknownModel {
            model: model.unwrap_or_default().to_owned(),
            known: models::known(snapshot, models),
        },
        NoRoute::NoPool => Refusal::NoRoute,
    })
}

fn view(head: &request::Parts) -> Head<'_> {
    let host = headers::host(&head.headers, &head.uri);
    Head { path: head.uri.path(), host, headers: &head.headers }
}

#[cfg(test)]
mod sizes {
    use super::*;

    fn of<A, B, C, D, R>(_: fn(A, B, C, D) -> R) -> usize {
        size_of::<R>()
    }

    fn of_one<A, R>(_: fn(A) -> R) -> usize {
        size_of::<R>()
    }

    #[test]
    fn what_is_moved_for_each_request_stays_small() {
        let sizes = (of(Worker::answer), of_one(Exchange::run));
        assert!(sizes.0 <= 2928 && sizes.1 <= 744, "{sizes:?}");
    }
}
