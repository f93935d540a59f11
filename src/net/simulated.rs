//! A network in memory, on tokio's clock: hosts around evergate, and a link to each with its own conditions.
//!
//! A link has latency, jitter (each segment draws its own, so connections overtake each other while the bytes of one
//! keep their order), a rate, and may be cut in either direction: what is under way then waits, as TCP's
//! retransmissions do, and nobody is told. A host may refuse connections, not answer them, forget the ones it has with or
//! without a RST to whatever still arrives, and any connection may end at any byte, by FIN or RST. Chance comes from
//! the network's seed alone.
//!
//! It is TCP as an application sees it: an ordered stream, a full buffer, an end, a reset. Packets, windows, congestion
//! and names are not modelled, nor is Nagle's algorithm: production switches it off.

// It keeps tokio's time, which its tests pause: the very clock that `crate::clock` reads.
#![allow(clippy::disallowed_methods)]

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

/// What both kernels hold of one direction of a connection. As much as Linux starts with.
const BUFFER_BYTES: usize = 128 * 1024;
/// A lost SYN is sent again after this, then after twice as long, and so on (RFC 6298 §2).
const SYN_AGAIN: Duration = Duration::from_secs(1);
/// What was lost while a link was cut is sent again within so long of its mending (a backed-off timer of TCP's).
const LOST_AGAIN_MIN: Duration = Duration::from_millis(200);
const LOST_AGAIN_MAX: Duration = Duration::from_millis(1_600);
/// A chopped link carries no more than this at a time.
const CHOP_BYTES_MAX: usize = 48;

thread_local! {
    static HERE: RefCell<Option<Network>> = const { RefCell::new(None) };
}

/// The network of a thread. Cloning gives the same one.
#[derive(Clone, Debug)]
pub(crate) struct Network(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    rng: fastrand::Rng,
    hosts: BTreeMap<SocketAddr, Host>,
}

/// Conditions of a link. The default is a local network: no delay, no bound.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Conditions {
    /// One way.
    pub(crate) latency: Duration,
    /// Each segment is late by up to so much more.
    pub(crate) jitter: Duration,
    /// In each direction, all its connections together.
    pub(crate) bytes_per_second: Option<u32>,
    /// Segments are tiny.
    pub(crate) chopped: bool,
}

/// How a host meets new connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Door {
    /// Accepts them, where somebody listens.
    #[default]
    Open,
    /// Refuses them.
    Shut,
    /// Does not answer: its accept queue is full, or a firewall drops the SYN.
    Silent,
}

/// How a connection is cut short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// FIN.
    Closed,
    /// RST.
    Reset,
}

#[derive(Debug)]
struct Host {
    link: Arc<Mutex<Link>>,
    door: Door,
    listening: Option<Arc<Mutex<Queue>>>,
    wires: Vec<Weak<Mutex<Wire>>>,
    /// The connections made next break after so many bytes from the host.
    breaks: Option<(std::ops::Range<u64>, End)>,
}

#[derive(Debug)]
struct Link {
    conditions: Conditions,
    /// Towards the host, and from it.
    open: [bool; 2],
    /// The rate is used up until then.
    busy: [Instant; 2],
}

#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<Socket>,
    accepting: Option<Waker>,
}

/// Which end of a connection: evergate's or the host's. Also the direction of what is written there.
const NEAR: usize = 0;
const FAR: usize = 1;

/// A connection.
#[derive(Debug)]
struct Wire {
    link: Arc<Mutex<Link>>,
    rng: fastrand::Rng,
    /// By who writes.
    pipes: [Pipe; 2],
    /// Nothing passes any more and nobody is told.
    forgotten: bool,
    /// The host knows nothing of it any more.
    rebooted: bool,
    /// Since when not everything passes.
    broken: Option<Instant>,
    /// Silence that evergate's kernel bears (`net::give_up_after`).
    patience: Option<Duration>,
}

