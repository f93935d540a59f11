//! Reload against a real file system: every way a file is replaced, and what is reported of it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::watch::{Means, watch_by};
use super::*;
use crate::drain::Drain;
use crate::telemetry::Telemetry;

const LONG: Duration = Duration::from_secs(3600);
const BY_EVENTS: Means = Means { events: true, check_interval: LONG, hangup: false };
const BY_LOOKING: Means = Means { events: false, check_interval: Duration::from_millis(20), hangup: false };

/// Counts, refuses when told to.
#[derive(Default)]
struct Listeners {
    refuse: AtomicBool,
    prepared: AtomicUsize,
    committed: Arc<AtomicUsize>,
}

impl Follower for Arc<Listeners> {
    fn prepare(&self, _new: &Config, _changes: &[Change]) -> Result<Box<dyn FnOnce() + Send>, String> {
        if self.refuse.load(Ordering::Relaxed) {
            return Err("cannot listen on 127.0.0.1:1: permission denied".to_owned());
        }
        self.prepared.fetch_add(1, Ordering::Relaxed);
        let committed = Arc::clone(&self.committed);
        Ok(Box::new(move || {
            committed.fetch_add(1, Ordering::Relaxed);
        }))
    }
}

/// A running configuration in a directory of its own.
struct Bench {
    _kept: tempfile::TempDir,
    directory: PathBuf,
    file: PathBuf,
    pools: Arc<Directory>,
    listeners: Arc<Listeners>,
    reloader: Arc<Reloader>,
}

/// Backends on ports 1 to `count`.
fn toml(count: usize) -> String {
    let urls: Vec<String> = (1..=count).map(|port| format!("\"http://127.0.0.1:{port}\"")).collect();
    format!("workers = 2\n[[pool]]\nbackends = [{}]\n", urls.join(", "))
}

impl Bench {
    /// `place` puts the text into the directory and says under which path it is found.
    fn new(place: impl FnOnce(&Path, &str) -> PathBuf) -> Self {
        let kept = tempfile::tempdir().unwrap();
        let directory = fs::canonicalize(kept.path()).unwrap();
        let file = place(&directory, &toml(1));
        let source = Source { path: file.clone(), flags: config::Overrides::default() };
        let pools = Arc::new(Directory::new(source.load().unwrap(), Arc::new(Telemetry::silent())).unwrap());
        let listeners = Arc::new(Listeners::default());
        let follower = Box::new(Arc::clone(&listeners));
        let reloader = Arc::new(Reloader::new(Some(source), Arc::clone(&pools), follower));
        Self { _kept: kept, directory, file, pools, listeners, reloader }
    }

    fn plain() -> Self {
        Self::new(|directory, text| {
            fs::write(directory.join("evergate.toml"), text).unwrap();
            directory.join("evergate.toml")
        })
    }

    fn watched(&self, means: Means) -> tokio::task::JoinHandle<()> {
        let reloader = Arc::clone(&self.reloader);
        let draining = Drain::new().watch();
        tokio::spawn(async move { watch_by(reloader, draining, means).await.unwrap() })
    }

    fn backends(&self) -> usize {
        self.pools.look().members().count()
    }

    fn generation(&self) -> u64 {
        self.pools.look().generation
    }

    async fn until_backends(&self, count: usize) {
        eventually(|| self.backends() == count).await;
    }

    fn rename_over(&self, text: &str) {
        let new = self.directory.join(".evergate.toml.swp");
        fs::write(&new, text).unwrap();
        fs::rename(new, &self.file).unwrap();
    }

    async fn ask(&self) -> Arc<Report> {
        self.reloader.reload(Trigger::Request).await.unwrap()
    }
}

