//! Going on with a broken stream at another backend: what is kept of an exchange for it, and the search.
//!
//! How to go on is decided by `policy::resume`, whom to ask by the pool, whether it can be afforded by the budget.
//! Here it is done, and nothing is written to the client: the relay commits what the splice lets through. One
//! leg at a time; dropping the search closes its connection.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use smallvec::SmallVec;

use crate::clock;
use crate::policy::dialect::{Engine, ErrorClass, EventFacts};
use crate::policy::health::{Observation, Standing};
use crate::policy::moves::MOVES_MAX;
use crate::policy::poison;
use crate::policy::resume::{Peers, Plan, Refused, Splice, Strategy};
use crate::policy::retry::{Cause, Facts, Phase, Verdict, verdict};
use crate::pool::{About, BackendId, Canary, Choice, Nobody, Origin, Pool, Wanted};
use crate::proxy::admit::Asked;
use crate::proxy::attempt::{Answer, Attempt, Outcome};
use crate::proxy::hedge::Tried;
use crate::proxy::inquest::Inquest;
use crate::proxy::ledger::Entry;
use crate::proxy::leg::Leg;
use crate::proxy::opinion;
use crate::proxy::replay_body::ReplayBody;
use crate::proxy::watch::Watch;
use crate::proxy::worker::{Held, Worker};
use crate::telemetry::events::RequestKills;
use crate::telemetry::metrics::AttemptOutcome;
use crate::upstream::{OutBody, Want};

/// Rather a backend that has shown life within this.
const LIVELY: Duration = Duration::from_secs(2);

/// Between two looks for a backend, while none can take the stream.
const LOOK: Duration = Duration::from_millis(50);

/// Searches for one stream, whatever they come to: a request that breaks five legs is not worth a sixth.
const SEARCHES_MAX: u32 = 4;

/// What is needed to go on with one stream.
pub(super) struct Resumer {
    /// What the client has, over all legs.
    pub(super) splice: Splice,
    request: Arc<Request>,
    /// Where it began.
    origin: Option<Arc<Origin>>,
    /// Backends that broke it.
    broke: SmallVec<[BackendId; 4]>,
    /// Whether its replicas died of it; away while a search looks.
    inquest: Inquest,
    searches: u32,
    /// The journal's share of the memory bound.
    held: Held,
    plan: Option<Plan>,
    search: Option<Pin<Box<dyn Future<Output = Found> + Send>>>,
    /// The search is for a leg beside one that still speaks.
    beside: bool,
    /// It has the inquest.
    lent: bool,
    /// Such searches so far.
    moves: u8,
}

/// The request, as every leg sends it.
struct Request {
    worker: Arc<Worker>,
    asked: Asked,
    leg: Leg,
    body: Bytes,
    /// Its share of the memory bound.
    _kept: ReplayBody,
}

/// What came of a search.
struct Found {
    inquest: Inquest,
    /// The request kills replicas: no other is to have it.
    kills: bool,
    /// A stream whose first token is here.
    leg: Option<Box<Tried>>,
    /// Attempts that came to nothing, as they are written down.
    failed: SmallVec<[Entry; 2]>,
    /// The engine refused what was made of its request.
    refused: bool,
}

/// What a search begins with.
struct Looked {
    inquest: Inquest,
    /// A second backend may have died of the request: look before a third has it.
    suspicious: bool,
    /// How long may be waited for a backend that has room.
    wait: Duration,
}

/// What came of asking a peer for a second opinion.
pub(super) struct Heard {
    /// A stream whose first token is here.
    pub(super) leg: Option<Box<Tried>>,
    /// An attempt that came to nothing, as it is written down.
    pub(super) failed: Option<Entry>,
}

/// A peer that is being asked.
pub(super) type Asking = Pin<Box<dyn Future<Output = Heard> + Send>>;

