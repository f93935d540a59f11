//! Raw TCP forwarder, the physical-limit yardstick: one thread, epoll edge-triggered, no HTTP at all.
//!   LISTEN_PORT=.. BACKENDS=127.0.0.1:9001,.. l4 [--splice]
//! Each client connection is bound to one backend connection (round robin); a readiness event costs one
//! read and one write (or two splices through a pipe).
use lab::{sys::*, *};
struct End {
    fd: i32,
    peer: usize,
    gen: u32,
    pend: Vec<u8>,
    pipe: [i32; 2],
    in_pipe: usize,
    live: bool,
    eof: bool,
}
fn main() {
    let a = Args::new();
    pin(a.num("--cpu", -1));
    raise_nofile();
    let splice = a.flag("--splice");
    let port: u16 = std::env::var("LISTEN_PORT").unwrap().parse().unwrap();
    let be: Vec<u16> = std::env::var("BACKENDS")
        .unwrap()
        .split(',')
        .map(|s| s.rsplit(':').next().unwrap().parse().unwrap())
        .collect();
    let ep = Ep::new();
    let l = listen_on(port);
    ep.add(l, libc::EPOLLIN as u32, u64::MAX);
    let mut es: Vec<End> = Vec::new();
    let mut free: Vec<usize> = Vec::new();
    let mut rr = 0;
    let mut evs = vec![libc::epoll_event { events: 0, u64: 0 }; 512];
    let mut buf = vec![0u8; 256 << 10];
    let mut dead: Vec<usize> = Vec::new();
    loop {
        let n = ep.wait(&mut evs, None);
        for e in &evs[..n] {
            if e.u64 == u64::MAX {
                while let Some(c) = accept_nb(l) {
                    set_opt(c, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1);
                    let b = connect_nb(be[rr % be.len()]);
                    rr += 1;
                    let mut idx = [0usize; 2];
                    for (k, fd) in [c, b].into_iter().enumerate() {
                        let mut pipe = [-1; 2];
                        if splice {
                            unsafe { libc::pipe2(pipe.as_mut_ptr(), libc::O_NONBLOCK | libc::O_CLOEXEC) };
                        }
                        let en = End {
                            fd,
                            peer: 0,
                            gen: 0,
                            pend: Vec::new(),
                            pipe,
                            in_pipe: 0,
                            live: true,
                            eof: false,
                        };
                        idx[k] = match free.pop() {
                            Some(i) => {
                                let g = es[i].gen + 1;
                                es[i] = en;
                                es[i].gen = g;
                                i
                            }
                            None => {
                                es.push(en);
                                es.len() - 1
                            }
                        };
                    }
                    es[idx[0]].peer = idx[1];
                    es[idx[1]].peer = idx[0];
                    for i in idx {
                        ep.add(es[i].fd, RDWR, (es[i].gen as u64) << 32 | i as u64);
                    }
                }
                continue;
            }
            let i = (e.u64 & 0xffff_ffff) as usize;
            if es[i].gen != (e.u64 >> 32) as u32 || !es[i].live {
                continue;
            }
            let p = es[i].peer;
            let ev = e.events as i32;
            let mut ok = true;
            if ev & libc::EPOLLOUT != 0 {
                // the peer's data waits for us
                ok = drain(&mut es, p, i);
                if ok && es[p].pend.is_empty() && es[p].in_pipe == 0 && ev & libc::EPOLLIN == 0 && es[p].eof {
                    ok = false;
                }
            }
            if ok && ev & (libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR) != 0 {
                ok = pump(&mut es, i, p, &mut buf, splice, ev & libc::EPOLLRDHUP != 0);
            }
            if !ok {
                for k in [i, p] {
                    es[k].live = false;
                    close_fd(es[k].fd);
                    if es[k].pipe[0] >= 0 {
                        close_fd(es[k].pipe[0]);
                        close_fd(es[k].pipe[1]);
                    }
                    dead.push(k);
                }
            }
        }
        free.append(&mut dead);
    }
}
/// writes what `from` read earlier to `to`
fn drain(es: &mut [End], from: usize, to: usize) -> bool {
    let fd = es[to].fd;
    let f = &mut es[from];
    while f.in_pipe > 0 {
        let k = unsafe {
            libc::splice(
                f.pipe[0],
                std::ptr::null_mut(),
                fd,
                std::ptr::null_mut(),
                f.in_pipe,
                libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK,
            )
        };
        if k <= 0 {
            return true;
        }
        f.in_pipe -= k as usize;
    }
    while !f.pend.is_empty() {
        let k = wr(fd, &f.pend);
        if k == -1 {
            return true;
        }
        if k < 0 {
            return false;
        }
        f.pend.drain(..k as usize);
    }
    true
}
fn pump(es: &mut [End], i: usize, p: usize, buf: &mut [u8], splice: bool, rdhup: bool) -> bool {
    loop {
        if splice {
            let f = &mut es[i];
            let k = unsafe {
                libc::splice(
                    f.fd,
                    std::ptr::null_mut(),
                    f.pipe[1],
                    std::ptr::null_mut(),
                    1 << 20,
                    libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK,
                )
            };
            if k == 0 {
                return false;
            }
            if k < 0 {
                return unsafe { *libc::__errno_location() } == libc::EAGAIN;
            }
            f.in_pipe += k as usize;
            if !drain(es, i, p) {
                return false;
            }
            // small message: taken as drained (edge-triggered)
            if (k as usize) < 32768 && !rdhup {
                return true;
            }
            continue;
        }
        let k = rd(es[i].fd, buf);
        if k == -1 {
            return true;
        }
        if k == 0 {
            es[i].eof = true;
            return !es[i].pend.is_empty();
        }
        if k < 0 {
            return false;
        }
        let k = k as usize;
        if es[i].pend.is_empty() {
            let w = wr(es[p].fd, &buf[..k]);
            if w == -2 {
                // the backend connection may still be in progress
                if unsafe { *libc::__errno_location() } != libc::ENOTCONN {
                    return false;
                }
            }
            let w = w.max(0) as usize;
            if w < k {
                es[i].pend.extend_from_slice(&buf[w..k]);
            }
        } else {
            es[i].pend.extend_from_slice(&buf[..k]);
        }
        if k < buf.len() && !rdhup {
            return true;
        }
    }
}