/// One direction.
#[derive(Debug, Default)]
struct Pipe {
    under_way: VecDeque<(Instant, Segment)>,
    bytes_under_way: usize,
    latest: Option<Instant>,
    arrived: VecDeque<u8>,
    /// Arrived, but its acknowledgement is lost so far.
    unacknowledged: usize,
    /// The end that arrived.
    end: Option<End>,
    /// The writer has said its last.
    closed: bool,
    /// Nobody reads any more: what arrives is answered by RST.
    deaf: bool,
    written: u64,
    breaks: Option<(u64, End)>,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

#[derive(Debug)]
enum Segment {
    Data(Vec<u8>),
    End(End),
}

/// One end of a simulated connection. Dropping it closes: by RST where bytes were left unread, as Linux does.
#[derive(Debug)]
pub struct Socket {
    wire: Arc<Mutex<Wire>>,
    side: usize,
    timer: Pin<Box<Sleep>>,
    reset_on_drop: Mutex<bool>,
}

impl Network {
    /// An empty one, of this thread until another takes its place or the guard is dropped.
    pub(crate) fn of_this_thread(seed: u64) -> (Self, Leave) {
        let network =
            Self(Arc::new(Mutex::new(Inner { rng: fastrand::Rng::with_seed(seed), hosts: BTreeMap::new() })));
        HERE.with_borrow_mut(|here| *here = Some(network.clone()));
        (network, Leave)
    }

    /// The one of this thread.
    pub(crate) fn here() -> Option<Self> {
        HERE.with_borrow(Clone::clone)
    }

    /// Adds a host.
    pub(crate) fn add(&self, host: SocketAddr, conditions: Conditions) {
        let now = Instant::now();
        let link = Arc::new(Mutex::new(Link { conditions, open: [true; 2], busy: [now; 2] }));
        let host_there = Host { link, door: Door::Open, listening: None, wires: Vec::new(), breaks: None };
        self.0.lock().hosts.insert(host, host_there);
    }

    /// Other conditions, for what is sent from now on.
    pub(crate) fn set_conditions(&self, host: SocketAddr, conditions: Conditions) {
        self.host(host, |there| there.link.lock().conditions = conditions);
    }

    /// How the host meets connections from now on.
    pub(crate) fn set_door(&self, host: SocketAddr, door: Door) {
        self.host(host, |there| there.door = door);
    }

    /// Connections made from now on end so, after a number of bytes from the host out of the range.
    pub(crate) fn set_breaks(&self, host: SocketAddr, breaks: Option<(std::ops::Range<u64>, End)>) {
        self.host(host, |there| there.breaks = breaks);
    }

    /// Opens or cuts the link, towards the host and from it. What was under way arrives once it is open again.
    pub(crate) fn set_open(&self, host: SocketAddr, open: [bool; 2]) {
        self.host(host, |there| {
            let before = std::mem::replace(&mut there.link.lock().open, open);
            let now = Instant::now();
            for wire in there.wires.iter().filter_map(Weak::upgrade) {
                let mut wire = wire.lock();
                wire.broken = if open == [true; 2] { None } else { wire.broken.or(Some(now)) };
                for way in [NEAR, FAR] {
                    if open[way] && !before[way] {
                        wire.send_again(way, now);
                        // The acknowledgements of the other direction.
                        wire.pipes[1 - way].unacknowledged = 0;
                    }
                }
                wire.wake_all();
            }
        });
    }

    /// The connections of the host are dead and neither side is told: a table of some NAT was lost, a cable pulled for
    /// good, a machine turned off.
    pub(crate) fn forget(&self, host: SocketAddr) {
        self.host(host, |there| {
            for wire in there.wires.drain(..).filter_map(|wire| wire.upgrade()) {
                let mut wire = wire.lock();
                wire.forgotten = true;
                wire.broken = Some(Instant::now());
                wire.wake_all();
            }
        });
    }

    /// The host has lost its connections and tells who still speaks there, by RST: it was turned off and on again.
    pub(crate) fn reboot(&self, host: SocketAddr) {
        self.host(host, |there| {
            for wire in there.wires.drain(..).filter_map(|wire| wire.upgrade()) {
                let mut wire = wire.lock();
                wire.rebooted = true;
                wire.broken = Some(Instant::now());
                wire.pipes[NEAR].deaf = true;
                wire.pipes[FAR].closed = true;
                let under_way = std::mem::take(&mut wire.pipes[NEAR].under_way);
                wire.pipes[NEAR].bytes_under_way = 0;
                if !under_way.is_empty() {
                    wire.answer_by_reset(NEAR);
                }
                wire.wake_all();
            }
        });
    }

    /// From now on connections to the host wait there to be accepted.
    pub(crate) fn listen(&self, host: SocketAddr) -> Listener {
        let queue = Arc::new(Mutex::new(Queue::default()));
        self.host(host, |there| there.listening = Some(queue.clone()));
        Listener { network: self.clone(), host, queue }
    }