/// How the relay goes on.
pub(super) enum Next {
    /// With this leg.
    Leg(Box<Tried>),
    /// In another way, if there is one.
    OtherWay,
    /// Not at all: every replica that took it died of it.
    Kills,
    /// Not at all, for this reason.
    End(&'static str),
}

impl Resumer {
    /// For a stream that is about to begin; none where it cannot be resumed, which is counted.
    pub(super) fn arm(
        worker: &Arc<Worker>,
        asked: Asked,
        leg: Leg,
        body: Bytes,
        kept: ReplayBody,
        inquest: Inquest,
    ) -> Option<Box<Self>> {
        match Splice::arm(asked.endpoint, &body, &leg.pool.config.resume) {
            Ok(splice) => Some(Box::new(Self {
                splice,
                request: Arc::new(Request { worker: worker.clone(), asked, leg, body, _kept: kept }),
                origin: None,
                broke: SmallVec::new(),
                inquest,
                searches: 0,
                held: Held::default(),
                plan: None,
                search: None,
                beside: false,
                lent: false,
                moves: 0,
            })),
            Err(reason) => {
                leg.pool.state.metrics.count_not_armed(reason.name());
                None
            }
        }
    }

    /// The first leg is at `choice`; `unseen`: it was asked for ids without the client's knowledge.
    pub(super) fn begins_at(&mut self, choice: &Choice, unseen: Option<Engine>) {
        if let Some(engine) = unseen.or_else(|| choice.pool.gives_ids(choice.index)) {
            self.splice.tells_ids(engine, unseen.is_some());
        }
        let origin = choice.pool.origin(choice.index, self.request.leg.model.as_deref());
        self.origin = Some(Arc::new(origin));
    }

    /// The client has all tokens that it asked for, and only the end is missing: that is `out`.
    pub(super) fn end_at_limit(&mut self) -> Option<Bytes> {
        let mut out = Vec::new();
        self.splice.end_at_limit(&self.request.body, &mut out).then(|| out.into())
    }

    /// The client gets this event of the first leg; false once there is no memory left for what it has.
    pub(super) fn observe(&mut self, data: &[u8], facts: &EventFacts) -> bool {
        let before = self.splice.held();
        self.splice.observe(data, facts);
        let grown = self.splice.held().saturating_sub(before) as u64;
        grown == 0 || self.held.grow(&self.request.worker.memory, grown, self.request.asked.limits.memory_max)
    }

    /// The leg at `broken` broke off for `cause`, with these facts where it is its backend's doing: begins to search
    /// for another. So many `attempts` were made before.
    ///
    /// # Errors
    /// Why not.
    pub(super) fn search(
        &mut self,
        cause: Cause,
        broken: &Choice,
        facts: Option<&Facts>,
        attempts: u8,
    ) -> Result<(), &'static str> {
        let suspicious = facts.is_some_and(|facts| self.inquest.opens(broken, facts));
        if !is_the_backends(cause) {
            return Err("not_the_backends");
        }
        if self.searches >= SEARCHES_MAX {
            return Err(Refused::ResumesExhausted.name());
        }
        let Request { leg, body, .. } = &*self.request;
        self.broke.push(broken.backend().id);
        let plan = self.splice.plan(self.peers(&self.broke), body).map_err(|refused| refused.name())?;
        if !leg.pool.state.may_retry(&leg.policy, self.searches == 0) {
            return Err("budget");
        }
        self.searches += 1;
        let looked =
            Looked { inquest: std::mem::take(&mut self.inquest), suspicious, wait: leg.policy.wait_max };
        (self.beside, self.lent) = (false, true);
        self.look(plan, looked, self.broke.clone(), attempts);
        Ok(())
    }

