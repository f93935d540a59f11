//! `evergate demo`: three simulated replicas, evergate in front of them, clients that never rest, and
//! one trouble after another, so that a newcomer sees within half a minute what the thing is for.
//!
//! Everything is real but the replicas: the proxy is the one `evergate run` starts, on sockets, with
//! shorter clocks (`clocks`), and the clients (`clients`) check every answer word for word. `play` says
//! what goes wrong and when, `tally` what clients saw and what follows from it, `words` how it is told,
//! `screen` where it is shown. The exit code is the verdict.

mod clients;
mod clocks;
mod play;
mod screen;
mod tally;
mod words;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::MissedTickBehavior;

use crate::app::{self, Plan, Running};
use crate::clock;
use crate::policy::Moment;
use crate::sim::{Replica, ReplicaConfig, Skin};
use crate::telemetry::events::EventRecord;
use crate::telemetry::{self, LOG_VARIABLE, Telemetry};

use clients::Clients;
use play::{Cast, Pace, Play};
use screen::{Screen, Surface};
use tally::{Books, Verdict};
use words::Places;

/// The replicas, in the order in which they get into trouble.
const NAMES: [&str; 3] = ["replica-a", "replica-b", "replica-c"];
/// The one model they serve.
const MODEL: &str = "demo";
/// About a second and a quarter for an answer: short enough to see many, long enough to be hit in the middle.
const TOKENS_PER_SECOND: f64 = 40.0;
const TOKENS: usize = 40;
/// Between two looks at the numbers of the live view.
const FRAME: Duration = Duration::from_millis(200);
/// How long the three may take to pass their first probe.
const READY_PATIENCE: Duration = Duration::from_secs(10);

/// How the demo is to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// When it ends.
    pub length: Length,
    /// Lines only, even on a terminal. Without it the numbers stay in view, where there is a terminal.
    pub plain: bool,
    /// Where the proxy listens. Default: 127.0.0.1, on a port the kernel chooses.
    pub listen: Option<SocketAddr>,
}

/// When a demo ends. Ctrl-C ends any of them, with the verdict so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Length {
    /// One round of troubles and the verdict; on a terminal the proxy then stays up, to be tried by hand.
    #[default]
    Open,
    /// One round of troubles, the verdict, the end.
    Once,
    /// Rounds until this time is over.
    For(Duration),
}

/// What ended the troubles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    Played,
    Interrupted,
    /// Nobody reads the output any more.
    Unread,
}

/// Runs the demo on standard output. Success if and only if the verdict is that no request failed.
pub fn run(options: Options) -> ExitCode {
    let surface = Surface::of_stdout(options.plain);
    let stays = options.length == Length::Open && surface.is_terminal();
    let screen = Screen::new(surface, Box::new(io::stdout()));
    let verdict = runtime().and_then(|runtime| {
        runtime.block_on(async {
            let end = end_by_signal()?;
            perform(options, Pace::default(), stays, screen, &end).await
        })
    });
    match verdict {
        Ok(verdict) if verdict.holds() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("evergate demo: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Replicas and clients have a thread of their own: a terminal that stands still must not stop them.
fn runtime() -> io::Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).thread_name("demo").enable_all().build()
}

/// Told by every Ctrl-C, and by every polite kill.
fn end_by_signal() -> io::Result<Arc<Notify>> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let end = Arc::new(Notify::new());
    let told = end.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            told.notify_one();
        }
    });
    Ok(end)
}

/// The whole demo, shown on `screen`; `end` ends it early. `stays`: the proxy stays up after the verdict.
async fn perform(
    options: Options,
    pace: Pace,
    stays: bool,
    screen: Screen,
    end: &Notify,
) -> io::Result<Verdict> {
    let stage = Stage::build(options.listen, screen).await?;
    let (verdict, ended) = stage.perform(options.length, pace, end).await?;
    let show = |text: &str| stage.screen.lock().text(text);
    stage.screen.lock().finish(&words::verdict(&verdict));
    match ended {
        Ended::Played if stays => {
            show(&words::stays_up(&stage.places));
            end.notified().await;
            show("\n");
        }
        Ended::Played | Ended::Interrupted => show(&words::by_hand()),
        Ended::Unread => {}
    }
    Ok(verdict)
}

