//! The least reverse proxy one can write on hyper: the yardstick for what the library and the runtime
//! cost, and the instrument behind docs/adr/0001-runtime-model.md. No failover, no limits, no logs.
//!
//! LISTEN_PORT, BACKENDS, THREADS as for every system. MODE: percore (default: one current-thread
//! runtime and SO_REUSEPORT listener a core, thread-local pool), local (the same, tasks not `Send`),
//! multi (multi-thread runtime, hyper-util's legacy client). REPLAY: 0 stream the body through, 1 keep
//! it as one buffer, 2 keep it as the frames it came in. 0/1 switches: PFLUSH HALF TIMER DATE TITLE PRES
//! (server), CTITLE (client), BOXED (response body); SWRITEV, CWRITEV: -1 auto, 0, 1. Sizes: SBUF_MAX,
//! CBUF_MAX, CBUF (exact client read buffer), MAXHDR. Features mimalloc, jemalloc choose the allocator.
use bytes::Bytes;
use http_body_util::{combinators::UnsyncBoxBody, BodyExt, Either, Full};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http1::{self as cl, SendRequest};
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Request, Response, Uri};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::cell::RefCell;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::OnceLock;
use std::task::{Context, Poll};
use std::time::Duration;
#[cfg(feature = "mimalloc")]
#[global_allocator]
static A: mimalloc::MiMalloc = mimalloc::MiMalloc;
#[cfg(feature = "jemalloc")]
#[global_allocator]
static A: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

struct Opt {
    backends: Vec<(SocketAddr, HeaderValue)>,
    sbuf_max: usize,
    swritev: i32,
    pflush: bool,
    half: bool,
    timer: bool,
    date: bool,
    title: bool,
    sheaders: usize,
    cbuf_exact: usize,
    cbuf_max: usize,
    cwritev: i32,
    ctitle: bool,
    pres: bool,
    replay: bool,
    rope: bool,
    boxed: bool,
    abs: bool,
}
static O: OnceLock<Opt> = OnceLock::new();
static LOAD: [AtomicUsize; 64] = [const { AtomicUsize::new(0) }; 64];
/// The options.
fn o() -> &'static Opt {
    O.get().unwrap()
}
fn ev(k: &str, d: i64) -> i64 {
    std::env::var(k).ok().and_then(|v| v.parse().ok()).unwrap_or(d)
}

/// A request body kept for replay as the frames it came in: no copy.
struct Rope {
    v: std::sync::Arc<Vec<Bytes>>,
    at: usize,
    left: u64,
}
impl Body for Rope {
    type Data = Bytes;
    type Error = hyper::Error;
    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let at = self.at;
        self.at += 1;
        Poll::Ready(match self.v.get(at).cloned() {
            Some(b) => {
                self.left -= b.len() as u64;
                Some(Ok(Frame::data(b)))
            }
            None => None,
        })
    }
    fn is_end_stream(&self) -> bool {
        self.at >= self.v.len()
    }
    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}
type Up = Either<Incoming, Either<Full<Bytes>, Rope>>;
#[derive(Default)]
struct PoolT {
    idle: Vec<Vec<SendRequest<Up>>>,
    rr: usize,
}
thread_local! { static POOL: RefCell<PoolT> = RefCell::new(PoolT::default()); }

struct Load(usize);
impl Drop for Load {
    fn drop(&mut self) {
        LOAD[self.0].fetch_sub(1, Relaxed);
    }
}

pin_project_lite::pin_project! {
    struct Relay { #[pin] inner: Incoming, load: Option<Load>, bytes: u64, frames: u64, _back: Option<Back> }
}
impl Body for Relay {
    type Data = Bytes;
    type Error = hyper::Error;
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let me = self.project();
        let r = me.inner.poll_frame(cx);
        match &r {
            Poll::Ready(Some(Ok(f))) => {
                if let Some(d) = f.data_ref() {
                    *me.bytes += d.len() as u64;
                    *me.frames += 1;
                }
            }
            Poll::Ready(_) => {
                me.load.take();
            }
            _ => {}
        }
        r
    }
    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }
    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
