//! Fake inference server: one thread, epoll, any number of ports.
//!   backend --ports 9001,9002 [--reply-bytes 1024] [--chunks 64] [--interval-ms 20] [--chunk-bytes 200] [--cpu N]
//! POST (any path) with a JSON body: "stream":true answers SSE, otherwise one JSON body at once.
//! In the body, "max_tokens" sets the number of chunks, "interval_ms" their interval, "reply_bytes" the size
//! of a non-stream reply, and "user" is echoed as "id". Each chunk carries its send time (CLOCK_MONOTONIC ns)
//! as "t=..." in its text. GET answers 200 with a small JSON (health, models, server info).
use lab::{sys::*, *};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

#[derive(PartialEq, Clone, Copy)]
enum S {
    Head,
    Body(u64),
    Size,
    Data(u64),
    Trailer,
    Streaming,
}
struct Conn {
    fd: i32,
    gen: u32,
    s: S,
    carry: Vec<u8>,
    body: Vec<u8>, // its first bytes only
    get: bool,
    close: bool,
    out: Vec<u8>,
    out_off: usize,
    left: u64,
    next: u64,
    int_ns: u64,
    id: Vec<u8>,
    page: Page,
    with_ids: bool,
    first: bool,
    body_n: u64,
}
/// What a GET asks for.
#[derive(Clone, Copy)]
enum Page {
    Models,
    Version,
    Other,
}
struct Cfg {
    reply: usize,
    chunks: u64,
    int_ns: u64,
    cbytes: usize,
    /// Says that it is vLLM, and gives token ids to who asks for them.
    vllm: bool,
}
/// Text that is not one token over and over.
fn words() -> impl Iterator<Item = u8> {
    b"a gate stands open while its keepers come and go by night. ".iter().copied().cycle()
}
const KEEP: usize = 8192; // routers re-serialise the JSON: the fields may come after the prompt

fn main() {
    let a = Args::new();
    pin(a.num("--cpu", -1));
    raise_nofile();
    let cfg = Cfg {
        reply: a.num("--reply-bytes", 1024),
        chunks: a.num("--chunks", 64),
        int_ns: (a.num("--interval-ms", 20.0f64) * 1e6) as u64,
        cbytes: a.num("--chunk-bytes", 200),
        vllm: a.str("--skin", "generic") == "vllm",
    };
    let ep = Ep::new();
    let ports: Vec<u16> = a.str("--ports", "9001").split(',').map(|p| p.parse().unwrap()).collect();
    let ls: Vec<i32> = ports.iter().map(|p| listen_on(*p)).collect();
    for (i, l) in ls.iter().enumerate() {
        ep.add(*l, libc::EPOLLIN as u32, u64::MAX - i as u64);
    }
    eprintln!("backend ready on {ports:?}");
    let mut conns: Vec<Option<Box<Conn>>> = Vec::new();
    let mut free: Vec<usize> = Vec::new();
    let mut heap: BinaryHeap<Reverse<(u64, u32, u32)>> = BinaryHeap::new();
    let mut evs = vec![libc::epoll_event { events: 0, u64: 0 }; 512];
    let mut buf = vec![0u8; 1 << 20];
    let mut gen = 0u32;
    loop {
        let now = now_ns();
        let to = heap.peek().map(|Reverse((t, _, _))| t.saturating_sub(now));
        let n = ep.wait(&mut evs, to);
        for e in &evs[..n] {
            let d = e.u64;
            if d > u64::MAX - 1000 {
                let l = ls[(u64::MAX - d) as usize];
                while let Some(fd) = accept_nb(l) {
                    set_opt(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1);
                    gen = gen.wrapping_add(1);
                    let c = Box::new(Conn {
                        fd,
                        gen,
                        s: S::Head,
                        carry: Vec::new(),
                        body: Vec::new(),
                        get: false,
                        close: false,
                        out: Vec::new(),
                        out_off: 0,
                        left: 0,
                        next: 0,
                        int_ns: 0,
                        id: Vec::new(),
                        page: Page::Other,
                        with_ids: false,
                        first: false,
                        body_n: 0,
                    });
                    let i = match free.pop() {
                        Some(i) => {
                            conns[i] = Some(c);
                            i
                        }
                        None => {
                            conns.push(Some(c));
                            conns.len() - 1
                        }
                    };
                    ep.add(fd, RDWR, (gen as u64) << 32 | i as u64);
                }
                continue;
            }
            let i = (d & 0xffff_ffff) as usize;
            let ok = match conns[i].as_mut() {
                Some(c) if c.gen == (d >> 32) as u32 => {
                    let ev = e.events as i32;
                    let mut ok = ev & (libc::EPOLLERR | libc::EPOLLHUP) == 0;
                    if ok && ev & libc::EPOLLOUT != 0 {
                        ok = flush(c);
                    }
                    if ok && ev & (libc::EPOLLIN | libc::EPOLLRDHUP) != 0 {
                        loop {
                            let k = rd(c.fd, &mut buf);
                            if k == -1 {
                                break;
                            }
                            if k <= 0 {
                                ok = false;
                                break;
                            }
                            ok = feed(c, &buf[..k as usize], &cfg, &mut heap, i);
                            // a short read means the socket is drained (edge-triggered: more data raises a new event)
                            if !ok || ((k as usize) < buf.len() && ev & libc::EPOLLRDHUP == 0) {
                                break;
                            }
                        }
                    }
                    ok
                }
                _ => continue,
            };
            if !ok {
                let c = conns[i].take().unwrap();
                close_fd(c.fd);
                free.push(i);
            }
        }
        let now = now_ns();
        while let Some(Reverse((t, i, g))) = heap.peek().copied() {
            if t > now {
                break;
            }
            heap.pop();
            let ok = match conns[i as usize].as_mut() {
                Some(c) if c.gen == g && c.s == S::Streaming => {
                    let ok = tick(c, &cfg);
                    if ok && c.s == S::Streaming {
                        heap.push(Reverse((c.next, i, g)));
                    }
                    ok
                }
                _ => continue,
            };
            if !ok {
                let c = conns[i as usize].take().unwrap();
                close_fd(c.fd);
                free.push(i as usize);
            }
        }
    }
}

