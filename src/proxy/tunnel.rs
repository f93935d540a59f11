//! A connection that was switched to another protocol (WebSocket): bytes both ways until one side ends.

use http::{HeaderValue, Response, header, response};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::copy_bidirectional;

use crate::policy::retry::{Cause, Phase};
use crate::proxy::relay::{AnswerBody, Serving};
use crate::telemetry::metrics::End;
use crate::upstream::InBody;

/// Answers 101 and joins both connections as soon as hyper lets go of them.
pub(super) fn start(
    mut head: response::Parts,
    switch: Option<OnUpgrade>,
    upgraded: OnUpgrade,
    body: InBody,
    mut serving: Serving,
) -> Response<AnswerBody> {
    head.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    let switch = switch.expect("an upgrade is only asked for on behalf of a client that asked for one");
    tokio::spawn(async move {
        let joined = async {
            let ours = switch.await?;
            let theirs = upgraded.await?;
            // The engine's connection is the upgraded one now.
            drop(body);
            Ok::<_, hyper::Error>((TokioIo::new(ours), TokioIo::new(theirs)))
        };
        let Ok((mut ours, mut theirs)) = joined.await else {
            serving.broke(Phase::Head, Cause::Closed, End::Cut);
            return;
        };
        if let Ok((_, out)) = copy_bidirectional(&mut ours, &mut theirs).await {
            serving.ledger.sent(usize::try_from(out).unwrap_or(usize::MAX));
        }
        // Who ended it, and whether that was a failure, the protocol inside knows.
        serving.complete();
    });
    Response::from_parts(head, AnswerBody::nothing())
}