    /// The leg at `left` still speaks, or may: begins to search for another to follow it. Whoever must not add to
    /// what the client has until that is found, or given up, is told so by `true`.
    ///
    /// # Errors
    /// Why not.
    pub(super) fn search_beside(
        &mut self,
        left: &Choice,
        attempts: u8,
        burst: bool,
    ) -> Result<bool, &'static str> {
        if self.moves >= MOVES_MAX {
            return Err("moves_exhausted");
        }
        let Request { worker, leg, body, .. } = &*self.request;
        // All of a pool that is gone are on their way out.
        if worker.directory.look().pool(&leg.pool.config.name).is_none() {
            return Err("no_backend");
        }
        let mut but = self.broke.clone();
        but.push(left.backend().id);
        let peers = self.peers(&but);
        let plan = self.splice.plan_beside(peers, body).map_err(|refused| refused.name())?;
        if !leg.pool.state.may_retry(&leg.policy, burst) {
            return Err("budget");
        }
        self.moves += 1;
        let needs_stillness = plan.needs_stillness();
        // Nobody waits for it: a move that finds no room now is put off. And it may be dropped at any time, so what is
        // known of deaths stays here.
        let looked = Looked { inquest: Inquest::default(), suspicious: false, wait: Duration::ZERO };
        (self.beside, self.lent) = (true, false);
        self.look(plan, looked, but, attempts);
        Ok(needs_stillness)
    }

    /// What can be asked of the others, as the pool is now.
    fn peers(&self, but: &[BackendId]) -> Peers {
        let Request { worker, leg, .. } = &*self.request;
        let snapshot = worker.directory.look();
        let pool = snapshot.pool(&leg.pool.config.name).unwrap_or(&leg.pool);
        self.origin.as_ref().map(|origin| pool.who_continues(origin, but)).unwrap_or_default()
    }

    fn look(&mut self, plan: Plan, looked: Looked, but: SmallVec<[BackendId; 4]>, attempts: u8) {
        let before = (but, u32::from(attempts), self.origin.clone());
        self.search = Some(Box::pin(search(self.request.clone(), plan.clone(), looked, before)));
        self.plan = Some(plan);
    }

    /// The leg at `broken` has broken while another was begun beside it: that one follows.
    pub(super) fn follows(&mut self, broken: &Choice, facts: Option<&Facts>) {
        if let Some(facts) = facts {
            self.inquest.opens(broken, facts);
        }
        self.searches += 1;
        self.left(broken);
    }

    /// The search, or the leg it found, is not wanted any more.
    pub(super) fn stop_search(&mut self) {
        self.search = None;
        self.splice.drop_beside();
    }

    /// The backend of `left` was left for the leg beside it.
    pub(super) fn left(&mut self, left: &Choice) {
        self.broke.push(left.backend().id);
        self.splice.prefer_beside();
    }

    /// What the search came to; attempts in vain are given to `write`.
    pub(super) fn poll_search(&mut self, cx: &mut Context<'_>, write: impl FnMut(Entry)) -> Poll<Next> {
        let (Some(search), Some(plan)) = (&mut self.search, &self.plan) else {
            return Poll::Ready(Next::End("no_search"));
        };
        let Poll::Ready(found) = search.as_mut().poll(cx) else { return Poll::Pending };
        self.search = None;
        if self.lent {
            self.inquest = found.inquest;
        }
        if found.kills {
            self.tell_killer();
            return Poll::Ready(Next::Kills);
        }
        found.failed.into_iter().for_each(write);
        Poll::Ready(match found.leg {
            Some(leg) => {
                match self.beside {
                    true => self.splice.begin_beside(plan),
                    false => self.splice.begin_leg(plan),
                }
                Next::Leg(leg)
            }
            // Those that can go on so are gone; any can generate it again.
            None if found.refused || plan.strategy != Strategy::Replay => {
                self.splice.withdraw(plan.strategy);
                Next::OtherWay
            }
            None => Next::End("no_backend"),
        })
    }

    /// It is remembered, and kept apart when it comes again.
    fn tell_killer(&self) {
        let Request { worker, asked, leg, body, .. } = &*self.request;
        let fingerprint = poison::fingerprint(leg.path.as_str(), body);
        for pool in self.inquest.pools().chain([&leg.pool]) {
            pool.state.ward.remember(fingerprint);
        }
        RequestKills {
            at: &leg.pool.state.metrics,
            request_id: asked.id.to_str().unwrap_or_default(),
            backends: &self.inquest.backends(),
        }
        .emit(worker.telemetry());
    }

    /// The leg under way is of no use.
    pub(super) fn abandon(&mut self) {
        if let Some(plan) = &self.plan {
            self.splice.withdraw(plan.strategy);
        }
    }

    /// Asks a peer of `backend` to go on from what is in `splice`; none where it cannot be done or afforded. One that
    /// was overruled lately (`wary`) breaks its streams as a dead one does, and draws on the same allowance. So many
    /// `attempts` were made before.
    pub(super) fn ask_peer(
        &mut self,
        splice: &mut Splice,
        backend: BackendId,
        wary: bool,
        attempts: u8,
    ) -> Option<(Plan, Asking)> {
        let Request { leg, body, .. } = &*self.request;
        let mut tried = self.broke.clone();
        tried.push(backend);
        let plan = splice.plan(self.peers(&tried), body).ok()?;
        if !leg.pool.state.may_ask(&leg.policy, wary) {
            return None;
        }
        if let Some(origin) = &self.origin {
            tried.extend(unfit(&leg.pool, origin, plan.strategy));
        }
        let hearing = hear(self.request.clone(), plan.clone(), tried, u32::from(attempts) + 1);
        Some((plan, Box::pin(hearing)))
    }

    /// The stream goes on with a peer's leg, of this `plan`, instead of what `backend` said.
    pub(super) fn adopt(&mut self, splice: Splice, plan: Plan, backend: BackendId) {
        self.splice = splice;
        self.plan = Some(plan);
        self.broke.push(backend);
    }

    /// What the canary of a backend that said something degenerate asks for.
    pub(super) fn canary(&self) -> Canary {
        let leg = &self.request.leg;
        Canary { path: leg.path.path().to_owned(), model: leg.model.clone() }
    }

    /// The name of the way taken last.
    pub(super) fn strategy(&self) -> &'static str {
        self.plan.as_ref().map_or("", |plan| plan.strategy.name())
    }
}