/// Everything that runs.
struct Stage {
    running: Running,
    telemetry: Arc<Telemetry>,
    replicas: Vec<Arc<Replica>>,
    places: Places,
    books: Arc<Mutex<Books>>,
    screen: Arc<Mutex<Screen>>,
    began: Moment,
}

impl Stage {
    async fn build(listen: Option<SocketAddr>, screen: Screen) -> io::Result<Self> {
        let began = clock::now();
        let mut replicas = Vec::new();
        for name in NAMES {
            replicas.push(Arc::new(Replica::start(replica(name)).await?));
        }
        let config = clocks::config(listen, &replicas).map_err(io::Error::other)?;
        if std::env::var_os(LOG_VARIABLE).is_some() {
            telemetry::init(&config.telemetry).map_err(io::Error::other)?;
        }
        let telemetry = Arc::new(Telemetry::new(&config.telemetry)?);
        let shorter = clocks::shorter(&config);
        let running = app::start(Plan { config, source: None }, telemetry.clone())?;
        let mut proxy = running.addresses().first().copied().ok_or(io::ErrorKind::AddrNotAvailable)?;
        // Where it listens everywhere, this is the way there from here.
        match proxy.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => proxy.set_ip(Ipv4Addr::LOCALHOST.into()),
            IpAddr::V6(ip) if ip.is_unspecified() => proxy.set_ip(Ipv6Addr::LOCALHOST.into()),
            IpAddr::V4(_) | IpAddr::V6(_) => {}
        }
        let places = Places {
            proxy,
            admin: running.admin(),
            replicas: replicas
                .iter()
                .map(|replica| (replica.config().name.clone(), replica.addr()))
                .collect(),
        };
        let (books, screen) = (Arc::default(), Arc::new(Mutex::new(screen)));
        let stage = Self { running, telemetry, replicas, places, books, screen, began };
        stage.screen.lock().text(&words::opening(&stage.places, &shorter));
        Ok(stage)
    }

    /// Plays until the play is over, somebody ends it, or nobody looks any more.
    async fn perform(&self, length: Length, pace: Pace, end: &Notify) -> io::Result<(Verdict, Ended)> {
        self.ready().await?;
        let events = self.telemetry.events.subscribe();
        let clients = Clients::start(self.places.proxy, replica(NAMES[0]), self.books.clone());
        let cast = Cast {
            replicas: &self.replicas,
            directory: self.running.directory(),
            books: &self.books,
            screen: &self.screen,
            metrics: &self.telemetry.metrics,
            began: self.began,
        };
        let mut play = Play::new(cast, pace);
        let playing = async {
            play.run(length).await;
            self.books.lock().next = None;
            // The last answers are awaited, so that every question counts.
            clients.finish().await;
        };
        let ended = tokio::select! {
            () = playing => Ended::Played,
            () = self.listen(events) => Ended::Unread,
            () = self.paint() => Ended::Unread,
            () = end.notified() => Ended::Interrupted,
        };
        let verdict = Verdict {
            lasted: clock::now().since(self.began),
            tally: self.books.lock().total.clone(),
            moved: tally::moved(&self.telemetry.metrics.render()),
            troubles: play.troubles(),
            interrupted: ended != Ended::Played,
        };
        Ok((verdict, ended))
    }

    /// Waits until evergate has probed all three and found them well.
    async fn ready(&self) -> io::Result<()> {
        let all_healthy = async {
            while !play::all_back(self.running.directory()) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(READY_PATIENCE, all_healthy)
            .await
            .map_err(|_elapsed| io::Error::other("the replicas did not pass their first probes"))
    }

    /// Tells what evergate notices, as it notices it.
    async fn listen(&self, mut events: broadcast::Receiver<Arc<EventRecord>>) {
        loop {
            match events.recv().await {
                Ok(event) => {
                    if let Some(text) = words::event(&event) {
                        self.screen.lock().line(clock::now().since(self.began), words::EVERGATE, &text);
                    }
                }
                // The view lagged: what it missed is in the numbers.
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return std::future::pending().await,
            }
            if self.screen.lock().is_unread() {
                return;
            }
        }
    }

    /// Keeps the numbers in view; returns when nobody reads them any more.
    async fn paint(&self) {
        let mut frames = tokio::time::interval(FRAME);
        frames.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            frames.tick().await;
            if self.screen.lock().is_unread() {
                return;
            }
            if self.screen.lock().is_live() {
                let view = self.view();
                self.screen.lock().view(&view);
            }
        }
    }

    fn view(&self) -> words::View {
        let (now, snapshot) = (clock::now(), self.running.directory().snapshot());
        let books = self.books.lock();
        let mut rows = Vec::new();
        // One pool, whose members are in the order of the replicas.
        for ((pool, member), (replica, condition)) in
            snapshot.members().zip(self.replicas.iter().zip(books.conditions))
        {
            let backend = &member.backend;
            let state = backend.whole().read(|health| health.operational());
            let standing = backend.whole().standing(&pool.config.health, now);
            rows.push(words::Row {
                name: member.params.name.clone(),
                condition,
                judged: words::judged(state, standing, now),
                under_way: backend.in_flight(),
                answers: replica.stats().completed,
            });
        }
        words::View {
            rows,
            tally: books.total.clone(),
            moved: tally::moved(&self.telemetry.metrics.render()),
            next: books.next.clone(),
            now,
        }
    }
}