    /// A connection from the host to evergate: the host's end, and evergate's.
    pub(crate) fn come_in(&self, host: SocketAddr) -> (Socket, Socket) {
        let inner = &mut *self.0.lock();
        let there = inner.hosts.get_mut(&host).expect("a host of this network");
        let (near, far) = wire(there, &mut inner.rng);
        (far, near)
    }

    /// Connects to a host.
    pub(crate) async fn connect(&self, host: SocketAddr) -> io::Result<Socket> {
        let mut again = SYN_AGAIN;
        loop {
            match self.knock(host) {
                Knock::Lost => tokio::time::sleep(again).await,
                Knock::Refused(after) => {
                    tokio::time::sleep(after).await;
                    return Err(io::ErrorKind::ConnectionRefused.into());
                }
                Knock::Stands(socket, after) => {
                    tokio::time::sleep(after).await;
                    return Ok(socket);
                }
            }
            again *= 2;
        }
    }

    fn knock(&self, address: SocketAddr) -> Knock {
        let inner = &mut *self.0.lock();
        let Some(host) = inner.hosts.get_mut(&address) else { return Knock::Lost };
        let round_trip = {
            let link = host.link.lock();
            // One-way is no better: SYN and SYN-ACK both have to pass.
            if link.open != [true; 2] {
                return Knock::Lost;
            }
            link.conditions.delay(&mut inner.rng) + link.conditions.delay(&mut inner.rng)
        };
        match (host.door, host.listening.clone()) {
            (Door::Silent, _) => Knock::Lost,
            (Door::Open, Some(queue)) => {
                let (near, far) = wire(host, &mut inner.rng);
                let mut queue = queue.lock();
                queue.waiting.push_back(far);
                queue.accepting.take().into_iter().for_each(Waker::wake);
                Knock::Stands(near, round_trip)
            }
            (Door::Shut, _) | (Door::Open, None) => Knock::Refused(round_trip),
        }
    }

