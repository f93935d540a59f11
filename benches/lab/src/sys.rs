use libc::*;
use std::io;

pub const RD: u32 = (EPOLLIN | EPOLLRDHUP | EPOLLET) as u32;
pub const RDWR: u32 = (EPOLLIN | EPOLLRDHUP | EPOLLOUT | EPOLLET) as u32;

pub fn now_ns() -> u64 {
    unsafe {
        let mut t: timespec = std::mem::zeroed();
        clock_gettime(CLOCK_MONOTONIC, &mut t);
        t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
    }
}
pub fn pin(cpu: i64) {
    if cpu < 0 {
        return;
    }
    unsafe {
        let mut s: cpu_set_t = std::mem::zeroed();
        CPU_SET(cpu as usize, &mut s);
        sched_setaffinity(0, std::mem::size_of::<cpu_set_t>(), &s);
    }
}
pub fn raise_nofile() {
    unsafe {
        let mut r: rlimit = std::mem::zeroed();
        getrlimit(RLIMIT_NOFILE, &mut r);
        r.rlim_cur = r.rlim_max;
        setrlimit(RLIMIT_NOFILE, &r);
    }
}
pub struct Ep(pub i32);
impl Ep {
    pub fn new() -> Ep {
        Ep(unsafe { epoll_create1(EPOLL_CLOEXEC) })
    }
    pub fn add(&self, fd: i32, ev: u32, data: u64) {
        let mut e = epoll_event { events: ev, u64: data };
        let r = unsafe { epoll_ctl(self.0, EPOLL_CTL_ADD, fd, &mut e) };
        assert_eq!(r, 0, "epoll_ctl add: {}", io::Error::last_os_error());
    }
    pub fn modi(&self, fd: i32, ev: u32, data: u64) {
        let mut e = epoll_event { events: ev, u64: data };
        unsafe { epoll_ctl(self.0, EPOLL_CTL_MOD, fd, &mut e) };
    }
    /// timeout_ns: None waits for ever. Nanosecond precision by epoll_pwait2.
    pub fn wait(&self, evs: &mut [epoll_event], timeout_ns: Option<u64>) -> usize {
        let ts = timeout_ns
            .map(|n| timespec { tv_sec: (n / 1_000_000_000) as i64, tv_nsec: (n % 1_000_000_000) as i64 });
        let p = ts.as_ref().map_or(std::ptr::null(), |t| t as *const timespec);
        let r = unsafe {
            syscall(441, self.0, evs.as_mut_ptr(), evs.len() as i32, p, std::ptr::null::<u8>(), 8usize)
        };
        if r < 0 {
            0
        } else {
            r as usize
        }
    }
}
impl Default for Ep {
    fn default() -> Self {
        Self::new()
    }
}
fn sa(ip: [u8; 4], port: u16) -> sockaddr_in {
    unsafe {
        let mut a: sockaddr_in = std::mem::zeroed();
        a.sin_family = AF_INET as u16;
        a.sin_port = port.to_be();
        a.sin_addr.s_addr = u32::from_ne_bytes(ip);
        a
    }
}
pub fn set_opt(fd: i32, level: i32, opt: i32, v: i32) {
    unsafe { setsockopt(fd, level, opt, &v as *const i32 as *const c_void, 4) };
}
pub fn listen_on(port: u16) -> i32 {
    unsafe {
        let fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        set_opt(fd, SOL_SOCKET, SO_REUSEADDR, 1);
        set_opt(fd, SOL_SOCKET, SO_REUSEPORT, 1);
        let a = sa([127, 0, 0, 1], port);
        assert_eq!(
            bind(fd, &a as *const _ as *const sockaddr, 16),
            0,
            "bind {port}: {}",
            io::Error::last_os_error()
        );
        assert_eq!(listen(fd, 4096), 0);
        fd
    }
}
pub fn accept_nb(l: i32) -> Option<i32> {
    let fd = unsafe { accept4(l, std::ptr::null_mut(), std::ptr::null_mut(), SOCK_NONBLOCK | SOCK_CLOEXEC) };
    if fd < 0 {
        None
    } else {
        Some(fd)
    }
}
pub fn connect_nb(port: u16) -> i32 {
    unsafe {
        let fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        assert!(fd >= 0, "socket: {}", io::Error::last_os_error());
        set_opt(fd, IPPROTO_TCP, TCP_NODELAY, 1);
        let a = sa([127, 0, 0, 1], port);
        let r = connect(fd, &a as *const _ as *const sockaddr, 16);
        if r != 0 && *__errno_location() != EINPROGRESS {
            let e = io::Error::last_os_error();
            eprintln!("connect {port}: {e}");
        }
        fd
    }
}
/// >0 bytes, 0 end, -1 would block, -2 error
pub fn rd(fd: i32, b: &mut [u8]) -> isize {
    let n = unsafe { recv(fd, b.as_mut_ptr() as *mut c_void, b.len(), 0) };
    conv(n)
}
pub fn wr(fd: i32, b: &[u8]) -> isize {
    let n = unsafe { send(fd, b.as_ptr() as *const c_void, b.len(), MSG_NOSIGNAL) };
    conv(n)
}
fn conv(n: isize) -> isize {
    if n >= 0 {
        return n;
    }
    let e = unsafe { *__errno_location() };
    if e == EAGAIN {
        -1
    } else if e == EINTR {
        -1
    } else {
        -2
    }
}
pub fn close_fd(fd: i32) {
    unsafe { close(fd) };
}
/// Own CPU seconds.
pub fn self_cpu() -> f64 {
    unsafe {
        let mut r: rusage = std::mem::zeroed();
        getrusage(RUSAGE_SELF, &mut r);
        (r.ru_utime.tv_sec + r.ru_stime.tv_sec) as f64
            + (r.ru_utime.tv_usec + r.ru_stime.tv_usec) as f64 / 1e6
    }
}
