//! Load generator (one thread, epoll, HTTP/1.1, optionally over TLS; `--h2c` in tokio/hyper).
//!   load --port 8080 --conns 64 --secs 5 --warm 1 [--rate R] [--stream] [--chunks 64] [--interval-ms 20]
//!        [--requests N] [--req-bytes 1024] [--reply-bytes 1024] [--no-keepalive] [--ramp-ms 0] [--hold] [--pids 12,13] [--cpu N] [--tls]
//! Closed loop over `conns` connections; with --rate an open loop at a fixed rate (latency from the scheduled
//! time), `conns` being the most connections it may open. --pids: processes whose CPU is read at both ends of
//! the measured window. Prints one JSON line; with --hold also ALLOPEN once all streams have sent a chunk.
use lab::{hist::Hist, http::Resp, sys::*, *};
use std::collections::{BTreeMap, VecDeque};
use std::io::{Read, Write};
use std::sync::Arc;

#[derive(PartialEq, Clone, Copy, Debug)]
enum St {
    Idle,
    Connecting,
    Active,
    Dead,
}
struct Conn {
    fd: i32,
    gen: u32,
    st: St,
    out_off: usize,
    out: Vec<u8>,
    r: Resp,
    t0: u64,
    first: u64,
    last: u64,
    chunks: u64,
    done_seen: bool,
    body_n: u64,
    head_b: Vec<u8>,
    ev: Vec<u8>,
    id: u64,
    reused: bool,
    tls: Option<Box<rustls::ClientConnection>>,
    tls_off: usize,
}
struct Cfg {
    port: u16,
    stream: bool,
    chunks: u64,
    reply: u64,
    keep: bool,
    check_id: bool,
    tmpl: Vec<u8>,
    id_off: usize,
    tls: Option<Arc<rustls::ClientConfig>>,
    timeout_ns: u64,
}
struct Stat {
    lat: Hist,
    ttft: Hist,
    gap: Hist,
    oneway: Hist,
    conn: Hist,
    req: u64,
    chunks: u64,
    bytes: u64,
    err: BTreeMap<String, u64>,
    retried: u64,
}
impl Stat {
    fn new() -> Self {
        Stat {
            lat: Hist::new(),
            ttft: Hist::new(),
            gap: Hist::new(),
            oneway: Hist::new(),
            conn: Hist::new(),
            req: 0,
            chunks: 0,
            bytes: 0,
            err: BTreeMap::new(),
            retried: 0,
        }
    }
    fn e(&mut self, k: &str) {
        *self.err.entry(k.to_string()).or_default() += 1;
    }
}