struct Back {
    i: usize,
    tx: Option<SendRequest<Up>>,
}
impl Drop for Back {
    fn drop(&mut self) {
        if let Some(t) = self.tx.take() {
            if !t.is_closed() {
                let _ = POOL.try_with(|p| p.borrow_mut().idle[self.i].push(t));
            }
        }
    }
}

fn pick(rr: &mut usize) -> usize {
    let n = o().backends.len();
    *rr = (*rr + 1) % n;
    let mut best = *rr;
    for k in 0..n {
        let i = (*rr + k) % n;
        if LOAD[i].load(Relaxed) < LOAD[best].load(Relaxed) {
            best = i;
        }
    }
    LOAD[best].fetch_add(1, Relaxed);
    best
}
fn strip(h: &mut HeaderMap) {
    if let Some(c) = h.remove(header::CONNECTION) {
        if let Ok(s) = c.to_str() {
            for t in s.split(',') {
                let t = t.trim();
                if !t.eq_ignore_ascii_case("close") && !t.eq_ignore_ascii_case("keep-alive") {
                    h.remove(t);
                }
            }
        }
    }
    h.remove("keep-alive");
    h.remove(header::TE);
    h.remove(header::TRAILER);
    h.remove(header::UPGRADE);
    h.remove("proxy-connection");
    h.remove(header::PROXY_AUTHORIZATION);
    h.remove(header::TRANSFER_ENCODING);
}
async fn connect(i: usize) -> Result<SendRequest<Up>, Box<dyn std::error::Error + Send + Sync>> {
    let s = tokio::net::TcpStream::connect(o().backends[i].0).await?;
    s.set_nodelay(true)?;
    let mut b = cl::Builder::new();
    if o().cbuf_exact > 0 {
        b.read_buf_exact_size(Some(o().cbuf_exact));
    }
    if o().cbuf_max > 0 {
        b.max_buf_size(o().cbuf_max);
    }
    if o().cwritev >= 0 {
        b.writev(o().cwritev > 0);
    }
    b.title_case_headers(o().ctitle).preserve_header_case(o().pres);
    let (tx, conn) = b.handshake(TokioIo::new(s)).await?;
    if LOCAL.get() {
        tokio::task::spawn_local(async move {
            let _ = conn.await;
        });
    } else {
        tokio::spawn(async move {
            let _ = conn.await;
        });
    }
    Ok(tx)
}
async fn body_of(b: Incoming) -> Result<Up, hyper::Error> {
    if o().replay {
        if b.is_end_stream() {
            return Ok(Either::Right(Either::Left(Full::new(Bytes::new()))));
        }
        let mut b = b;
        // the first frame is nearly always the whole body: no copy then
        let want = b.size_hint().exact();
        let Some(f) = b.frame().await else {
            return Ok(Either::Right(Either::Left(Full::new(Bytes::new()))));
        };
        let first = f?.into_data().unwrap_or_default();
        if want == Some(first.len() as u64) {
            return Ok(Either::Right(Either::Left(Full::new(first))));
        }
        if o().rope {
            let mut v = Vec::with_capacity(4);
            let mut n = first.len() as u64;
            v.push(first);
            while let Some(f) = b.frame().await {
                if let Ok(d) = f?.into_data() {
                    n += d.len() as u64;
                    v.push(d);
                }
            }
            return Ok(Either::Right(Either::Right(Rope { v: std::sync::Arc::new(v), at: 0, left: n })));
        }
        let mut v = Vec::with_capacity(want.unwrap_or(16384) as usize);
        v.extend_from_slice(&first);
        while let Some(f) = b.frame().await {
            if let Ok(d) = f?.into_data() {
                v.extend_from_slice(&d);
            }
        }
        return Ok(Either::Right(Either::Left(Full::new(Bytes::from(v)))));
    }
    Ok(Either::Left(b))
}
fn uri_for(uri: &Uri, i: usize) -> Uri {
    let pq = uri.path_and_query().cloned().unwrap_or_else(|| "/".parse().unwrap());
    if o().abs {
        Uri::builder()
            .scheme("http")
            .authority(o().backends[i].0.to_string())
            .path_and_query(pq)
            .build()
            .unwrap()
    } else {
        let mut p = hyper::http::uri::Parts::default();
        p.path_and_query = Some(pq);
        Uri::from_parts(p).unwrap()
    }
}
type RespBody = Either<Relay, UnsyncBoxBody<Bytes, hyper::Error>>;
async fn handle(
    req: Request<Incoming>,
) -> Result<Response<RespBody>, Box<dyn std::error::Error + Send + Sync>> {
    let (mut p, b) = req.into_parts();
    strip(&mut p.headers);
    let body = body_of(b).await?;
    let i = POOL.with(|p| pick(&mut p.borrow_mut().rr));
    let load = Load(i);
    p.uri = uri_for(&p.uri, i);
    p.headers.insert(header::HOST, o().backends[i].1.clone());
    p.version = hyper::Version::HTTP_11;
    let mut tx = loop {
        let t = POOL.with(|p| {
            let mut p = p.borrow_mut();
            if p.idle.len() <= i {
                p.idle.resize_with(64, Vec::new);
            }
            p.idle[i].pop()
        });
        match t {
            Some(t) if t.is_ready() => break t,
            Some(t) if t.is_closed() => continue,
            Some(mut t) => {
                if t.ready().await.is_ok() {
                    break t;
                }
            }
            None => break connect(i).await?,
        }
    };
    let r = tx.send_request(Request::from_parts(p, body)).await?;
    let (mut p, b) = r.into_parts();
    strip(&mut p.headers);
    let relay =
        Relay { inner: b, load: Some(load), bytes: 0, frames: 0, _back: Some(Back { i, tx: Some(tx) }) };
    Ok(Response::from_parts(
        p,
        if o().boxed { Either::Right(UnsyncBoxBody::new(relay)) } else { Either::Left(relay) },
    ))
}

