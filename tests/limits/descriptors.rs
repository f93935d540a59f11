//! F37: the binary without descriptors: it waits, answers who is there, and goes on when there are some again.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use crate::support::backend::{Backend, Script};
use crate::support::client::{Client, chat_request};
use crate::support::either::assert_is_the_stream;
use crate::support::reply;
use crate::support::{PATIENCE, eventually, within};

/// The binary with at most this many descriptors.
struct Poor {
    child: Child,
    address: SocketAddr,
    log: Arc<Mutex<Vec<String>>>,
}

impl Poor {
    async fn start(descriptors: usize, config: &str) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), config).unwrap();
        let script = format!("ulimit -n {descriptors} && exec \"$0\" run --config \"$1\"");
        let mut child = Command::new("sh")
            .args(["-c", &script, env!("CARGO_BIN_EXE_evergate")])
            .arg(file.path())
            .env("EVERGATE_LOG", "info")
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let (stderr, lines) = (child.stderr.take().unwrap(), Arc::clone(&log));
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                lines.lock().push(line);
            }
        });
        let found = || {
            let lines = log.lock();
            let line = lines.iter().find(|line| line.contains("listening for clients on "))?;
            let (_, rest) = line.split_once("listening for clients on ")?;
            rest.split(['"', ' ']).next()?.parse().ok()
        };
        eventually(PATIENCE, || found().is_some()).await;
        let address = found().unwrap();
        Self { child, address, log }
    }

    fn said(&self, words: &str) -> usize {
        self.log.lock().iter().filter(|line| line.contains(words)).count()
    }

    /// Processor time used so far, in hundredths of a second.
    fn ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }

    fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }
}

impl Drop for Poor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn f37_without_descriptors_it_waits_and_goes_on_when_there_are_some() {
    const DESCRIPTORS: usize = 64;
    let backend = Backend::start(Script::new().by_request(|request| {
        reply::healthy(request, &reply::Talk::default()).into_iter().chain([reply::Step::Fin]).collect()
    }))
    .await;
    let config = format!(
        "workers = 1\n[[listener]]\naddress = \"127.0.0.1:0\"\n[admin]\naddress = \"127.0.0.1:0\"\n\
         [[pool]]\nbackends = [\"{}\"]\n[pool.probe]\nkind = \"off\"\n[pool.retry]\nwait_max = \"400ms\"\n",
        backend.url()
    );
    let mut poor = Poor::start(DESCRIPTORS, &config).await;
    let mut early = Client::connect(poor.address).await;
    assert_is_the_stream(&early.send(&chat_request(true)).await);

    let crowd: Vec<Client> = {
        let mut crowd = Vec::new();
        for _ in 0..2 * DESCRIPTORS {
            crowd.push(Client::connect(poor.address).await);
        }
        crowd
    };
    eventually(PATIENCE, || poor.said("cannot accept clients") == 1).await;
    assert!(poor.descriptors() >= DESCRIPTORS - 1);

    // Who is there is told honestly that nobody can be asked, and the backend is not blamed for it.
    let answer = early.send(&chat_request(true)).await;
    assert_eq!((answer.status, answer.json()["error"]["code"].as_str()), (503, Some("no_backend_available")));
    assert!(answer.elapsed < Duration::from_secs(2), "{:?}", answer.elapsed);
    assert_eq!(poor.said("ejected"), 0);

    // It neither spins nor fills the log.
    let before = poor.ticks();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let used = poor.ticks() - before;
    assert!(used < 20, "{used} hundredths of a second of processor time in one second");
    assert_eq!(poor.said("cannot accept clients"), 1);

    drop(crowd);
    assert_is_the_stream(&within(PATIENCE, early.send(&chat_request(true))).await);
    let mut late = Client::connect(poor.address).await;
    assert_is_the_stream(&within(PATIENCE, late.send(&chat_request(true))).await);
    assert!(poor.child.try_wait().unwrap().is_none(), "it lives");
}