fn main() {
    let a = Args::new();
    pin(a.num("--cpu", -1));
    raise_nofile();
    let stream = a.flag("--stream");
    let chunks: u64 = a.num("--chunks", 64);
    let reply: u64 = a.num("--reply-bytes", 1024);
    let req_bytes: usize = a.num("--req-bytes", 1024);
    let keep = !a.flag("--no-keepalive");
    let path = a.str("--path", "/v1/completions");
    let model = a.str("--model", "m");
    let mut body = Vec::new();
    body.extend_from_slice(format!("{{\"model\":\"{model}\",\"user\":\"r").as_bytes());
    let id_in_body = body.len();
    body.extend_from_slice(b"000000000000\"");
    body.extend_from_slice(format!(",\"stream\":{},\"max_tokens\":{}", stream, chunks).as_bytes());
    if !a.flag("--plain-json") {
        body.extend_from_slice(
            format!(",\"interval_ms\":{},\"reply_bytes\":{}", a.num("--interval-ms", 20u64), reply)
                .as_bytes(),
        );
    }
    if path.contains("chat") {
        body.extend_from_slice(b",\"messages\":[{\"role\":\"user\",\"content\":\"");
    } else {
        body.extend_from_slice(b",\"prompt\":\"");
    }
    let tail: &[u8] = if path.contains("chat") { b"\"}]}" } else { b"\"}" };
    let pad = req_bytes.saturating_sub(body.len() + tail.len());
    body.extend(b"tell me a story about a gate that never closes. ".iter().copied().cycle().take(pad));
    body.extend_from_slice(tail);
    let mut tmpl = format!(
        "POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nUser-Agent: lab/1.0\r\nAccept: */*\r\nAuthorization: Bearer sk-lab-0123456789\r\nContent-Type: application/json\r\n{}Content-Length: {}\r\n\r\n",
        a.num::<u16>("--port", 8080),
        if keep { "" } else { "Connection: close\r\n" },
        body.len()
    )
    .into_bytes();
    let id_off = tmpl.len() + id_in_body;
    tmpl.extend_from_slice(&body);
    let tls = a.flag("--tls").then(|| tls_cfg());
    let cfg = Cfg {
        port: a.num("--port", 8080),
        stream,
        chunks,
        reply,
        keep,
        check_id: !a.flag("--no-check-id"),
        tmpl,
        id_off,
        tls,
        timeout_ns: a.num("--timeout-ms", 15000u64) * 1_000_000,
    };
    if a.flag("--h2c") {
        return h2c::main(&a, &cfg.tmpl[cfg.id_off - id_in_body..], id_in_body, stream);
    }
    let nconn: usize = a.num("--conns", 64);
    let secs: f64 = a.num("--secs", 5.0);
    let warm: f64 = a.num("--warm", 1.0);
    let rate: f64 = a.num("--rate", 0.0);
    let ramp: u64 = a.num::<u64>("--ramp-ms", 0) * 1_000_000;
    let hold = a.flag("--hold");
    // --requests N: end after N answers (use with --warm 0 and a long --secs)
    let max_req: u64 = a.num("--requests", u64::MAX);
    let pids: Vec<i32> = a.str("--pids", "").split(',').filter_map(|s| s.parse().ok()).collect();

    let ep = Ep::new();
    let mut conns: Vec<Conn> = Vec::with_capacity(nconn);
    let mut evs = vec![libc::epoll_event { events: 0, u64: 0 }; 512];
    let mut buf = vec![0u8; 256 << 10];
    let mut st = Stat::new();
    let mut next_id = 1u64;
    let t_start = now_ns();
    let t_w0 = t_start + (warm * 1e9) as u64;
    let t_w1 = t_w0 + (secs * 1e9) as u64;
    let mut measuring = false;
    let (mut cpu0, mut self0) = (cpu::Cpu::default(), 0.0);
    let mut t_real0 = 0;
    let mut idle: Vec<usize> = Vec::new();
    let mut queue: VecDeque<u64> = VecDeque::new();
    let gap_ns = if rate > 0.0 { 1e9 / rate } else { 0.0 };
    let mut k_sched = 0u64;
    let mut open_seen = 0usize;
    let mut all_open = false;
    let mut last_sweep = t_start;
    loop {
        let now = now_ns();
        if !measuring && now >= t_w0 {
            measuring = true;
            let errs = std::mem::take(&mut st.err);
            if !errs.is_empty() {
                eprintln!("errors while warming up: {errs:?}");
            }
            st = Stat::new();
            self0 = self_cpu();
            cpu0 = cpu::sample(&pids);
            t_real0 = now_ns();
        }
        if now >= t_w1 || st.req >= max_req {
            break;
        }
        if now - last_sweep > 500_000_000 {
            last_sweep = now;
            for i in 0..conns.len() {
                let c = &conns[i];
                let since = if c.last > 0 { c.last } else { c.t0 };
                if matches!(c.st, St::Active | St::Connecting) && now.saturating_sub(since) > cfg.timeout_ns {
                    st.e("timeout");
                    finish(
                        &ep,
                        &cfg,
                        &mut conns,
                        i,
                        &mut st,
                        &mut idle,
                        &mut queue,
                        rate > 0.0,
                        &mut next_id,
                        false,
                        now,
                    );
                }
            }
        }
        // arrivals
        let mut next_evt = if measuring { t_w1 } else { t_w0 };
        if rate > 0.0 {
            loop {
                let t = t_start + (k_sched as f64 * gap_ns) as u64;
                if t > now {
                    next_evt = next_evt.min(t);
                    break;
                }
                k_sched += 1;
                if let Some(i) = idle.pop() {
                    start(&ep, &cfg, &mut conns, i, t, &mut next_id, &mut st);
                } else if conns.len() < nconn {
                    conns.push(blank());
                    let i = conns.len() - 1;
                    start(&ep, &cfg, &mut conns, i, t, &mut next_id, &mut st);
                } else {
                    queue.push_back(t);
                }
            }
        } else {
            while conns.len() < nconn {
                let t = t_start + ramp * conns.len() as u64 / nconn as u64;
                if t > now {
                    next_evt = next_evt.min(t);
                    break;
                }
                conns.push(blank());
                let i = conns.len() - 1;
                start(&ep, &cfg, &mut conns, i, now, &mut next_id, &mut st);
            }
        }
        let n = ep.wait(&mut evs, Some(next_evt.saturating_sub(now_ns())));
        let tn = now_ns();
        for e in &evs[..n] {
            let i = (e.u64 & 0xffff_ffff) as usize;
            if conns[i].gen != (e.u64 >> 32) as u32 || conns[i].st == St::Dead {
                continue;
            }
            let ev = e.events as i32;
            if ev & libc::EPOLLOUT != 0 && matches!(conns[i].st, St::Connecting | St::Active) {
                if conns[i].st == St::Connecting && ev & libc::EPOLLERR == 0 {
                    conns[i].st = St::Active;
                    let d = tn.saturating_sub(conns[i].t0);
                    st.conn.rec(d);
                }
                push_out(&mut conns[i]);
            }
            if ev & (libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR) == 0 {
                continue;
            }
            let mut over = None;
            loop {
                let c = &mut conns[i];
                if c.tls.is_some() {
                    let (k, eof) = tls_read(c, &mut buf);
                    if k > 0 {
                        if let Some(o) = on_data(&cfg, c, &buf[..k], &mut st, tn, hold, &mut open_seen) {
                            over = Some(o);
                            break;
                        }
                        continue;
                    }
                    if eof {
                        over = Some(c.r.eof());
                    }
                    break;
                }
                let k = rd(c.fd, &mut buf);
                if k == -1 {
                    break;
                }
                if k <= 0 {
                    if c.st == St::Idle {
                        // closed while idle: reopen at the next use
                        close_fd(c.fd);
                        c.fd = -1;
                        c.gen = c.gen.wrapping_add(1);
                        break;
                    }
                    let fine = c.r.eof();
                    over = Some(fine);
                    if !fine {
                        if c.reused && c.r.in_head() && k == 0 {
                            st.retried += 1;
                            st.e("closed_reused");
                        } else {
                            st.e(if k == 0 { "early_close" } else { "reset" });
                        }
                    }
                    c.r.close = true;
                    break;
                }
                if let Some(o) = on_data(&cfg, c, &buf[..k as usize], &mut st, tn, hold, &mut open_seen) {
                    over = Some(o);
                    break;
                }
                if (k as usize) < buf.len() && ev & libc::EPOLLRDHUP == 0 {
                    break;
                }
            }
            if let Some(ok) = over {
                let tf = now_ns();
                finish(
                    &ep,
                    &cfg,
                    &mut conns,
                    i,
                    &mut st,
                    &mut idle,
                    &mut queue,
                    rate > 0.0,
                    &mut next_id,
                    ok,
                    tf,
                );
            }
        }
        if hold && !all_open && open_seen >= nconn {
            all_open = true;
            println!("ALLOPEN {open_seen}");
            let _ = std::io::stdout().flush();
        }
    }
    let cpu1 = cpu::sample(&pids);
    let self1 = self_cpu();
    let dur = (now_ns() - t_real0) as f64 / 1e9;
    let cu = cpu1.user - cpu0.user;
    let cs = cpu1.sys - cpu0.sys;
    let errs: Vec<String> = st.err.iter().map(|(k, v)| format!("\"{k}\":{v}")).collect();
    let per = |n: u64| if n == 0 { 0.0 } else { (cu + cs) * 1e6 / n as f64 };
    println!(
        "{{\"requests\":{},\"chunks\":{},\"bytes\":{},\"errors\":{},\"error_kinds\":{{{}}},\"secs\":{:.3},\"rps\":{:.1},\"cps\":{:.1},\"lat\":{},\"ttft\":{},\"gap\":{},\"oneway\":{},\"connect\":{},\"cpu_user\":{:.3},\"cpu_sys\":{:.3},\"cpu_run\":{:.4},\"cpu_wait\":{:.4},\"slices\":{},\"cpu_us_per_req\":{:.3},\"cpu_us_per_chunk\":{:.3},\"load_cpu\":{:.3},\"open\":{}}}",
        st.req, st.chunks, st.bytes, st.err.values().sum::<u64>(), errs.join(","), dur,
        st.req as f64 / dur, st.chunks as f64 / dur, st.lat.json(), st.ttft.json(), st.gap.json(), st.oneway.json(), st.conn.json(),
        cu, cs, cpu1.run - cpu0.run, cpu1.wait - cpu0.wait, cpu1.slices - cpu0.slices, per(st.req), per(st.chunks), self1 - self0, conns.iter().filter(|c| c.fd >= 0).count()
    );
    let _ = std::io::stdout().flush();
}