type Legacy = hyper_util::client::legacy::Client<hyper_util::client::legacy::connect::HttpConnector, Up>;
static LEGACY: OnceLock<Legacy> = OnceLock::new();
static RR: AtomicUsize = AtomicUsize::new(0);
async fn handle_legacy(
    req: Request<Incoming>,
) -> Result<Response<RespBody>, Box<dyn std::error::Error + Send + Sync>> {
    let (mut p, b) = req.into_parts();
    strip(&mut p.headers);
    let body = body_of(b).await?;
    let mut rr = RR.fetch_add(1, Relaxed);
    let i = pick(&mut rr);
    let load = Load(i);
    p.uri = Uri::builder()
        .scheme("http")
        .authority(o().backends[i].1.to_str().unwrap())
        .path_and_query(p.uri.path_and_query().cloned().unwrap())
        .build()?;
    p.headers.insert(header::HOST, o().backends[i].1.clone());
    p.version = hyper::Version::HTTP_11;
    let r = LEGACY.get().unwrap().request(Request::from_parts(p, body)).await?;
    let (mut p, b) = r.into_parts();
    strip(&mut p.headers);
    let relay = Relay { inner: b, load: Some(load), bytes: 0, frames: 0, _back: None };
    Ok(Response::from_parts(
        p,
        if o().boxed { Either::Right(UnsyncBoxBody::new(relay)) } else { Either::Left(relay) },
    ))
}

