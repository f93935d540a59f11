//! Two hundred edits of the file under load: backends come, go and change places, every tenth edit is
//! wrong, and no client notices anything.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use tokio::task::JoinSet;

use super::{File, generation};
use crate::support::backend::{Backend, Script};
use crate::support::client::{Client, H2Client, assert_is_healthy_stream, chat_request};
use crate::support::proxy::ProxyBuilder;
use crate::support::reply::Talk;
use crate::support::{PATIENCE, eventually};

const EDITS: usize = 200;
const BACKENDS: usize = 8;
/// Clients of streams, of streams over HTTP/2, and of whole answers.
const CLIENTS: [usize; 3] = [6, 3, 4];

fn talk() -> Talk {
    Talk::of(16).gap(Duration::from_millis(6))
}

/// The file of edit `nth`: the anchor, and some of the others in some order. The bound of header fields
/// tells the edits apart.
fn edit(nth: usize, backends: &[Backend], rng: &mut fastrand::Rng) -> String {
    let mut others: Vec<&Backend> = backends[1..].iter().collect();
    rng.shuffle(&mut others);
    others.truncate(rng.usize(1..others.len()));
    let at = rng.usize(..=others.len());
    others.insert(at, &backends[0]);
    let builder = others.iter().fold(ProxyBuilder::new(), |builder, backend| {
        builder.backend_with(&backend.url(), &[("weight", 1.into())])
    });
    let builder = builder.set("workers", 2);
    builder.set("limits.headers_max", i64::try_from(marker(nth)).unwrap()).build_toml()
}

fn marker(nth: usize) -> usize {
    200 + nth
}

fn is_wrong(nth: usize) -> bool {
    nth % 10 == 7
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_edits_under_load_are_noticed_by_no_client() {
    let mut rng = fastrand::Rng::with_seed(20);
    let mut backends = Vec::new();
    for _ in 0..BACKENDS {
        backends.push(Backend::start(Script::new().talk(talk())).await);
    }
    let file = File::new(&edit(0, &backends, &mut rng));
    let proxy = file.start();
    proxy.probed().await;
    let anchor = proxy.backend(backends[0].addr());
    let metrics = &proxy.telemetry.metrics;

    let (over, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let mut clients = JoinSet::new();
    for kind in (0..3).flat_map(|kind| std::iter::repeat_n(kind, CLIENTS[kind])) {
        let (over, served, address) = (over.clone(), served.clone(), proxy.addr);
        clients.spawn(async move {
            let mut h1 = Client::connect(address).await;
            let h2 = H2Client::connect(address).await;
            while !over.load(SeqCst) {
                let stream = kind < 2;
                let answer = match kind {
                    1 => h2.send(&chat_request(true)).await,
                    _ => h1.send(&chat_request(stream)).await,
                };
                if stream {
                    assert_eq!(assert_is_healthy_stream(&answer).text, talk().text());
                } else {
                    assert_eq!(answer.status, 200, "{}", answer.text());
                    assert_eq!(answer.json()["choices"][0]["message"]["content"], talk().text());
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                served.fetch_add(1, SeqCst);
            }
        });
    }

    let in_force = || proxy.running.directory().look().config.limits.headers_max;
    let mut right = 0;
    for nth in 1..=EDITS {
        if is_wrong(nth) {
            file.write("[[pool]]\nbackends = []\nno_such_key = 1\n");
        } else {
            file.write(&edit(nth, &backends, &mut rng));
            right += 1;
        }
        // Most edits come on the heels of each other; some are waited for, wrong ones among them.
        match nth {
            _ if nth % 50 == 47 => {
                let before = metrics.config_reload_failures.get();
                eventually(PATIENCE, || metrics.config_reload_failures.get() > before).await;
            }
            _ if nth % 5 == 0 => eventually(PATIENCE, || in_force() == marker(nth)).await,
            _ => tokio::time::sleep(Duration::from_millis(3)).await,
        }
    }
    assert_eq!(in_force(), marker(EDITS), "the last one is in force");
    let generations = generation(&proxy) - 1;
    assert!((EDITS as u64 / 5..=right).contains(&generations), "{generations} generations of {right} edits");
    // A generation is in force a moment before it is told of.
    eventually(PATIENCE, || metrics.config_reloads.get() == generations).await;
    assert!(metrics.config_reload_failures.get() >= 4);
    assert_eq!(metrics.config_errors.get(), 0);

    over.store(true, SeqCst);
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
    proxy.is_quiet().await;
    // One attempt each: a reload is no reason to try twice.
    let served = served.load(SeqCst);
    let seen: usize = backends.iter().map(|backend| backend.requests().len()).sum();
    assert_eq!((seen, metrics.exchanges.started()), (served, served as u64));
    assert!(served > 500, "{served} requests are no load");

    // Known by identity: the same record, and connections that outlived the storm.
    assert!(Arc::ptr_eq(&anchor, &proxy.backend(backends[0].addr())));
    let requests = backends[0].requests();
    let used: HashSet<usize> = requests.iter().map(|request| request.connection).collect();
    let at_a_time: usize = CLIENTS.iter().sum();
    assert!(used.len() <= at_a_time * 2, "{} connections for {} requests", used.len(), requests.len());

    // Nothing is left of those that went: no task, no connection, no series.
    let members = proxy.running.directory().snapshot().members().count();
    let tasks = || metrics.backend_tasks(evergate::probe::TASK).get();
    eventually(PATIENCE, || tasks() == i64::try_from(members).unwrap()).await;
    let here = |backend: &Backend| {
        let snapshot = proxy.running.directory().snapshot();
        snapshot.members().any(|(_, member)| member.params.authority.as_str() == backend.addr().to_string())
    };
    for backend in backends.iter().filter(|backend| !here(backend)) {
        eventually(PATIENCE, || backend.open_connections() == 0).await;
        let metrics = metrics.render();
        let series: Vec<_> =
            metrics.lines().filter(|line| line.contains(&backend.addr().to_string())).collect();
        assert!(series.is_empty(), "{series:?}");
    }
}