#[track_caller]
fn eventually(mut condition: impl FnMut() -> bool) -> impl Future<Output = ()> {
    let asked_at = std::panic::Location::caller();
    async move {
        let waits = async {
            while !condition() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        assert!(tokio::time::timeout(Duration::from_secs(10), waits).await.is_ok(), "in vain at {asked_at}");
    }
}

/// Whether the watch has made its first look, and is armed.
async fn first_look(bench: &Bench) {
    // Its first look is silent; that it knows the fingerprint shows that it was.
    eventually(|| bench.reloader.known.try_lock().is_ok_and(|known| known.in_force.is_some())).await;
}

#[tokio::test]
async fn a_reload_applies_what_the_file_says_and_reports_it() {
    let bench = Bench::plain();
    fs::write(&bench.file, toml(3)).unwrap();
    let report = bench.ask().await;
    assert_eq!((report.generation, report.trigger), (2, Trigger::Request));
    let changes =
        vec!["backend default/127.0.0.1:2 added".to_owned(), "backend default/127.0.0.1:3 added".to_owned()];
    assert_eq!(report.outcome, Outcome::Applied { changes, added: 2, removed: 0 });
    assert_eq!(bench.backends(), 3);
    assert_eq!(bench.listeners.committed.load(Ordering::Relaxed), 1);
    assert_eq!(bench.reloader.latest().unwrap(), report);
    let events = bench.pools.telemetry().events.latest();
    assert_eq!(events.last().unwrap().event, "reload_applied");
}

#[tokio::test]
async fn the_same_content_is_unchanged_and_no_generation() {
    let bench = Bench::plain();
    assert_eq!(bench.ask().await.outcome, Outcome::Unchanged);
    fs::write(&bench.file, format!("# a comment\n{}", toml(1))).unwrap();
    assert_eq!(bench.ask().await.outcome, Outcome::Unchanged);
    assert_eq!(bench.generation(), 1);
    assert_eq!(bench.listeners.prepared.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_refused_file_changes_nothing_and_stands_until_one_is_applied() {
    let bench = Bench::plain();
    fs::write(&bench.file, "wrokers = 1\n[[pool]]\nbackends = [\"ftp://a\"]\n").unwrap();
    let report = bench.ask().await;
    let Outcome::Refused { errors, text } = &report.outcome else { panic!("{report:?}") };
    assert_eq!(errors.len(), 2, "{text}");
    assert!(text.contains("wrokers"), "{text}");
    assert_eq!((bench.generation(), bench.backends()), (1, 1));
    assert_eq!(bench.reloader.refusal().unwrap(), report);
    assert_eq!(bench.pools.telemetry().metrics.config_errors.get(), 2);
    fs::write(&bench.file, toml(2)).unwrap();
    assert!(!bench.ask().await.is_refused());
    assert_eq!(bench.reloader.refusal(), None);
    assert_eq!(bench.pools.telemetry().metrics.config_errors.get(), 0);
}

#[tokio::test]
async fn a_refused_file_put_back_is_no_refusal_any_more() {
    let bench = Bench::plain();
    let watch = bench.watched(BY_LOOKING);
    first_look(&bench).await;
    fs::write(&bench.file, "nonsense").unwrap();
    eventually(|| bench.reloader.refusal().is_some()).await;
    fs::write(&bench.file, toml(1)).unwrap();
    eventually(|| bench.reloader.refusal().is_none()).await;
    assert_eq!(bench.reloader.latest().unwrap().outcome, Outcome::Unchanged);
    assert_eq!(bench.pools.telemetry().metrics.config_errors.get(), 0);
    watch.abort();
}

#[tokio::test]
async fn what_cannot_be_prepared_is_refused_whole() {
    let bench = Bench::plain();
    fs::write(&bench.file, toml(2)).unwrap();
    bench.listeners.refuse.store(true, Ordering::Relaxed);
    let report = bench.ask().await;
    let Outcome::Refused { text, .. } = &report.outcome else { panic!("{report:?}") };
    assert!(text.ends_with("evergate.toml: cannot listen on 127.0.0.1:1: permission denied"), "{text}");
    assert_eq!((bench.generation(), bench.backends()), (1, 1));
    // The same file, asked for again once the reason is gone.
    bench.listeners.refuse.store(false, Ordering::Relaxed);
    assert!(!bench.ask().await.is_refused());
    assert_eq!(bench.backends(), 2);
}

#[tokio::test]
async fn workers_wait_for_a_restart_and_the_rest_is_applied() {
    let bench = Bench::plain();
    let told = ["workers 2 -> 5 (needs a restart)".to_owned()];
    fs::write(&bench.file, toml(1).replace("workers = 2", "workers = 5")).unwrap();
    let report = bench.ask().await;
    assert_eq!((&report.outcome, report.needs_restart.as_slice()), (&Outcome::Unchanged, &told[..]));
    fs::write(&bench.file, toml(2).replace("workers = 2", "workers = 5")).unwrap();
    let report = bench.ask().await;
    assert!(matches!(report.outcome, Outcome::Applied { added: 1, .. }), "{report:?}");
    assert_eq!(report.needs_restart, told);
    assert_eq!(bench.pools.look().config.workers.get(), 2);
}

#[tokio::test]
async fn a_renewed_certificate_is_a_change_although_the_file_is_the_same() {
    let certificate = || {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        (made.cert.pem(), made.signing_key.serialize_pem())
    };
    let bench = Bench::new(|directory, text| {
        let (pem, key) = certificate();
        fs::write(directory.join("cert.pem"), pem).unwrap();
        fs::write(directory.join("key.pem"), key).unwrap();
        let path = |name| directory.join(name).display().to_string();
        let listener = format!(
            "[[listener]]\naddress = \"127.0.0.1:0\"\n[listener.tls]\ncertificate = \"{}\"\nkey = \"{}\"\n",
            path("cert.pem"),
            path("key.pem")
        );
        fs::write(directory.join("evergate.toml"), format!("{text}{listener}")).unwrap();
        directory.join("evergate.toml")
    });
    let watch = bench.watched(BY_LOOKING);
    first_look(&bench).await;
    let (pem, key) = certificate();
    fs::write(bench.directory.join("key.pem"), key).unwrap();
    eventually(|| bench.generation() == 2).await;
    fs::write(bench.directory.join("cert.pem"), pem).unwrap();
    eventually(|| bench.generation() == 3).await;
    let report = bench.reloader.latest().unwrap();
    let Outcome::Applied { changes, .. } = &report.outcome else { panic!("{report:?}") };
    assert!(changes[0].starts_with("new content of listener[0].tls.certificate ("), "{changes:?}");
    watch.abort();
}

#[tokio::test]
async fn without_a_file_there_is_nothing_to_reload() {
    let config = config::from_flags(None, None, &["http://127.0.0.1:1".to_owned()], None).unwrap();
    let pools = Arc::new(Directory::new(config, Arc::new(Telemetry::silent())).unwrap());
    let reloader = Arc::new(Reloader::new(None, pools, Box::new(Arc::new(Listeners::default()))));
    assert_eq!(reloader.reload(Trigger::Request).await, Err(NoFile));
    assert_eq!(reloader.latest(), None);
}

#[tokio::test]
async fn a_reload_that_comes_during_one_runs_after_it() {
    let bench = Bench::plain();
    fs::write(&bench.file, toml(2)).unwrap();
    let (first, second) = tokio::join!(bench.ask(), bench.ask());
    assert!(matches!(first.outcome, Outcome::Applied { .. }));
    assert_eq!((second.generation, &second.outcome), (2, &Outcome::Unchanged));
}

#[tokio::test]
async fn a_file_renamed_over_is_followed() {
    let bench = Bench::plain();
    let watch = bench.watched(BY_EVENTS);
    first_look(&bench).await;
    for count in [2, 3] {
        bench.rename_over(&toml(count));
        bench.until_backends(count).await;
    }
    assert_eq!(bench.reloader.latest().unwrap().trigger, Trigger::FileEvent);
    watch.abort();
}

#[tokio::test]
async fn a_file_written_in_place_is_followed_and_its_halves_are_no_error() {
    let bench = Bench::plain();
    let watch = bench.watched(BY_EVENTS);
    first_look(&bench).await;
    fs::write(&bench.file, "").unwrap();
    second_chance(&bench).await;
    fs::write(&bench.file, toml(2)).unwrap();
    bench.until_backends(2).await;
    let refused = bench.pools.telemetry().metrics.config_reload_failures.get();
    assert_eq!(refused, 0);
    watch.abort();
}

/// A wrong file was seen, and is looked at again after a pause.
async fn second_chance(bench: &Bench) {
    eventually(|| bench.reloader.known.try_lock().is_ok_and(|known| known.suspect.is_some())).await;
}

#[tokio::test]
async fn whoever_asks_while_a_wrong_file_has_its_second_chance_is_answered_at_once() {
    let bench = Bench::plain();
    let watch = bench.watched(BY_LOOKING);
    first_look(&bench).await;
    bench.rename_over("nonsense");
    second_chance(&bench).await;
    let report = bench.ask().await;
    assert!(report.is_refused());
    // It is told once: the look that waited has nothing to add.
    bench.rename_over(&toml(2));
    bench.until_backends(2).await;
    assert_eq!(bench.pools.telemetry().metrics.config_reload_failures.get(), 1);
    watch.abort();
}

#[tokio::test]
async fn a_config_map_is_followed_over_swaps() {
    let version = |directory: &Path, name: &str, text: &str| {
        fs::create_dir(directory.join(name)).unwrap();
        fs::write(directory.join(name).join("evergate.toml"), text).unwrap();
        symlink(name, directory.join("..data_tmp")).unwrap();
        fs::rename(directory.join("..data_tmp"), directory.join("..data")).unwrap();
    };
    let bench = Bench::new(|directory, text| {
        version(directory, "..v1", text);
        symlink("..data/evergate.toml", directory.join("evergate.toml")).unwrap();
        directory.join("evergate.toml")
    });
    let watch = bench.watched(BY_EVENTS);
    first_look(&bench).await;
    for count in 2..=4 {
        version(&bench.directory, &format!("..v{count}"), &toml(count));
        fs::remove_dir_all(bench.directory.join(format!("..v{}", count - 1))).unwrap();
        bench.until_backends(count).await;
    }
    watch.abort();
}

#[tokio::test]
async fn without_events_the_regular_look_finds_the_change() {
    let bench = Bench::plain();
    let watch = bench.watched(BY_LOOKING);
    first_look(&bench).await;
    bench.rename_over(&toml(2));
    bench.until_backends(2).await;
    assert_eq!(bench.reloader.latest().unwrap().trigger, Trigger::FileCheck);
    watch.abort();
}

#[tokio::test]
async fn a_file_that_vanishes_for_a_moment_is_not_reported() {
    let bench = Bench::plain();
    fs::remove_file(&bench.file).unwrap();
    let asked = tokio::spawn({
        let reloader = Arc::clone(&bench.reloader);
        async move { reloader.reload(Trigger::Request).await.unwrap() }
    });
    eventually(|| bench.reloader.known.try_lock().is_err()).await;
    fs::write(&bench.file, toml(2)).unwrap();
    let report = asked.await.unwrap();
    assert!(matches!(report.outcome, Outcome::Applied { .. }), "{report:?}");
    fs::remove_file(&bench.file).unwrap();
    let report = bench.ask().await;
    let Outcome::Refused { text, .. } = &report.outcome else { panic!("{report:?}") };
    assert!(text.contains("cannot be read"), "{text}");
    assert_eq!(bench.backends(), 2);
}

#[tokio::test]
async fn a_wrong_file_is_refused_once_and_the_right_one_applied() {
    let bench = Bench::plain();
    let watch = bench.watched(Means { events: true, ..BY_LOOKING });
    first_look(&bench).await;
    bench.rename_over("[[pool]]\nbackends = []\n");
    eventually(|| bench.reloader.refusal().is_some()).await;
    assert_eq!(bench.generation(), 1);
    bench.rename_over(&toml(2));
    bench.until_backends(2).await;
    eventually(|| bench.reloader.refusal().is_none()).await;
    assert_eq!(bench.pools.telemetry().metrics.config_reload_failures.get(), 1);
    watch.abort();
}

#[tokio::test]
async fn a_hangup_signal_reloads() {
    let bench = Bench::plain();
    let watch = bench.watched(Means { events: false, check_interval: LONG, hangup: true });
    first_look(&bench).await;
    fs::write(&bench.file, toml(2)).unwrap();
    let pid = std::process::id().to_string();
    let sent = std::process::Command::new("kill").args(["-HUP", &pid]).status().unwrap();
    assert!(sent.success());
    bench.until_backends(2).await;
    assert_eq!(bench.reloader.latest().unwrap().trigger, Trigger::Signal);
    watch.abort();
}

#[tokio::test]
async fn the_watch_ends_when_the_process_drains() {
    let bench = Bench::plain();
    let drain = Drain::new();
    let watch = tokio::spawn(watch_by(Arc::clone(&bench.reloader), drain.watch(), BY_EVENTS));
    drain.trigger();
    assert!(watch.await.unwrap().is_ok());
}

#[tokio::test]
async fn two_hundred_edits_leave_nothing_behind() {
    let bench = Bench::plain();
    let watch =
        bench.watched(Means { events: true, check_interval: Duration::from_millis(5), hangup: false });
    first_look(&bench).await;
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    let (tasks_before, descriptors_before) = (tasks(), descriptors());
    for edit in 0..200 {
        bench.rename_over(&toml(1 + edit % 3));
        if edit % 20 == 19 {
            bench.until_backends(1 + edit % 3).await;
        }
    }
    bench.until_backends(1 + 199 % 3).await;
    eventually(|| tasks() <= tasks_before).await;
    // Other tests of this process have files open too.
    eventually(|| descriptors() <= descriptors_before + 40).await;
    assert!(bench.generation() > 9 && bench.reloader.refusal().is_none());
    watch.abort();
}