fn blank() -> Conn {
    Conn {
        fd: -1,
        gen: 0,
        st: St::Idle,
        out_off: 0,
        out: Vec::new(),
        r: Resp::new(),
        t0: 0,
        first: 0,
        last: 0,
        chunks: 0,
        done_seen: false,
        body_n: 0,
        head_b: Vec::new(),
        ev: Vec::new(),
        id: 0,
        reused: false,
        tls: None,
        tls_off: 0,
    }
}
fn start(ep: &Ep, cfg: &Cfg, conns: &mut [Conn], i: usize, t: u64, next_id: &mut u64, _st: &mut Stat) {
    let c = &mut conns[i];
    if c.out.is_empty() {
        c.out = cfg.tmpl.clone();
    }
    c.id = *next_id;
    *next_id += 1;
    let mut v = c.id;
    for k in (0..12).rev() {
        c.out[cfg.id_off + k] = b'0' + (v % 10) as u8;
        v /= 10;
    }
    c.out_off = 0;
    c.tls_off = 0;
    c.r.reset();
    c.t0 = t;
    c.first = 0;
    c.last = 0;
    c.chunks = 0;
    c.done_seen = false;
    c.body_n = 0;
    c.head_b.clear();
    c.ev.clear();
    if c.fd < 0 {
        c.gen = c.gen.wrapping_add(1);
        c.fd = connect_nb(cfg.port);
        c.st = St::Connecting;
        c.reused = false;
        c.tls = cfg.tls.as_ref().map(|t| {
            let mut k = rustls::ClientConnection::new(t.clone(), "localhost".try_into().unwrap()).unwrap();
            k.set_buffer_limit(None);
            Box::new(k)
        });
        ep.add(c.fd, RDWR, (c.gen as u64) << 32 | i as u64);
    } else {
        c.st = St::Active;
        c.reused = true;
        push_out(c);
    }
}
fn push_out(c: &mut Conn) {
    if let Some(t) = c.tls.as_mut() {
        if c.tls_off < c.out.len() {
            let _ = t.writer().write_all(&c.out[c.tls_off..]);
            c.tls_off = c.out.len();
        }
        let mut f = Fd(c.fd);
        while t.wants_write() {
            if t.write_tls(&mut f).is_err() {
                break;
            }
        }
        c.out_off = c.out.len();
        return;
    }
    while c.out_off < c.out.len() {
        let n = wr(c.fd, &c.out[c.out_off..]);
        if n <= 0 {
            return;
        }
        c.out_off += n as usize;
    }
}
struct Fd(i32);
impl Read for Fd {
    fn read(&mut self, b: &mut [u8]) -> std::io::Result<usize> {
        match rd(self.0, b) {
            -1 => Err(std::io::ErrorKind::WouldBlock.into()),
            -2 => Err(std::io::ErrorKind::ConnectionReset.into()),
            n => Ok(n as usize),
        }
    }
}
impl Write for Fd {
    fn write(&mut self, b: &[u8]) -> std::io::Result<usize> {
        match wr(self.0, b) {
            -1 => Err(std::io::ErrorKind::WouldBlock.into()),
            -2 => Err(std::io::ErrorKind::ConnectionReset.into()),
            n => Ok(n as usize),
        }
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
fn tls_read(c: &mut Conn, buf: &mut [u8]) -> (usize, bool) {
    let t = c.tls.as_mut().unwrap();
    let mut f = Fd(c.fd);
    loop {
        match t.reader().read(buf) {
            Ok(0) => return (0, true),
            Ok(n) => return (n, false),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => return (0, true),
        }
        match t.read_tls(&mut f) {
            Ok(0) => return (0, true),
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                while t.wants_write() {
                    if t.write_tls(&mut f).is_err() {
                        break;
                    }
                }
                return (0, false);
            }
            Err(_) => return (0, true),
        }
        if t.process_new_packets().is_err() {
            return (0, true);
        }
        while t.wants_write() {
            if t.write_tls(&mut f).is_err() {
                break;
            }
        }
    }
}
/// Some(ok) when the response is over.
fn on_data(
    cfg: &Cfg,
    c: &mut Conn,
    b: &[u8],
    st: &mut Stat,
    now: u64,
    hold: bool,
    open_seen: &mut usize,
) -> Option<bool> {
    if c.st == St::Idle {
        st.e("data_while_idle");
        return None;
    }
    let (head_b, ev, body_n, first, last, chunks, done) =
        (&mut c.head_b, &mut c.ev, &mut c.body_n, &mut c.first, &mut c.last, &mut c.chunks, &mut c.done_seen);
    let t0 = c.t0;
    let stream = cfg.stream;
    st.bytes += b.len() as u64;
    let r = c.r.feed(b, |d| {
        *body_n += d.len() as u64;
        if head_b.len() < 64 {
            let k = d.len().min(64 - head_b.len());
            head_b.extend_from_slice(&d[..k]);
        }
        if !stream {
            return;
        }
        let mut d = d;
        while !d.is_empty() {
            // events end with a blank line
            let whole;
            if ev.is_empty() {
                match find(d, b"\n\n") {
                    Some(e) => {
                        whole = &d[..e];
                        d = &d[e + 2..];
                        event(whole, now, t0, first, last, chunks, done, st, hold, open_seen);
                    }
                    None => {
                        ev.extend_from_slice(d);
                        return;
                    }
                }
            } else {
                ev.extend_from_slice(d);
                d = &[];
                let mut at = 0;
                while let Some(e) = find(&ev[at..], b"\n\n") {
                    let w = ev[at..at + e].to_vec();
                    event(&w, now, t0, first, last, chunks, done, st, hold, open_seen);
                    at += e + 2;
                }
                ev.drain(..at);
            }
        }
    });
    match r {
        Err(e) => {
            st.e(&format!("parse_{e:?}"));
            c.r.close = true;
            return Some(false);
        }
        Ok(_) => {}
    }
    if !c.r.done() {
        return None;
    }
    Some(true)
}
#[allow(clippy::too_many_arguments)]
fn event(
    w: &[u8],
    now: u64,
    t0: u64,
    first: &mut u64,
    last: &mut u64,
    chunks: &mut u64,
    done: &mut bool,
    st: &mut Stat,
    hold: bool,
    open_seen: &mut usize,
) {
    if w.starts_with(b"data: [DONE]") {
        *done = true;
        return;
    }
    if !w.starts_with(b"data:") {
        return; // comments, keep-alives
    }
    *chunks += 1;
    st.chunks += 1;
    if *first == 0 {
        *first = now;
        st.ttft.rec(now.saturating_sub(t0));
        if hold {
            *open_seen += 1;
        }
    } else {
        st.gap.rec(now.saturating_sub(*last));
    }
    *last = now;
    if let Some(i) = find(w, b"t=") {
        let mut v = 0u64;
        for d in w[i + 2..].iter().take_while(|d| d.is_ascii_digit()) {
            v = v * 10 + (*d - b'0') as u64;
        }
        if v > 0 && now >= v {
            st.oneway.rec(now - v);
        }
    }
}
#[allow(clippy::too_many_arguments)]
fn finish(
    ep: &Ep,
    cfg: &Cfg,
    conns: &mut [Conn],
    i: usize,
    st: &mut Stat,
    idle: &mut Vec<usize>,
    queue: &mut VecDeque<u64>,
    open_loop: bool,
    next_id: &mut u64,
    ok: bool,
    now: u64,
) {
    let c = &mut conns[i];
    let mut good = ok;
    if ok {
        if c.r.status != 200 {
            st.e(&format!("status_{}", c.r.status));
            good = false;
        } else if cfg.stream {
            if c.chunks != cfg.chunks || !c.done_seen {
                st.e("stream_incomplete");
                good = false;
            }
        } else if cfg.check_id && c.body_n != cfg.reply {
            st.e("wrong_length");
            good = false;
        }
        if good && cfg.check_id {
            let want = format!("\"id\":\"r{:012}\"", c.id);
            if find(&c.head_b, want.as_bytes()).is_none() {
                st.e("wrong_id");
                good = false;
            }
        }
    }
    if good {
        st.req += 1;
        st.lat.rec(now.saturating_sub(c.t0));
    }
    if !cfg.keep || c.r.close || !ok {
        if c.fd >= 0 {
            close_fd(c.fd);
        }
        c.fd = -1;
        c.tls = None;
        c.gen = c.gen.wrapping_add(1);
    }
    c.st = St::Idle;
    if open_loop {
        if let Some(t) = queue.pop_front() {
            start(ep, cfg, conns, i, t, next_id, st);
        } else {
            idle.push(i);
        }
    } else {
        start(ep, cfg, conns, i, now, next_id, st);
    }
}

#[derive(Debug)]
struct NoVerify;
impl rustls::client::danger::ServerCertVerifier for NoVerify {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        rustls::crypto::ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}
fn tls_cfg() -> Arc<rustls::ClientConfig> {
    let mut c =
        rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(NoVerify))
            .with_no_client_auth();
    c.alpn_protocols = vec![b"http/1.1".to_vec()];
    Arc::new(c)
}