fn builder() -> hyper::server::conn::http1::Builder {
    let mut b = hyper::server::conn::http1::Builder::new();
    let o = o();
    if o.sbuf_max > 0 {
        b.max_buf_size(o.sbuf_max);
    }
    if o.swritev >= 0 {
        b.writev(o.swritev > 0);
    }
    b.pipeline_flush(o.pflush)
        .half_close(o.half)
        .auto_date_header(o.date)
        .title_case_headers(o.title)
        .preserve_header_case(o.pres);
    if o.sheaders > 0 {
        b.max_headers(o.sheaders);
    }
    if o.timer {
        b.timer(TokioTimer::new());
        b.header_read_timeout(Some(Duration::from_secs(30)));
    } else {
        b.header_read_timeout(None);
    }
    b
}
fn listener(port: u16) -> tokio::net::TcpListener {
    let s = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    s.set_reuse_address(true).unwrap();
    s.set_reuse_port(true).unwrap();
    s.set_nonblocking(true).unwrap();
    s.bind(&SocketAddr::from(([127, 0, 0, 1], port)).into()).unwrap();
    s.listen(4096).unwrap();
    tokio::net::TcpListener::from_std(s.into()).unwrap()
}
macro_rules! accept {
    ($port:expr, $spawn:path, $h:path) => {{
        let l = listener($port);
        let b = builder();
        loop {
            let Ok((s, _)) = l.accept().await else { continue };
            let _ = s.set_nodelay(true);
            let c = b.serve_connection(TokioIo::new(s), hyper::service::service_fn($h));
            $spawn(async move {
                let _ = c.await;
            });
        }
    }};
}
fn main() {
    let port = ev("LISTEN_PORT", 8080) as u16;
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get()) as i64;
    let threads = ev("THREADS", cores) as usize;
    let f = |k: &str, d: bool| ev(k, d as i64) != 0;
    unsafe {
        let mut r = std::mem::zeroed();
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut r);
        r.rlim_cur = r.rlim_max;
        libc::setrlimit(libc::RLIMIT_NOFILE, &r);
    }
    let _ = O.set(Opt {
        backends: std::env::var("BACKENDS")
            .unwrap()
            .split(',')
            .map(|b| (b.parse().unwrap(), HeaderValue::from_str(b).unwrap()))
            .collect(),
        sbuf_max: ev("SBUF_MAX", 0) as usize,
        swritev: ev("SWRITEV", -1) as i32,
        pflush: f("PFLUSH", false),
        half: f("HALF", false),
        timer: f("TIMER", false),
        date: f("DATE", true),
        title: f("TITLE", false),
        sheaders: ev("MAXHDR", 0) as usize,
        cbuf_exact: ev("CBUF", 0) as usize,
        cbuf_max: ev("CBUF_MAX", 0) as usize,
        cwritev: ev("CWRITEV", -1) as i32,
        ctitle: f("CTITLE", false),
        pres: f("PRES", false),
        replay: f("REPLAY", false),
        rope: ev("REPLAY", 0) == 2,
        boxed: f("BOXED", false),
        abs: f("ABS", false),
    });
    let mode = std::env::var("MODE").unwrap_or("percore".into());
    if mode == "multi" {
        let rt =
            tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build().unwrap();
        rt.block_on(async move {
            let mut h = hyper_util::client::legacy::connect::HttpConnector::new();
            h.set_nodelay(true);
            let mut b = hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new());
            if o().cwritev >= 0 {
                b.http1_writev(o().cwritev > 0);
            }
            let _ = LEGACY.set(b.build(h));
            tokio::spawn(async move { accept!(port, tokio::spawn, handle_legacy) }).await.unwrap()
        })
    }
    let one = move |local: bool| {
        if local {
            let rt = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .event_interval(ev("EVINT", 61) as u32)
                .build_local(Default::default())
                .unwrap();
            rt.block_on(async move {
                LOCAL.set(true);
                accept!(port, tokio::task::spawn_local, handle)
            })
        } else {
            let rt = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .event_interval(ev("EVINT", 61) as u32)
                .build()
                .unwrap();
            rt.block_on(async move { accept!(port, tokio::spawn, handle) })
        }
    };
    let local = mode == "local";
    for _ in 1..threads {
        std::thread::spawn(move || one(local));
    }
    one(local)
}
thread_local! { static LOCAL: std::cell::Cell<bool> = const { std::cell::Cell::new(false) }; }
