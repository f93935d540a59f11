//! The paths of the operator's listener and their answers.
//!
//! All JSON but `/metrics`. An error says what is wrong and what exists; nothing here decides, it asks
//! `reload` and `pool`.

use std::sync::Arc;
use std::time::Duration;

use axum::error_handling::HandleErrorLayer;
use axum::extract::{Path, Query, Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{BoxError, Extension, Json, Router};
use http::header::{CACHE_CONTROL, CONTENT_TYPE, WWW_AUTHENTICATE};
use http::{HeaderValue, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use tower::ServiceBuilder;

use super::access::{self, Refusal};
use super::status::Status;
use super::{AdminState, Peer};
use crate::policy::health::Administrative;
use crate::reload::{NoFile, Trigger};
use crate::telemetry::events::{AdminChange, EVENTS_KEPT};
use crate::telemetry::metrics;

/// What there is, for those who asked for something else.
const PATHS: [&str; 8] = [
    "GET /live",
    "GET /ready",
    "GET /metrics",
    "GET /status",
    "POST /reload",
    "POST /backends/{pool}/{backend}/enable",
    "POST /backends/{pool}/{backend}/drain",
    "POST /backends/{pool}/{backend}/disable",
];

/// For any answer. A reload with a slow file system is the longest.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Events in a status that did not say how many.
const EVENTS_DEFAULT: usize = 50;

/// What handlers share: the state, and whether this listener is for this machine only.
#[derive(Clone)]
struct Desk {
    state: Arc<AdminState>,
    loopback: bool,
}

pub(super) fn router(state: Arc<AdminState>, loopback: bool) -> Router {
    let desk = Desk { state, loopback };
    let limits = ServiceBuilder::new()
        .layer(HandleErrorLayer::new(|_too_long: BoxError| async {
            problem(StatusCode::GATEWAY_TIMEOUT, "too_slow", &format!("no answer within {REQUEST_TIMEOUT:?}"))
        }))
        .timeout(REQUEST_TIMEOUT);
    Router::new()
        .route("/live", get(|| async { Json(json!({ "live": true })) }))
        .route("/ready", get(ready))
        .route("/metrics", get(render_metrics))
        .route("/status", get(status))
        .route("/reload", post(reload))
        .route("/backends/{pool}/{backend}/{action}", post(set_admin))
        .fallback(|| async { elsewhere(StatusCode::NOT_FOUND, "not_found", "there is nothing here") })
        .method_not_allowed_fallback(|| async {
            elsewhere(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "not by this method")
        })
        .layer(from_fn_with_state(desk.clone(), guard))
        .layer(limits)
        .with_state(desk)
}

/// Lets in who may.
async fn guard(State(desk): State<Desk>, request: Request, next: Next) -> Response {
    let verdict = {
        let snapshot = desk.state.directory.look();
        let token = snapshot.config.admin.token.as_ref();
        access::check(request.method(), request.headers(), desk.loopback, token)
    };
    let mut response = match verdict {
        Ok(()) => next.run(request).await,
        Err(refusal) => refused(refusal),
    };
    response.headers_mut().entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

#[derive(Deserialize)]
struct ReadyQuery {
    pools: Option<String>,
}

/// Whether a client that comes now is served: listening, not draining; with `?pools=1` every pool too.
async fn ready(State(desk): State<Desk>, Query(query): Query<ReadyQuery>) -> Response {
    let state = &desk.state;
    let mut dry = Vec::new();
    let mut pools = Vec::new();
    for pool in &state.directory.snapshot().pools {
        let (name, eligible) = (&pool.config.name, pool.eligible());
        if eligible == 0 {
            dry.push(name.clone());
        }
        pools.push(json!({ "name": name, "eligible": eligible, "members": pool.members.len() }));
    }
    let with_pools = query.pools.is_some_and(|asked| asked != "0");
    let reason = if state.draining.is_draining() {
        Some("draining".to_owned())
    } else if (state.listeners)().is_empty() {
        Some("no listener accepts connections".to_owned())
    } else if with_pools && !dry.is_empty() {
        Some(format!("no eligible backend in: {}", dry.join(", ")))
    } else {
        None
    };
    let code = if reason.is_none() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(json!({ "ready": reason.is_none(), "reason": reason, "pools": pools }))).into_response()
}

async fn render_metrics(State(desk): State<Desk>) -> impl IntoResponse {
    ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], desk.state.directory.telemetry().metrics.render())
}