/// Whether another backend may do better.
fn is_the_backends(cause: Cause) -> bool {
    !matches!(
        cause,
        Cause::TotalTimeout
            | Cause::ClientGone
            | Cause::Upload
            | Cause::LocalResources
            | Cause::ErrorInside(ErrorClass::ClientFault(_))
    )
}

/// Asks one backend after the other until one speaks.
async fn search(
    request: Arc<Request>,
    plan: Plan,
    Looked { inquest, suspicious, wait }: Looked,
    (broke, attempts, origin): (SmallVec<[BackendId; 4]>, u32, Option<Arc<Origin>>),
) -> Found {
    let kills = suspicious && inquest.blames(&request.worker).await;
    let mut found = Found { inquest, kills, leg: None, failed: SmallVec::new(), refused: false };
    if kills {
        return found;
    }
    let mut leg = request.leg.clone();
    if let Some(path) = plan.path.and_then(|path| path.parse().ok()) {
        leg.path = path;
    }
    let strategy = plan.strategy;
    let body = plan.body.map_or_else(|| request.body.clone(), Bytes::from);
    let mut tried = broke;
    let origin = origin.as_deref().filter(|_| strategy != Strategy::Replay).map(|origin| (origin, strategy));
    for number in 1..=u32::from(leg.policy.attempts_max) {
        let Some(choice) = choose(&request, &mut leg, &mut tried, origin, wait).await else { break };
        tried.push(choice.backend().id);
        let mut watch = Watch::new(request.worker.alarms.alarm(), leg.total);
        let attempt = Attempt {
            worker: &request.worker,
            asked: &request.asked,
            leg: &leg,
            choice: &choice,
            number: attempts + number,
            want: Want::Any,
            movable: true,
            may_ask: false,
            watch: &mut watch,
        };
        let out = OutBody::Whole(Some(body.clone()));
        let outcome = unless_late(pin!(attempt.run(|| out)), &choice).await;
        watch.keep();
        let Some(outcome) = outcome else {
            request.worker.with_rng(|rng| choice.observe(About::Model, Observation::Silent, rng));
            found.failed.push(late_entry(&choice));
            continue;
        };
        let judged = verdict(&outcome.facts);
        let speaks = matches!(outcome.answer, Some(Answer::Tokens { .. }));
        teach(&request, &choice, &outcome, judged);
        if found.inquest.opens(&choice, &outcome.facts) && found.inquest.blames(&request.worker).await {
            found.kills = true;
            break;
        }
        if judged == Verdict::Success && speaks {
            found.leg = Some(Box::new(Tried { choice, outcome, watch }));
            break;
        }
        found.failed.push(failed_entry(&choice, &outcome, judged));
        // What it says of a request of our making is no word for the client.
        if matches!(judged, Verdict::Success | Verdict::Neutral) && outcome.facts.cause.is_answer() {
            if strategy != Strategy::Replay {
                choice.backend().refused_to_continue(strategy, leg.model.as_deref());
            }
            found.refused = true;
            break;
        }
    }
    found
}