/// A replica of the demo, healthy.
fn replica(name: &str) -> ReplicaConfig {
    ReplicaConfig {
        name: name.to_owned(),
        model: MODEL.to_owned(),
        skin: Skin::Vllm,
        tokens_per_second: TOKENS_PER_SECOND,
        tokens: TOKENS,
        ..ReplicaConfig::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays a demo at this pace and gives what it said.
    fn play(length: Length, pace: Pace, end: &Notify) -> (Verdict, String) {
        let said = screen::Kept::default();
        let screen = Screen::new(Surface::Lines, Box::new(said.clone()));
        let options = Options { length, plain: true, listen: None };
        let runtime = runtime().unwrap();
        let verdict = runtime.block_on(perform(options, pace, false, screen, end)).unwrap();
        (verdict, said.text())
    }

    #[test]
    fn a_round_of_trouble_fails_no_request() {
        let ms = Duration::from_millis;
        let pace =
            Pace { warm_up: ms(300), dead: ms(700), frozen: ms(2_500), back_max: ms(5_000), calm: ms(100) };
        let (verdict, said) = play(Length::Once, pace, &Notify::new());
        assert!(verdict.holds(), "{said}");
        // How many were asked, and whether one had to move, is chance in so short a round.
        assert!(verdict.tally.answered > 0, "{said}");
        assert_eq!((verdict.troubles.kills, verdict.troubles.freezes), (1, 1));
        for part in [
            "kills replica-a",
            "starts replica-a",
            "freezes replica-b",
            "thaws replica-b",
            "no request failed.",
        ] {
            assert!(said.contains(part), "{part:?} in\n{said}");
        }
        assert!(!said.contains('\x1b'), "{said}");
    }

    #[test]
    fn an_interrupted_demo_ends_at_once_with_the_verdict_so_far() {
        let end = Notify::new();
        end.notify_one();
        let (verdict, said) = play(Length::Open, Pace::default(), &end);
        assert!(verdict.interrupted && verdict.holds() && verdict.lasted < Pace::default().warm_up, "{said}");
        assert!(said.contains("(interrupted): "), "{said}");
    }
}