#[derive(Deserialize)]
struct StatusQuery {
    events: Option<usize>,
}

async fn status(State(desk): State<Desk>, Query(query): Query<StatusQuery>) -> Json<Status> {
    Json(Status::of(&desk.state, query.events.unwrap_or(EVENTS_DEFAULT).min(EVENTS_KEPT)))
}

async fn reload(State(desk): State<Desk>) -> Response {
    if desk.state.draining.is_draining() {
        return problem(
            StatusCode::SERVICE_UNAVAILABLE,
            "draining",
            "the process is ending: nothing to reload",
        );
    }
    match desk.state.reloader.reload(Trigger::Request).await {
        Ok(report) => {
            let code = if report.is_refused() { StatusCode::UNPROCESSABLE_ENTITY } else { StatusCode::OK };
            (code, Json(&*report)).into_response()
        }
        Err(NoFile) => problem(
            StatusCode::CONFLICT,
            "no_file",
            "evergate was started by flags: there is no file to read again",
        ),
    }
}

async fn set_admin(
    State(desk): State<Desk>,
    Extension(Peer(peer)): Extension<Peer>,
    Path((pool, backend, action)): Path<(String, String, String)>,
) -> Response {
    let wanted = match action.as_str() {
        "enable" => Administrative::Enabled,
        "drain" => Administrative::Draining,
        "disable" => Administrative::Disabled,
        _ => return elsewhere(StatusCode::NOT_FOUND, "not_found", "the actions are enable, drain, disable"),
    };
    let snapshot = desk.state.directory.snapshot();
    let Some(pool) = snapshot.pool(&pool) else {
        let names: Vec<&str> = snapshot.pools.iter().map(|pool| pool.config.name.as_str()).collect();
        return unknown("pool", &pool, &names);
    };
    let Some(index) = pool.members.iter().position(|member| member.params.name == backend) else {
        let names: Vec<&str> = pool.members.iter().map(|member| member.params.name.as_str()).collect();
        return unknown("backend", &backend, &names);
    };
    let record = &pool.members[index].backend;
    let was = record.admin();
    if was != wanted {
        pool.set_admin(index, wanted);
        let by = format_args!("{peer}");
        AdminChange { at: &record.metrics, state: wanted.name(), by: &by }
            .emit(desk.state.directory.telemetry());
    }
    let answer = json!({
        "pool": pool.config.name,
        "backend": backend,
        "admin": wanted.name(),
        "was": was.name(),
        "in_flight": record.in_flight(),
    });
    Json(answer).into_response()
}

fn unknown(what: &str, name: &str, existing: &[&str]) -> Response {
    let text = format!("there is no {what} \"{name}\"; there is: {}", existing.join(", "));
    let code = if what == "pool" { "unknown_pool" } else { "unknown_backend" };
    body(StatusCode::NOT_FOUND, code, &text, json!({ "existing": existing }))
}

fn elsewhere(status: StatusCode, code: &str, text: &str) -> Response {
    body(status, code, text, json!({ "paths": PATHS }))
}

fn refused(refusal: Refusal) -> Response {
    let (code, text) = refusal.describe();
    match refusal {
        Refusal::WrongToken => {
            let mut response = problem(StatusCode::UNAUTHORIZED, code, text);
            response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            response
        }
        Refusal::ForeignHost | Refusal::CrossSite | Refusal::TokenNotConfigured => {
            problem(StatusCode::FORBIDDEN, code, text)
        }
    }
}

fn problem(status: StatusCode, code: &str, text: &str) -> Response {
    body(status, code, text, json!({}))
}

/// `{"error": {"code", "message", …}}`: one shape for every failure.
fn body(status: StatusCode, code: &str, text: &str, more: Value) -> Response {
    let mut error = json!({ "code": code, "message": text });
    if let (Value::Object(error), Value::Object(more)) = (&mut error, more) {
        error.extend(more);
    }
    (status, Json(json!({ "error": error }))).into_response()
}