/// Asks one peer, once: who cannot answer has no opinion.
async fn hear(request: Arc<Request>, plan: Plan, tried: SmallVec<[BackendId; 4]>, number: u32) -> Heard {
    let nobody = Heard { leg: None, failed: None };
    let mut leg = request.leg.clone();
    if let Some(path) = plan.path.and_then(|path| path.parse().ok()) {
        leg.path = path;
    }
    let body = plan.body.map_or_else(|| request.body.clone(), Bytes::from);
    let Some(choice) = choose_witness(&request.worker, &leg, &request.asked, tried) else { return nobody };
    let mut watch = Watch::new(request.worker.alarms.alarm(), leg.total);
    let attempt = Attempt {
        worker: &request.worker,
        asked: &request.asked,
        leg: &leg,
        choice: &choice,
        number,
        want: Want::Any,
        movable: true,
        may_ask: false,
        watch: &mut watch,
    };
    let outcome = attempt.run(|| OutBody::Whole(Some(body))).await;
    watch.keep();
    let judged = verdict(&outcome.facts);
    teach(&request, &choice, &outcome, judged);
    if judged == Verdict::Success && matches!(outcome.answer, Some(Answer::Tokens { .. })) {
        return Heard { leg: Some(Box::new(Tried { choice, outcome, watch })), failed: None };
    }
    let entry = Entry { role: opinion::ROLE, ..failed_entry(&choice, &outcome, judged) };
    Heard { failed: Some(entry), ..nobody }
}

/// A peer to ask for its opinion: in service, and rather one that was not overruled itself.
pub(super) fn choose_witness(
    worker: &Worker,
    leg: &Leg,
    asked: &Asked,
    mut tried: SmallVec<[BackendId; 4]>,
) -> Option<Choice> {
    let model = leg.pool.judged_model(leg.model.as_deref());
    for _ in 0..leg.pool.members.len() {
        let wanted = Wanted {
            tried: &tried,
            class: asked.class,
            model,
            affinity: leg.affinity,
            prompt_bytes: asked.prompt_bytes,
            only: None,
            proven_since: Some(clock::now() - LIVELY),
            replayable: false,
            paid: true,
        };
        let choice = worker.with_rng(|rng| leg.pool.pick(&wanted, rng)).ok()?;
        let standing = leg.pool.standing(choice.index, model, clock::now());
        if matches!(standing, Standing::Eligible { .. }) && !choice.record.is_wary() {
            return Some(choice);
        }
        tried.push(choice.backend().id);
    }
    None
}

/// The backends that cannot go on this way with what began at `origin`.
fn unfit(pool: &Pool, origin: &Origin, strategy: Strategy) -> impl Iterator<Item = BackendId> {
    let members = pool.members.iter().enumerate();
    members
        .filter(move |(i, _)| !pool.may_continue(*i, origin, strategy))
        .map(|(_, member)| member.backend.id)
}