fn flush(c: &mut Conn) -> bool {
    while c.out_off < c.out.len() {
        let n = wr(c.fd, &c.out[c.out_off..]);
        if n == -1 {
            return true;
        }
        if n < 0 {
            return false;
        }
        c.out_off += n as usize;
    }
    c.out.clear();
    c.out_off = 0;
    !(c.close && c.s == S::Head)
}
fn tick(c: &mut Conn, cfg: &Cfg) -> bool {
    let total = c.left;
    let _ = total;
    let mut ev = Vec::with_capacity(cfg.cbytes + 64);
    ev.extend_from_slice(b"data: {\"id\":\"");
    ev.extend_from_slice(&c.id);
    ev.extend_from_slice(
        format!("\",\"object\":\"text_completion\",\"choices\":[{{\"index\":0,\"text\":\"t={} ", now_ns())
            .as_bytes(),
    );
    // The last chunk finishes its choice: an answer that only stops is a broken one.
    let finish = if c.left == 1 { "\"stop\"" } else { "null" };
    let mut tail = format!("\",\"finish_reason\":{finish}");
    if cfg.vllm {
        tail.push_str(",\"stop_reason\":null");
        let prompt = if c.with_ids && c.first { "[101,102,103,104,105,106,107,108]" } else { "null" };
        tail.push_str(&format!(",\"prompt_token_ids\":{prompt}"));
        match c.with_ids {
            true => tail.push_str(&format!(",\"token_ids\":[{}]", 1000 + c.left)),
            false => tail.push_str(",\"token_ids\":null"),
        }
        c.first = false;
    }
    tail.push_str("}]}\n\n");
    let tail = tail.as_bytes();
    let filler = cfg.cbytes.saturating_sub(ev.len() + tail.len());
    ev.extend(words().take(filler));
    ev.extend_from_slice(tail);
    c.left -= 1;
    let done = c.left == 0;
    if done {
        ev.extend_from_slice(b"data: [DONE]\n\n");
    }
    c.out.extend_from_slice(format!("{:x}\r\n", ev.len()).as_bytes());
    c.out.extend_from_slice(&ev);
    c.out.extend_from_slice(b"\r\n");
    if done {
        c.out.extend_from_slice(b"0\r\n\r\n");
        c.s = S::Head;
        c.body.clear();
    } else {
        c.next += c.int_ns;
    }
    flush(c)
}
fn feed(
    c: &mut Conn,
    mut b: &[u8],
    cfg: &Cfg,
    heap: &mut BinaryHeap<Reverse<(u64, u32, u32)>>,
    slot: usize,
) -> bool {
    while !b.is_empty() {
        match c.s {
            S::Streaming => return false, // pipelining onto a stream is not expected
            S::Head => {
                let old = c.carry.len();
                let (head, used);
                let tmp;
                if old == 0 {
                    match find(b, b"\r\n\r\n") {
                        Some(e) => {
                            head = &b[..e + 4];
                            used = e + 4;
                        }
                        None => {
                            c.carry.extend_from_slice(b);
                            return true;
                        }
                    }
                } else {
                    c.carry.extend_from_slice(b);
                    match find(&c.carry, b"\r\n\r\n") {
                        Some(e) => {
                            tmp = std::mem::take(&mut c.carry);
                            head = &tmp[..e + 4];
                            used = e + 4 - old;
                        }
                        None => return c.carry.len() < 65536,
                    }
                }
                b = &b[used..];
                c.get = !head.starts_with(b"POST");
                let asks = |page: &[u8]| find(&head[..head.len().min(64)], page).is_some();
                c.page = match () {
                    () if asks(b"models") => Page::Models,
                    () if asks(b"/version") => Page::Version,
                    () => Page::Other,
                };
                c.close = head.windows(9).take(16).any(|w| w.starts_with(b"HTTP/1.0"))
                    || memchr::memchr(b'\n', head)
                        .map_or(false, |e| head[..e].windows(8).any(|w| w == b"HTTP/1.0"));
                c.body.clear();
                c.body_n = 0;
                let mut len = 0u64;
                let mut chunked = false;
                for l in head.split(|x| *x == b'\n').skip(1) {
                    let l = l.strip_suffix(b"\r").unwrap_or(l);
                    let Some(k) = memchr::memchr(b':', l) else { continue };
                    let (n, v) = (&l[..k], l[k + 1..].trim_ascii());
                    match n.len() {
                        14 if n.eq_ignore_ascii_case(b"content-length") => {
                            len = std::str::from_utf8(v).unwrap_or("").parse().unwrap_or(0)
                        }
                        17 if n.eq_ignore_ascii_case(b"transfer-encoding") => chunked = true,
                        10 if n.eq_ignore_ascii_case(b"connection") => {
                            c.close |= v.eq_ignore_ascii_case(b"close")
                        }
                        6 if n.eq_ignore_ascii_case(b"expect") => {
                            c.out.extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
                            if !flush(c) {
                                return false;
                            }
                        }
                        _ => {}
                    }
                }
                c.s = if chunked { S::Size } else { S::Body(len) };
                if !chunked && len == 0 && !answer(c, cfg, heap, slot) {
                    return false;
                }
            }
            S::Body(n) => {
                let k = (b.len() as u64).min(n) as usize;
                keep(c, &b[..k]);
                b = &b[k..];
                c.s = S::Body(n - k as u64);
                if k as u64 == n && !answer(c, cfg, heap, slot) {
                    return false;
                }
            }
            S::Size => {
                let Some(e) = memchr::memchr(b'\n', b) else {
                    c.carry.extend_from_slice(b);
                    return true;
                };
                c.carry.extend_from_slice(&b[..e]);
                b = &b[e + 1..];
                let t = std::mem::take(&mut c.carry);
                let t = std::str::from_utf8(t.trim_ascii()).unwrap_or("zz");
                if t.is_empty() {
                    continue; // the CRLF after a chunk
                }
                let Ok(n) = u64::from_str_radix(t, 16) else { return false };
                c.s = if n == 0 { S::Trailer } else { S::Data(n) };
            }
            S::Data(n) => {
                let k = (b.len() as u64).min(n) as usize;
                keep(c, &b[..k]);
                b = &b[k..];
                c.s = if k as u64 == n { S::Size } else { S::Data(n - k as u64) };
            }
            S::Trailer => {
                let Some(e) = memchr::memchr(b'\n', b) else {
                    c.carry.extend_from_slice(b);
                    return true;
                };
                c.carry.clear();
                b = &b[e + 1..];
                if !answer(c, cfg, heap, slot) {
                    return false;
                }
            }
        }
    }
    true
}
fn keep(c: &mut Conn, b: &[u8]) {
    c.body_n += b.len() as u64;
    if c.body.len() < KEEP {
        let k = b.len().min(KEEP - c.body.len());
        c.body.extend_from_slice(&b[..k]);
    }
}
fn answer(c: &mut Conn, cfg: &Cfg, heap: &mut BinaryHeap<Reverse<(u64, u32, u32)>>, slot: usize) -> bool {
    c.s = S::Head;
    let conn = if c.close { "Connection: close\r\n" } else { "" };
    if c.get {
        let b: &[u8] = match c.page {
            Page::Models if cfg.vllm => b"{\"object\":\"list\",\"data\":[{\"id\":\"m\",\"object\":\"model\",\"created\":1,\"owned_by\":\"vllm\",\"root\":\"m\",\"max_model_len\":8192}]}",
            Page::Models => b"{\"object\":\"list\",\"data\":[{\"id\":\"m\",\"object\":\"model\",\"created\":1,\"owned_by\":\"lab\",\"root\":\"m\",\"max_model_len\":8192}]}",
            Page::Version if cfg.vllm => b"{\"version\":\"0.11.0\"}",
            _ => b"{\"status\":\"ok\",\"model_path\":\"m\",\"served_model_name\":\"m\",\"is_generation\":true,\"dp_size\":1,\"max_running_requests\":512,\"version\":\"0.5.0\"}",
        };
        c.out.extend_from_slice(
            format!(
                "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n{conn}Content-Length: {}\r\n\r\n",
                b.len()
            )
            .as_bytes(),
        );
        c.out.extend_from_slice(b);
        return flush(c);
    }
    c.id.clear();
    if let Some(i) = find(&c.body, b"\"user\"") {
        let r = &c.body[i + 6..];
        if let Some(q) = memchr::memchr(b'"', r) {
            if let Some(e) = memchr::memchr(b'"', &r[q + 1..]) {
                let id = r[q + 1..q + 1 + e].to_vec();
                c.id = id;
            }
        }
    }
    if c.id.is_empty() {
        c.id.extend_from_slice(b"none");
    }
    let stream = find(&c.body, b"\"stream\":true").is_some() || find(&c.body, b"\"stream\": true").is_some();
    if stream {
        c.left = json_int(&c.body, "max_tokens").unwrap_or(cfg.chunks).max(1);
        c.int_ns = json_int(&c.body, "interval_ms").map_or(cfg.int_ns, |v| v * 1_000_000);
        c.out.extend_from_slice(format!("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\nServer: uvicorn\r\nX-Request-Id: {}\r\n{conn}Transfer-Encoding: chunked\r\n\r\n", String::from_utf8_lossy(&c.id)).as_bytes());
        c.with_ids = cfg.vllm && find(&c.body, b"\"return_token_ids\":true").is_some();
        c.first = true;
        c.s = S::Streaming;
        let now = now_ns();
        if c.int_ns == 0 {
            c.next = now;
            while c.s == S::Streaming {
                if !tick(c, cfg) {
                    return false;
                }
            }
            return true;
        }
        // first token at once, the rest on the grid
        c.next = now;
        if !tick(c, cfg) {
            return false;
        }
        if c.s == S::Streaming {
            heap.push(Reverse((c.next, slot as u32, c.gen)));
        }
        return true;
    }
    let want = json_int(&c.body, "reply_bytes").map_or(cfg.reply, |v| v as usize);
    let mut body = Vec::with_capacity(want + 16);
    body.extend_from_slice(b"{\"id\":\"");
    body.extend_from_slice(&c.id);
    body.extend_from_slice(format!("\",\"object\":\"text_completion\",\"model\":\"m\",\"created\":1,\"got\":{},\"usage\":{{\"prompt_tokens\":1,\"completion_tokens\":1,\"total_tokens\":2}},\"choices\":[{{\"index\":0,\"finish_reason\":\"stop\",\"message\":{{\"role\":\"assistant\",\"content\":\"ok\"}},\"text\":\"", c.body_n).as_bytes());
    let tail = b"\"}]}";
    let pad = want.saturating_sub(body.len() + tail.len());
    body.extend(words().take(pad));
    body.extend_from_slice(tail);
    c.out.extend_from_slice(format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nServer: uvicorn\r\nX-Request-Id: {}\r\n{conn}Content-Length: {}\r\n\r\n", String::from_utf8_lossy(&c.id), body.len()).as_bytes());
    c.out.extend_from_slice(&body);
    flush(c)
}