/// HTTP/2 in the clear, closed loop: --conns concurrent requests over --h2-conns connections.
mod h2c {
    use super::*;
    use bytes::Bytes;
    use http_body_util::{BodyExt, Full};
    use std::cell::RefCell;
    use std::rc::Rc;
    pub fn main(a: &Args, body: &[u8], id_off: usize, stream: bool) {
        let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let port: u16 = a.num("--port", 8080);
        let nconn: usize = a.num("--conns", 64);
        let hconn: usize = a.num("--h2-conns", 4);
        let secs: f64 = a.num("--secs", 5.0);
        let warm: f64 = a.num("--warm", 1.0);
        let chunks: u64 = a.num("--chunks", 64);
        let path = a.str("--path", "/v1/completions");
        let pids: Vec<i32> = a.str("--pids", "").split(',').filter_map(|s| s.parse().ok()).collect();
        let body = body.to_vec();
        let ls = tokio::task::LocalSet::new();
        ls.block_on(&rt, async move {
            let st = Rc::new(RefCell::new(Stat::new()));
            let mut senders = Vec::new();
            for _ in 0..hconn {
                let s = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                s.set_nodelay(true).unwrap();
                let (tx, conn) = hyper::client::conn::http2::handshake::<_, _, Full<Bytes>>(hyper_util::rt::TokioExecutor::new(), hyper_util::rt::TokioIo::new(s)).await.unwrap();
                tokio::task::spawn_local(async move {
                    let _ = conn.await;
                });
                senders.push(tx);
            }
            for k in 0..nconn {
                let mut tx = senders[k % hconn].clone();
                let st = st.clone();
                let body = body.clone();
                let path = path.clone();
                tokio::task::spawn_local(async move {
                    let mut n = k as u64;
                    loop {
                        n += nconn as u64;
                        let mut b = body.clone();
                        let id = format!("{n:012}");
                        b[id_off..id_off + 12].copy_from_slice(id.as_bytes());
                        let t0 = now_ns();
                        let rq = hyper::Request::post(format!("http://127.0.0.1:{port}{path}")).header("content-type", "application/json").body(Full::new(Bytes::from(b))).unwrap();
                        let r = match tx.send_request(rq).await {
                            Ok(r) => r,
                            Err(_) => {
                                st.borrow_mut().e("send");
                                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                                continue;
                            }
                        };
                        let ok = r.status() == 200;
                        let mut rb = r.into_body();
                        let (mut ev, mut first, mut last, mut ch, mut done) = (Vec::new(), 0, 0, 0, false);
                        let mut bad = !ok;
                        let mut got = Vec::new();
                        while let Some(f) = rb.frame().await {
                            match f {
                                Ok(f) => {
                                    if let Ok(d) = f.into_data() {
                                        if stream {
                                            ev.extend_from_slice(&d);
                                            let mut at = 0;
                                            let mut s = st.borrow_mut();
                                            while let Some(e) = find(&ev[at..], b"\n\n") {
                                                let w: Vec<u8> = ev[at..at + e].to_vec();
                                                event(&w, now_ns(), t0, &mut first, &mut last, &mut ch, &mut done, &mut s, false, &mut 0);
                                                at += e + 2;
                                            }
                                            ev.drain(..at);
                                        } else {
                                            got.extend_from_slice(&d);
                                        }
                                    }
                                }
                                Err(_) => bad = true,
                            }
                        }
                        let mut s = st.borrow_mut();
                        if !stream && find(&got, format!("\"id\":\"r{id}\"").as_bytes()).is_none() {
                            bad = true;
                        }
                        if stream && (ch != chunks || !done) {
                            bad = true;
                        }
                        if bad {
                            s.e("bad");
                        } else {
                            s.req += 1;
                            s.lat.rec(now_ns() - t0);
                        }
                    }
                });
            }
            tokio::time::sleep(std::time::Duration::from_secs_f64(warm)).await;
            *st.borrow_mut() = Stat::new();
            let (t0, c0, s0) = (now_ns(), cpu::sample(&pids), self_cpu());
            tokio::time::sleep(std::time::Duration::from_secs_f64(secs)).await;
            let (c1, s1, dur) = (cpu::sample(&pids), self_cpu(), (now_ns() - t0) as f64 / 1e9);
            let s = st.borrow();
            let (cu, cs) = (c1.user - c0.user, c1.sys - c0.sys);
            let errs: Vec<String> = s.err.iter().map(|(k, v)| format!("\"{k}\":{v}")).collect();
            println!(
                "{{\"requests\":{},\"chunks\":{},\"errors\":{},\"error_kinds\":{{{}}},\"secs\":{:.3},\"rps\":{:.1},\"cps\":{:.1},\"lat\":{},\"ttft\":{},\"gap\":{},\"oneway\":{},\"cpu_user\":{:.3},\"cpu_sys\":{:.3},\"cpu_us_per_req\":{:.3},\"cpu_us_per_chunk\":{:.3},\"load_cpu\":{:.3}}}",
                s.req, s.chunks, s.err.values().sum::<u64>(), errs.join(","), dur, s.req as f64 / dur, s.chunks as f64 / dur, s.lat.json(), s.ttft.json(), s.gap.json(), s.oneway.json(), cu, cs,
                (cu + cs) * 1e6 / s.req.max(1) as f64, (cu + cs) * 1e6 / s.chunks.max(1) as f64, s1 - s0
            );
            std::process::exit(0);
        });
    }
}