/// The backend of the next leg: one that can continue it if that is the way, rather one that has just shown life, and
/// one that was not tried. Waited for as any is, if there is one at all; where all were tried, one that has spoken to
/// somebody since may be asked again, after half of the wait: what has just broken a stream is seldom well at once.
async fn choose(
    request: &Request,
    leg: &mut Leg,
    tried: &mut SmallVec<[BackendId; 4]>,
    origin: Option<(&Origin, Strategy)>,
    wait: Duration,
) -> Option<Choice> {
    let began = clock::now();
    let until = began + wait;
    loop {
        // The configuration may have changed since the stream began; that may be why it has to move.
        if let Some(pool) = request.worker.directory.look().pool(&leg.pool.config.name) {
            leg.pool = pool.clone();
        }
        let mut but: SmallVec<[BackendId; 8]> = SmallVec::new();
        if let Some((origin, strategy)) = origin {
            but.extend(unfit(&leg.pool, origin, strategy));
            if but.len() == leg.pool.members.len() {
                return None;
            }
        }
        but.extend_from_slice(tried);
        let wanted = Wanted {
            tried: &but,
            class: request.asked.class,
            model: leg.pool.judged_model(leg.model.as_deref()),
            affinity: leg.affinity,
            prompt_bytes: request.asked.prompt_bytes,
            only: None,
            proven_since: Some(clock::now() - LIVELY),
            replayable: false,
            paid: true,
        };
        let nobody = match request.worker.with_rng(|rng| leg.pool.pick(&wanted, rng)) {
            Ok(choice) => return Some(choice),
            Err(nobody) => nobody,
        };
        if clock::now() >= until {
            return None;
        }
        tokio::time::sleep(LOOK).await;
        if nobody == Nobody::AllTried && clock::now() >= began + wait / 2 {
            let returned = |id: BackendId| {
                let member = leg.pool.members.iter().find(|member| member.backend.id == id);
                member.is_some_and(|member| member.backend.moved_at() > began)
            };
            tried.retain(|id| !returned(*id));
        }
    }
}

/// The outcome; none once its first token is late.
async fn unless_late<F>(mut running: Pin<&mut F>, choice: &Choice) -> Option<Box<Outcome>>
where
    F: Future<Output = Box<Outcome>>,
{
    poll_fn(|cx| match running.as_mut().poll(cx) {
        Poll::Ready(outcome) => Poll::Ready(Some(outcome)),
        Poll::Pending if choice.in_flight.is_late() => Poll::Ready(None),
        Poll::Pending => Poll::Pending,
    })
    .await
}

fn teach(request: &Request, choice: &Choice, outcome: &Outcome, judged: Verdict) {
    let facts = &outcome.facts;
    let observation = match judged {
        Verdict::Success => Observation::FirstToken,
        Verdict::Fault => Observation::Fault,
        Verdict::Busy => Observation::Busy { until: facts.retry_after.map(|after| clock::now() + after) },
        Verdict::Misconfigured => Observation::Misconfigured,
        Verdict::Neutral | Verdict::Cancelled => Observation::Neutral,
    };
    let about = if facts.phase == Phase::Connect { About::Backend } else { About::Model };
    request.worker.with_rng(|rng| choice.observe(about, observation, rng));
}

fn failed_entry(choice: &Choice, outcome: &Outcome, judged: Verdict) -> Entry {
    let counted = match judged {
        Verdict::Fault => AttemptOutcome::Fault,
        Verdict::Busy => AttemptOutcome::Busy,
        Verdict::Misconfigured => AttemptOutcome::Misconfigured,
        Verdict::Success | Verdict::Neutral | Verdict::Cancelled => AttemptOutcome::Neutral,
    };
    Entry {
        backend: choice.backend().clone(),
        role: ROLE,
        outcome: counted,
        cause: outcome.facts.cause.name(),
        phase: outcome.facts.phase.name(),
        reused: outcome.facts.reused,
        started: outcome.started,
        first_byte: outcome.first_byte,
        lasted: Some(outcome.facts.took),
    }
}

fn late_entry(choice: &Choice) -> Entry {
    let started = choice.in_flight.started();
    Entry {
        backend: choice.backend().clone(),
        role: ROLE,
        outcome: AttemptOutcome::Overtaken,
        cause: "overtaken",
        phase: Phase::Gate.name(),
        reused: false,
        started,
        first_byte: None,
        lasted: Some(clock::now().since(started)),
    }
}

/// An attempt that continues a relayed stream.
pub(super) const ROLE: &str = "resume";