    fn host<T>(&self, host: SocketAddr, f: impl FnOnce(&mut Host) -> T) -> T {
        f(self.0.lock().hosts.get_mut(&host).expect("a host of this network"))
    }
}

/// What a SYN meets.
enum Knock {
    Lost,
    Refused(Duration),
    Stands(Socket, Duration),
}

/// The thread leaves its network when this is dropped.
#[derive(Debug)]
pub(crate) struct Leave;

impl Drop for Leave {
    fn drop(&mut self) {
        HERE.with_borrow_mut(|here| *here = None);
    }
}

/// A host's listening socket. Dropping it refuses connections, and closes those that wait.
#[derive(Debug)]
pub(crate) struct Listener {
    network: Network,
    host: SocketAddr,
    queue: Arc<Mutex<Queue>>,
}

impl Listener {
    /// The next connection.
    pub(crate) async fn accept(&self) -> Socket {
        std::future::poll_fn(|cx| {
            let mut queue = self.queue.lock();
            match queue.waiting.pop_front() {
                Some(socket) => Poll::Ready(socket),
                None => {
                    queue.accepting = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let waiting = std::mem::take(&mut self.queue.lock().waiting);
        waiting.iter().for_each(Socket::reset_on_drop);
        self.network.host(self.host, |there| {
            if there.listening.as_ref().is_some_and(|queue| Arc::ptr_eq(queue, &self.queue)) {
                there.listening = None;
            }
        });
        drop(waiting);
    }
}

impl Conditions {
    fn delay(&self, rng: &mut fastrand::Rng) -> Duration {
        let jitter = u64::try_from(self.jitter.as_micros()).unwrap_or(u64::MAX);
        self.latency + Duration::from_micros(rng.u64(0..=jitter))
    }
}

/// A new connection with `host`: evergate's end, and the host's.
fn wire(host: &mut Host, rng: &mut fastrand::Rng) -> (Socket, Socket) {
    let mut pipes = [Pipe::default(), Pipe::default()];
    pipes[FAR].breaks = host.breaks.as_ref().map(|(range, end)| (rng.u64(range.clone()), *end));
    let wire = Wire {
        link: host.link.clone(),
        rng: rng.fork(),
        pipes,
        forgotten: false,
        rebooted: false,
        broken: None,
        patience: None,
    };
    let wire = Arc::new(Mutex::new(wire));
    host.wires.retain(|wire| wire.strong_count() > 0);
    host.wires.push(Arc::downgrade(&wire));
    (Socket::new(wire.clone(), NEAR), Socket::new(wire, FAR))
}

impl Wire {
    /// Writes as much as there is room for; `None` when there is none.
    fn write(&mut self, way: usize, bytes: &[u8]) -> Option<usize> {
        let pipe = &mut self.pipes[way];
        let room =
            BUFFER_BYTES.saturating_sub(pipe.bytes_under_way + pipe.arrived.len() + pipe.unacknowledged);
        if room == 0 {
            return None;
        }
        let mut bytes = &bytes[..bytes.len().min(room)];
        let n = bytes.len();
        if self.forgotten {
            pipe.unacknowledged += n;
            return Some(n);
        }
        if pipe.deaf {
            self.answer_by_reset(way);
            return Some(n);
        }
        let mut breaks = None;
        if let Some((after, end)) = pipe.breaks.filter(|(after, _)| pipe.written + n as u64 > *after) {
            bytes = &bytes[..(after - pipe.written) as usize];
            breaks = Some(end);
        }
        pipe.written += bytes.len() as u64;
        while !bytes.is_empty() {
            let chopped = self.link.lock().conditions.chopped;
            let piece =
                if chopped { self.rng.usize(1..=CHOP_BYTES_MAX).min(bytes.len()) } else { bytes.len() };
            self.send(way, Segment::Data(bytes[..piece].to_vec()));
            bytes = &bytes[piece..];
        }
        if let Some(end) = breaks {
            self.close(way, end);
            // Whoever wrote learns it too, and so does who goes on writing to it.
            self.answer_by_reset(way);
            self.pipes[1 - way].deaf = true;
        }
        Some(n)
    }

    fn close(&mut self, way: usize, end: End) {
        if !std::mem::replace(&mut self.pipes[way].closed, true) || end == End::Reset {
            self.send(way, Segment::End(end));
        }
    }

    /// What was written there met nobody.
    fn answer_by_reset(&mut self, way: usize) {
        self.send(1 - way, Segment::End(End::Reset));
    }

    fn send(&mut self, way: usize, segment: Segment) {
        if self.forgotten {
            return;
        }
        let now = Instant::now();
        let pipe = &mut self.pipes[way];
        let mut link = self.link.lock();
        let length = if let Segment::Data(bytes) = &segment { bytes.len() } else { 0 };
        let begun = link.busy[way].max(now);
        let sent = match link.conditions.bytes_per_second {
            Some(rate) => begun + Duration::from_secs_f64(length as f64 / f64::from(rate)),
            None => begun,
        };
        link.busy[way] = sent;
        let at = (sent + link.conditions.delay(&mut self.rng)).max(pipe.latest.unwrap_or(now));
        pipe.latest = Some(at);
        pipe.bytes_under_way += length;
        pipe.under_way.push_back((at, segment));
        // Else it waits for what is before this one.
        if pipe.under_way.len() == 1 {
            pipe.reader.take().into_iter().for_each(Waker::wake);
        }
    }

    /// When evergate's kernel gives up: it hears nothing, or what it has sent is not acknowledged.
    fn given_up(&self, side: usize) -> Option<Instant> {
        let open = self.link.lock().open;
        let deaf = self.forgotten || self.rebooted || !open[FAR];
        let unheard = !open[NEAR] && self.pipes[NEAR].bytes_under_way > 0;
        let patience = self.patience.filter(|_| side == NEAR && (deaf || unheard))?;
        Some(self.broken? + patience)
    }

    /// Takes in what has arrived by now; the moment at which more will.
    fn arrive(&mut self, way: usize, now: Instant) -> Option<Instant> {
        let open = self.link.lock().open;
        if self.forgotten || !open[way] {
            return None;
        }
        let pipe = &mut self.pipes[way];
        while let Some((at, _)) = pipe.under_way.front() {
            if *at > now {
                return Some(*at);
            }
            match pipe.under_way.pop_front() {
                Some((_, Segment::Data(bytes))) => {
                    pipe.bytes_under_way -= bytes.len();
                    if !open[1 - way] {
                        pipe.unacknowledged += bytes.len();
                    }
                    pipe.arrived.extend(bytes);
                }
                // A reset goes over a close.
                Some((_, Segment::End(end))) if pipe.end != Some(End::Reset) => pipe.end = Some(end),
                Some((_, Segment::End(_))) => {}
                None => {}
            }
        }
        None
    }

    /// The link is open again: what was lost meanwhile is sent once more.
    fn send_again(&mut self, way: usize, now: Instant) {
        let wait = self.rng.u64(LOST_AGAIN_MIN.as_millis() as u64..=LOST_AGAIN_MAX.as_millis() as u64);
        let at = now + Duration::from_millis(wait);
        for (due, _) in &mut self.pipes[way].under_way {
            *due = (*due).max(at);
        }
        self.pipes[way].latest = self.pipes[way].latest.map(|latest| latest.max(at));
    }

    fn wake_all(&mut self) {
        for pipe in &mut self.pipes {
            pipe.reader.take().into_iter().for_each(Waker::wake);
            pipe.writer.take().into_iter().for_each(Waker::wake);
        }
    }
}

impl Socket {
    fn new(wire: Arc<Mutex<Wire>>, side: usize) -> Self {
        let timer = Box::pin(tokio::time::sleep_until(Instant::now()));
        Self { wire, side, timer, reset_on_drop: Mutex::new(false) }
    }

    /// As TCP's keep-alives and its user timeout do.
    pub(crate) fn give_up_after(&self, patience: Duration) {
        self.wire.lock().patience = Some(patience);
    }

    /// Dropping it resets the connection.
    pub(crate) fn reset_on_drop(&self) {
        *self.reset_on_drop.lock() = true;
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            let mut wire = this.wire.lock();
            let from = 1 - this.side;
            let next = wire.arrive(from, Instant::now());
            let pipe = &mut wire.pipes[from];
            if !pipe.arrived.is_empty() {
                let (bytes, _) = pipe.arrived.as_slices();
                let n = bytes.len().min(buf.remaining());
                buf.put_slice(&bytes[..n]);
                pipe.arrived.drain(..n);
                pipe.writer.take().into_iter().for_each(Waker::wake);
                return Poll::Ready(Ok(()));
            }
            match pipe.end {
                Some(End::Closed) => return Poll::Ready(Ok(())),
                Some(End::Reset) => return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
                None => {}
            }
            pipe.reader = Some(cx.waker().clone());
            let given_up = wire.given_up(this.side);
            if given_up.is_some_and(|at| at <= Instant::now()) {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            let Some(next) = next.into_iter().chain(given_up).min() else { return Poll::Pending };
            drop(wire);
            if this.timer.deadline() != next {
                this.timer.as_mut().reset(next);
            }
            std::task::ready!(this.timer.as_mut().poll(cx));
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut wire = self.wire.lock();
        // A reset is known as soon as it has arrived, whatever was left to read before it.
        wire.arrive(1 - self.side, Instant::now());
        if wire.pipes[1 - self.side].end == Some(End::Reset) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if wire.given_up(self.side).is_some_and(|at| at <= Instant::now()) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        if wire.pipes[self.side].closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        match wire.write(self.side, bytes) {
            Some(n) => Poll::Ready(Ok(n)),
            None => {
                wire.pipes[self.side].writer = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.wire.lock().close(self.side, End::Closed);
        Poll::Ready(Ok(()))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let mut wire = self.wire.lock();
        if wire.forgotten || (wire.rebooted && self.side == FAR) {
            return;
        }
        wire.arrive(1 - self.side, Instant::now());
        let incoming = &mut wire.pipes[1 - self.side];
        incoming.deaf = true;
        let unread = !incoming.arrived.is_empty() || incoming.bytes_under_way > 0;
        let end = if unread || *self.reset_on_drop.lock() { End::Reset } else { End::Closed };
        // The other side may be waiting for room.
        incoming.arrived.clear();
        incoming.under_way.clear();
        incoming.bytes_under_way = 0;
        incoming.writer.take().into_iter().for_each(Waker::wake);
        if incoming.end != Some(End::Reset) {
            wire.close(self.side, end);
        }
    }
}

mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    const HOST: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1)), 80);
    const MS: fn(u64) -> Duration = Duration::from_millis;

    /// evergate's end and the host's, over a link of 10 ms.
    async fn connected() -> (Network, Leave, Socket, Socket) {
        let (network, leave) = Network::of_this_thread(7);
        network.add(HOST, Conditions { latency: MS(10), ..Conditions::default() });
        let listener = network.listen(HOST);
        let near = network.connect(HOST).await.unwrap();
        let far = listener.accept().await;
        (network, leave, near, far)
    }

    async fn read(socket: &mut Socket) -> io::Result<String> {
        let mut bytes = [0; 100];
        socket.read(&mut bytes).await.map(|n| String::from_utf8_lossy(&bytes[..n]).into_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_arrive_after_the_latency_and_an_end_behind_them() {
        let (_network, _leave, mut near, mut far) = connected().await;
        let sent = Instant::now();
        near.write_all(b"hello").await.unwrap();
        near.shutdown().await.unwrap();
        assert_eq!((read(&mut far).await.unwrap(), sent.elapsed()), ("hello".to_owned(), MS(10)));
        assert_eq!(read(&mut far).await.unwrap(), "");
        far.write_all(b"bye").await.unwrap();
        drop(far);
        assert_eq!(read(&mut near).await.unwrap(), "bye");
        assert_eq!(read(&mut near).await.unwrap(), "");
    }

    #[tokio::test(start_paused = true)]
    async fn a_cut_link_holds_what_is_under_way_until_it_is_mended() {
        let (network, _leave, mut near, mut far) = connected().await;
        far.write_all(b"late").await.unwrap();
        network.set_open(HOST, [true, false]);
        assert!(tokio::time::timeout(MS(5_000), read(&mut near)).await.is_err());
        near.write_all(b"heard").await.unwrap();
        assert_eq!(read(&mut far).await.unwrap(), "heard");
        assert!(tokio::time::timeout(MS(5_000), network.connect(HOST)).await.is_err());
        let mended = Instant::now();
        network.set_open(HOST, [true; 2]);
        assert_eq!(read(&mut near).await.unwrap(), "late");
        assert!((LOST_AGAIN_MIN..=LOST_AGAIN_MAX).contains(&mended.elapsed()), "{:?}", mended.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_forgotten_connection_is_silent_until_the_kernel_gives_it_up() {
        let (network, _leave, mut near, mut far) = connected().await;
        network.forget(HOST);
        near.write_all(b"anybody there?").await.unwrap();
        assert!(tokio::time::timeout(MS(600_000), read(&mut far)).await.is_err());
        near.give_up_after(MS(10_000));
        assert_eq!(read(&mut near).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop(near);
        assert!(
            tokio::time::timeout(MS(600_000), read(&mut far)).await.is_err(),
            "nor is it told of the end"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_was_turned_off_and_on_answers_by_reset() {
        let (network, _leave, mut near, far) = connected().await;
        network.reboot(HOST);
        drop(far);
        assert!(tokio::time::timeout(MS(3_000), read(&mut near)).await.is_err(), "nothing comes unasked");
        near.write_all(b"anybody there?").await.unwrap();
        assert_eq!(read(&mut near).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test(start_paused = true)]
    async fn connections_break_at_their_byte_and_doors_close() {
        let (network, _leave, _near, _far) = connected().await;
        let listener = network.listen(HOST);
        for (end, kind) in [(End::Closed, None), (End::Reset, Some(io::ErrorKind::ConnectionReset))] {
            network.set_breaks(HOST, Some((3..4, end)));
            let (mut near, mut far) = (network.connect(HOST).await.unwrap(), listener.accept().await);
            far.write_all(b"broken").await.unwrap();
            assert_eq!(read(&mut near).await.unwrap(), "bro");
            assert_eq!(read(&mut near).await.err().map(|error| error.kind()), kind);
            assert!(far.write_all(b"more").await.is_err());
        }
        network.set_door(HOST, Door::Shut);
        assert_eq!(network.connect(HOST).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        network.set_door(HOST, Door::Silent);
        assert!(tokio::time::timeout(MS(600_000), network.connect(HOST)).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_buffer_waits_for_its_reader_and_a_narrow_link_takes_its_time() {
        let (network, _leave, mut near, mut far) = connected().await;
        let rate = Some(1_000);
        network.set_conditions(HOST, Conditions { bytes_per_second: rate, ..Conditions::default() });
        let begun = Instant::now();
        near.write_all(&[0; 2_000]).await.unwrap();
        let mut all = vec![0; 2_000];
        far.read_exact(&mut all).await.unwrap();
        assert_eq!(begun.elapsed(), MS(2_000));
        network.set_conditions(HOST, Conditions::default());
        let mut much = vec![0; 2 * BUFFER_BYTES];
        assert!(tokio::time::timeout(MS(1_000), near.write_all(&much)).await.is_err());
        assert_eq!(far.read_exact(&mut much[..BUFFER_BYTES]).await.unwrap(), BUFFER_BYTES);
    }
}
