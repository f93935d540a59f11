//! One record per exchange, naming every attempt: the answer to "why did this request go there, and
//! what happened to it".
//!
//! A worker formats a record straight into its own bounded buffer: no channel, no allocation, one
//! uncontended lock. One writer thread empties the buffers every [`WRITE_PERIOD`] and sleeps while
//! they are empty. When whoever reads the log is too slow, records are dropped and counted; an
//! exchange never waits for its record. Nothing is lost at shutdown ([`AccessLog::close`] or
//! [`AccessLog::flush`]). Only metadata is written: no header, no query, no body.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::{Condvar, Mutex};
use prometheus::IntCounter;

use super::metrics::{AttemptOutcome, End};
use crate::config::{AccessLogTarget, LogFormat};

/// Records a worker may have waiting, in bytes: two thousand or so, a stall of some 100 ms at full load.
pub const BUFFER_BYTES_MAX: usize = 1024 * 1024;

/// How long records gather before they are written.
pub const WRITE_PERIOD: Duration = Duration::from_millis(100);

/// Longest value of a text field; longer ones are cut and end in `…`. Paths and model names are the client's.
pub const FIELD_BYTES_MAX: usize = 1024;

/// A buffer larger than this gives its memory back when a period has used less.
const BUFFER_BYTES_KEPT: usize = 64 * 1024;

/// One exchange, from its first byte to its last.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// When its head was read.
    pub time: SystemTime,
    /// As in `x-request-id`.
    pub request_id: &'a str,
    /// The peer, or who a trusted proxy says it is.
    pub client: Option<IpAddr>,
    /// Request method.
    pub method: &'a str,
    /// Path; what follows a `?` is left out, since keys travel there.
    pub path: &'a str,
    /// Pool it was routed to; empty when none.
    pub pool: &'a str,
    /// Model it asked for; empty when none.
    pub model: &'a str,
    /// Status sent; 0 when none was.
    pub status: u16,
    /// Request body bytes received.
    pub bytes_in: u64,
    /// Response body bytes sent.
    pub bytes_out: u64,
    /// In their order.
    pub attempts: &'a [AttemptRecord<'a>],
    /// From head to end.
    pub duration: Duration,
    /// From head to the first token sent.
    pub first_token: Option<Duration>,
    /// How it ended for the client.
    pub end: End,
    /// Times its stream was continued on another backend.
    pub resumed: u32,
}

/// One attempt of it.
#[derive(Clone, Copy, Debug)]
pub struct AttemptRecord<'a> {
    /// Its pool.
    pub pool: &'a str,
    /// Where it went.
    pub backend: &'a str,
    /// Why there was one: `first`, `retry`, `failover`, `fallback`, `hedge`, `resume`, `opinion`.
    pub role: &'a str,
    /// What became of it.
    pub outcome: AttemptOutcome,
    /// The fact behind the outcome, `connect_refused`; empty for a success.
    pub cause: &'a str,
    /// How far it came: `connect`, `head`, `stream`, `body`, `tail`.
    pub phase: &'a str,
    /// Sent on a kept connection.
    pub reused: bool,
    /// From its start to its end.
    pub lasted: Duration,
    /// From its start to its response head.
    pub first_byte: Option<Duration>,
}

/// The access log of a process. Cloning gives the same log.
#[derive(Clone, Debug)]
pub struct AccessLog(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// None: nothing is recorded.
    style: Option<Style>,
    buffers: Mutex<Vec<Arc<Mutex<Buffer>>>>,
    /// Held while writing: what is flushed and what the writer thread writes stay in order.
    sink: Mutex<Sink>,
    work: Mutex<Work>,
    /// There is something to write, or the log is closed.
    wanted: Condvar,
    /// The log is closed.
    closing: Condvar,
    dropped: IntCounter,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    Json,
    Pretty,
}

#[derive(Debug, Default)]
struct Work {
    pending: bool,
    closed: bool,
}

/// Where lines go, and the buffer swapped with the workers'.
struct Sink {
    target: Target,
    spare: Vec<u8>,
    failing: bool,
}

impl std::fmt::Debug for Sink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sink").field("failing", &self.failing).finish_non_exhaustive()
    }
}

enum Target {
    Stdout,
    Stderr,
    File(PathBuf, File),
    Off,
    #[cfg(test)]
    Test(Box<dyn Write + Send>),
}

#[derive(Debug, Default)]
struct Buffer {
    bytes: Vec<u8>,
    clock: SecondCache,
}

impl AccessLog {
    /// Opens the target. People get one short line where the target is a terminal, unless JSON was
    /// asked for; everything else gets one JSON object a line. `dropped` counts lost records.
    pub fn open(target: &AccessLogTarget, format: LogFormat, dropped: IntCounter) -> io::Result<Self> {
        let (target, terminal) = match target {
            AccessLogTarget::Stdout => (Target::Stdout, io::stdout().is_terminal()),
            AccessLogTarget::Stderr => (Target::Stderr, io::stderr().is_terminal()),
            AccessLogTarget::File(path) => {
                let file = append_to(path)?;
                let terminal = file.is_terminal();
                (Target::File(path.clone(), file), terminal)
            }
            AccessLogTarget::Off => return Ok(Self::off(dropped)),
        };
        let style = if terminal && format != LogFormat::Json { Style::Pretty } else { Style::Json };
        Ok(Self::with(target, Some(style), dropped))
    }

    /// Records nothing.
    pub fn off(dropped: IntCounter) -> Self {
        Self::with(Target::Off, None, dropped)
    }

    fn with(target: Target, style: Option<Style>, dropped: IntCounter) -> Self {
        Self(Arc::new(Shared {
            style,
            buffers: Mutex::default(),
            sink: Mutex::new(Sink { target, spare: Vec::new(), failing: false }),
            work: Mutex::default(),
            wanted: Condvar::new(),
            closing: Condvar::new(),
            dropped,
        }))
    }

    /// A buffer for one worker; make one each and keep it.
    pub fn worker(&self) -> AccessWriter {
        let buffer = Arc::default();
        if self.0.style.is_some() {
            self.0.buffers.lock().push(Arc::clone(&buffer));
        }
        AccessWriter { log: self.clone(), buffer }
    }

    /// Writes until [`close`](Self::close), then writes the rest and returns. Blocks: give it a
    /// thread of its own. Without it records gather until flushed.
    pub fn run(&self) {
        loop {
            {
                let mut work = self.0.work.lock();
                while !work.pending && !work.closed {
                    self.0.wanted.wait(&mut work);
                }
                if !work.closed {
                    self.0.closing.wait_for(&mut work, WRITE_PERIOD);
                }
                if work.closed {
                    break;
                }
                work.pending = false;
            }
            self.write_out();
        }
        self.flush();
    }

    /// Ends [`run`](Self::run). Records made later are written by `flush` only.
    pub fn close(&self) {
        self.0.work.lock().closed = true;
        self.0.wanted.notify_all();
        self.0.closing.notify_all();
    }

    /// Writes everything recorded before the call. Blocks on the target.
    pub fn flush(&self) {
        self.write_out();
        let mut sink = self.0.sink.lock();
        let flushed = sink.target.flush();
        self.report(&mut sink, flushed);
    }

    /// Opens a file target again by its name, as after a rotation (SIGHUP); what was recorded before
    /// goes to the old file. On an error the old file stays in use. Other targets stay as they are.
    pub fn reopen(&self) -> io::Result<()> {
        self.flush();
        let mut sink = self.0.sink.lock();
        if let Target::File(path, file) = &mut sink.target {
            *file = append_to(path)?;
        }
        Ok(())
    }

    fn write_out(&self) {
        let mut sink = self.0.sink.lock();
        let buffers: Vec<_> = self.0.buffers.lock().clone();
        for buffer in buffers {
            let mut lines = std::mem::take(&mut sink.spare);
            std::mem::swap(&mut lines, &mut buffer.lock().bytes);
            if !lines.is_empty() {
                let written = sink.target.write_all(&lines);
                if written.is_err() {
                    self.0.dropped.inc_by(memchr::memchr_iter(b'\n', &lines).count() as u64);
                }
                self.report(&mut sink, written);
            }
            if lines.len() < BUFFER_BYTES_KEPT {
                lines.clear();
                lines.shrink_to(BUFFER_BYTES_KEPT);
            }
            lines.clear();
            sink.spare = lines;
        }
    }

    /// Logs the first of a run of failures, and its end.
    fn report(&self, sink: &mut Sink, result: io::Result<()>) {
        match result {
            Ok(()) if sink.failing => {
                sink.failing = false;
                tracing::info!("access records are written again");
            }
            Err(error) if !sink.failing => {
                sink.failing = true;
                tracing::error!(%error, "access records cannot be written and are lost");
            }
            Ok(()) | Err(_) => {}
        }
    }

    /// Called by the worker whose buffer was empty.
    fn want_writer(&self) {
        let mut work = self.0.work.lock();
        if !work.pending {
            work.pending = true;
            self.0.wanted.notify_one();
        }
    }
}

impl Target {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Stdout => io::stdout().lock().write_all(bytes),
            Self::Stderr => io::stderr().lock().write_all(bytes),
            Self::File(_, file) => file.write_all(bytes),
            Self::Off => Ok(()),
            #[cfg(test)]
            Self::Test(writer) => writer.write_all(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Stdout => io::stdout().lock().flush(),
            Self::Stderr | Self::Off => Ok(()),
            Self::File(_, file) => file.flush(),
            #[cfg(test)]
            Self::Test(writer) => writer.flush(),
        }
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

/// A worker's end of the log. Dropping it loses nothing.
#[derive(Clone, Debug)]
pub struct AccessWriter {
    log: AccessLog,
    buffer: Arc<Mutex<Buffer>>,
}

impl AccessWriter {
    /// Whether records are kept at all: where not, do not gather one.
    pub fn is_on(&self) -> bool {
        self.log.0.style.is_some()
    }

    /// Takes one record, or drops and counts it when the buffer is full. Never blocks on the target.
    pub fn record(&self, record: &Record<'_>) {
        let Some(style) = self.log.0.style else { return };
        let mut buffer = self.buffer.lock();
        let Buffer { bytes, clock } = &mut *buffer;
        let before = bytes.len();
        match style {
            Style::Json => push_json(bytes, clock, record),
            Style::Pretty => push_pretty(bytes, clock, record),
        }
        if bytes.len() > BUFFER_BYTES_MAX {
            bytes.truncate(before);
            drop(buffer);
            self.log.0.dropped.inc();
            return;
        }
        drop(buffer);
        if before == 0 {
            self.log.want_writer();
        }
    }
}

fn push_json(out: &mut Vec<u8>, clock: &mut SecondCache, record: &Record<'_>) {
    out.extend_from_slice(b"{\"time\":\"");
    clock.push(out, record.time);
    out.extend_from_slice(b"\",\"request_id\":");
    push_string(out, record.request_id);
    if let Some(client) = record.client {
        out.extend_from_slice(b",\"client\":\"");
        push_address(out, client);
        out.push(b'"');
    }
    out.extend_from_slice(b",\"method\":");
    push_string(out, record.method);
    out.extend_from_slice(b",\"path\":");
    push_string(out, without_query(record.path));
    push_string_field(out, b",\"pool\":", record.pool);
    push_string_field(out, b",\"model\":", record.model);
    out.extend_from_slice(b",\"status\":");
    push_number(out, u64::from(record.status));
    out.extend_from_slice(b",\"bytes_in\":");
    push_number(out, record.bytes_in);
    out.extend_from_slice(b",\"bytes_out\":");
    push_number(out, record.bytes_out);
    out.extend_from_slice(b",\"attempts\":[");
    for (nth, attempt) in record.attempts.iter().enumerate() {
        if nth > 0 {
            out.push(b',');
        }
        out.extend_from_slice(b"{\"n\":");
        push_number(out, nth as u64 + 1);
        out.extend_from_slice(b",\"backend\":");
        push_string(out, attempt.backend);
        if attempt.pool != record.pool {
            push_string_field(out, b",\"pool\":", attempt.pool);
        }
        push_string_field(out, b",\"role\":", attempt.role);
        out.extend_from_slice(b",\"outcome\":\"");
        out.extend_from_slice(attempt.outcome.name().as_bytes());
        out.push(b'"');
        push_string_field(out, b",\"cause\":", attempt.cause);
        push_string_field(out, b",\"phase\":", attempt.phase);
        out.extend_from_slice(if attempt.reused { b",\"reused\":true" } else { b",\"reused\":false" });
        out.extend_from_slice(b",\"ms\":");
        push_millis(out, attempt.lasted);
        if let Some(first_byte) = attempt.first_byte {
            out.extend_from_slice(b",\"first_byte_ms\":");
            push_millis(out, first_byte);
        }
        out.push(b'}');
    }
    out.extend_from_slice(b"],\"duration_ms\":");
    push_millis(out, record.duration);
    if let Some(first_token) = record.first_token {
        out.extend_from_slice(b",\"first_token_ms\":");
        push_millis(out, first_token);
    }
    out.extend_from_slice(b",\"end\":\"");
    out.extend_from_slice(record.end.name().as_bytes());
    out.extend_from_slice(b"\",\"resumed\":");
    push_number(out, u64::from(record.resumed));
    out.extend_from_slice(b"}\n");
}

/// `08:15:30.123 200 POST /v1/chat/completions llama 1240 ms (first token 80 ms) gpu-1 ✗ connect_refused → gpu-2`
fn push_pretty(out: &mut Vec<u8>, clock: &mut SecondCache, record: &Record<'_>) {
    /// Where the time of day begins in an RFC 3339 timestamp.
    const TIME_OF_DAY: usize = "2026-01-01T".len();
    let start = out.len();
    clock.push(out, record.time);
    out.drain(start..start + TIME_OF_DAY);
    out.pop();
    out.push(b' ');
    match record.status {
        0 => out.push(b'-'),
        status => push_number(out, u64::from(status)),
    }
    for word in [record.method, without_query(record.path), record.pool, record.model] {
        if !word.is_empty() {
            out.push(b' ');
            push_escaped(out, word);
        }
    }
    out.push(b' ');
    push_number(out, u64::try_from(record.duration.as_millis()).unwrap_or(u64::MAX));
    out.extend_from_slice(b" ms");
    if let Some(first_token) = record.first_token {
        out.extend_from_slice(b" (first token ");
        push_number(out, u64::try_from(first_token.as_millis()).unwrap_or(u64::MAX));
        out.extend_from_slice(b" ms)");
    }
    for (nth, attempt) in record.attempts.iter().enumerate() {
        out.extend_from_slice(if nth == 0 { " ".as_bytes() } else { " → ".as_bytes() });
        push_escaped(out, attempt.backend);
        if attempt.outcome != AttemptOutcome::Success {
            out.extend_from_slice(" ✗ ".as_bytes());
            let why = if attempt.cause.is_empty() { attempt.outcome.name() } else { attempt.cause };
            push_escaped(out, why);
        }
    }
    if record.resumed > 0 {
        out.extend_from_slice(b" resumed ");
        push_number(out, u64::from(record.resumed));
    }
    if record.end != End::Complete {
        out.extend_from_slice(b" [");
        out.extend_from_slice(record.end.name().as_bytes());
        out.push(b']');
    }
    out.push(b'\n');
}

fn without_query(path: &str) -> &str {
    memchr::memchr(b'?', path.as_bytes()).map_or(path, |end| &path[..end])
}

fn push_string_field(out: &mut Vec<u8>, key: &[u8], value: &str) {
    if !value.is_empty() {
        out.extend_from_slice(key);
        push_string(out, value);
    }
}

fn push_string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    push_escaped(out, text);
    out.push(b'"');
}

/// JSON's escapes (RFC 8259 §7), which also keep a hostile path from writing its own lines or
/// controlling a terminal; DEL is escaped for the latter. Cut at [`FIELD_BYTES_MAX`].
fn push_escaped(out: &mut Vec<u8>, text: &str) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let kept = &text[..text.floor_char_boundary(FIELD_BYTES_MAX)];
    let bytes = kept.as_bytes();
    // Nearly all texts need no escape: one pass without branches tells.
    let is_plain = |byte: u8| (byte >= 0x20) & (byte != b'"') & (byte != b'\\') & (byte != 0x7f);
    if bytes.iter().fold(true, |all, &byte| all & is_plain(byte)) {
        out.extend_from_slice(bytes);
        if kept.len() < text.len() {
            out.extend_from_slice("…".as_bytes());
        }
        return;
    }
    let mut plain = 0;
    for (at, &byte) in bytes.iter().enumerate() {
        if is_plain(byte) {
            continue;
        }
        out.extend_from_slice(&bytes[plain..at]);
        plain = at + 1;
        match byte {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            other => {
                out.extend_from_slice(b"\\u00");
                out.push(HEX[usize::from(other >> 4)]);
                out.push(HEX[usize::from(other & 15)]);
            }
        }
    }
    out.extend_from_slice(&bytes[plain..]);
    if kept.len() < text.len() {
        out.extend_from_slice("…".as_bytes());
    }
}

fn push_number(out: &mut Vec<u8>, number: u64) {
    out.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
}

/// Milliseconds with three decimals.
fn push_millis(out: &mut Vec<u8>, duration: Duration) {
    let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
    push_number(out, micros / 1000);
    out.push(b'.');
    push_padded(out, micros % 1000, 3);
}

fn push_address(out: &mut Vec<u8>, address: IpAddr) {
    match address {
        // By hand: most are of this kind, and formatting one costs more than the rest of a record's numbers.
        IpAddr::V4(address) => {
            for (i, octet) in address.octets().into_iter().enumerate() {
                if i > 0 {
                    out.push(b'.');
                }
                push_number(out, octet.into());
            }
        }
        IpAddr::V6(address) => {
            // std formats into the vector without allocating; writing to one cannot fail.
            let _infallible = write!(out, "{address}");
        }
    }
}

fn push_padded(out: &mut Vec<u8>, number: u64, digits: usize) {
    let mut buffer = itoa::Buffer::new();
    let text = buffer.format(number);
    out.resize(out.len() + digits.saturating_sub(text.len()), b'0');
    out.extend_from_slice(text.as_bytes());
}

/// `2026-01-31T08:15:30.123Z` (RFC 3339), in UTC. Times before 1970 are shown as its start.
pub(super) fn push_time(out: &mut Vec<u8>, time: SystemTime) {
    SecondCache::default().push(out, time);
}

/// The second formatted last: records come thousands to a second.
#[derive(Debug, Default)]
struct SecondCache {
    second: u64,
    /// Its text up to the decimal point; empty at first.
    text: Vec<u8>,
}

impl SecondCache {
    fn push(&mut self, out: &mut Vec<u8>, time: SystemTime) {
        let since_epoch = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let second = since_epoch.as_secs();
        if self.text.is_empty() || self.second != second {
            self.second = second;
            self.text.clear();
            push_second(&mut self.text, second);
        }
        out.extend_from_slice(&self.text);
        push_padded(out, u64::from(since_epoch.subsec_millis()), 3);
        out.push(b'Z');
    }
}

/// Date and time up to the decimal point, by Howard Hinnant's `civil_from_days`
/// (howardhinnant.github.io/date_algorithms.html): years begin in March, so that leap days come last.
fn push_second(out: &mut Vec<u8>, second: u64) {
    let (days, of_day) = (second / 86_400, second % 86_400);
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    push_padded(out, year, 4);
    for (sign, number) in
        [(b'-', month), (b'-', day), (b'T', of_day / 3600), (b':', of_day / 60 % 60), (b':', of_day % 60)]
    {
        out.push(sign);
        push_padded(out, number, 2);
    }
    out.push(b'.');
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::telemetry::metrics::Metrics;

    const ATTEMPTS: [AttemptRecord<'static>; 2] = [
        AttemptRecord {
            pool: "default",
            backend: "gpu-1",
            role: "first",
            outcome: AttemptOutcome::Fault,
            cause: "connect_refused",
            phase: "connect",
            reused: false,
            lasted: Duration::from_micros(1_234),
            first_byte: None,
        },
        AttemptRecord {
            pool: "spare",
            backend: "gpu-2",
            role: "fallback",
            outcome: AttemptOutcome::Success,
            cause: "",
            phase: "tail",
            reused: true,
            lasted: Duration::from_millis(1_239),
            first_byte: Some(Duration::from_micros(5_007)),
        },
    ];

    fn record(attempts: &'static [AttemptRecord<'static>]) -> Record<'static> {
        Record {
            time: UNIX_EPOCH + Duration::from_millis(1_769_847_330_123),
            request_id: "r-1",
            client: Some(IpAddr::from([10, 0, 0, 7])),
            method: "POST",
            path: "/v1/chat/completions?key=hidden",
            pool: "default",
            model: "llama",
            status: 200,
            bytes_in: 120,
            bytes_out: 4096,
            attempts,
            duration: Duration::from_micros(1_240_500),
            first_token: Some(Duration::from_millis(80)),
            end: End::Complete,
            resumed: 0,
        }
    }

    /// Everything written, as text.
    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Written {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().clone()).unwrap()
        }
    }

    fn log(style: Style) -> (AccessLog, Written, IntCounter) {
        let dropped = Metrics::new().access_records_dropped.clone();
        let written = Written::default();
        let target = Target::Test(Box::new(written.clone()));
        (AccessLog::with(target, Some(style), dropped.clone()), written, dropped)
    }

    #[test]
    fn record_names_every_attempt_and_its_cause() {
        let (log, written, _) = log(Style::Json);
        log.worker().record(&record(&ATTEMPTS));
        log.flush();
        let line: serde_json::Value = serde_json::from_str(&written.text()).unwrap();
        let expected = serde_json::json!({
            "time": "2026-01-31T08:15:30.123Z",
            "request_id": "r-1",
            "client": "10.0.0.7",
            "method": "POST",
            "path": "/v1/chat/completions",
            "pool": "default",
            "model": "llama",
            "status": 200,
            "bytes_in": 120,
            "bytes_out": 4096,
            "attempts": [
                {"n": 1, "backend": "gpu-1", "role": "first", "outcome": "fault", "cause": "connect_refused",
                 "phase": "connect", "reused": false, "ms": 1.234},
                {"n": 2, "backend": "gpu-2", "pool": "spare", "role": "fallback", "outcome": "success",
                 "phase": "tail", "reused": true, "ms": 1239.0, "first_byte_ms": 5.007},
            ],
            "duration_ms": 1240.5,
            "first_token_ms": 80.0,
            "end": "complete",
            "resumed": 0,
        });
        assert_eq!(line, expected);
    }

    #[test]
    fn people_get_one_short_line() {
        let (log, written, _) = log(Style::Pretty);
        log.worker().record(&record(&ATTEMPTS));
        log.worker().record(&Record {
            status: 0,
            end: End::ClientGone,
            resumed: 2,
            model: "",
            ..record(&[])
        });
        log.flush();
        assert_eq!(
            written.text(),
            "08:15:30.123 200 POST /v1/chat/completions default llama 1240 ms (first token 80 ms) \
             gpu-1 ✗ connect_refused → gpu-2\n\
             08:15:30.123 - POST /v1/chat/completions default 1240 ms (first token 80 ms) resumed 2 [client_gone]\n"
        );
    }

    #[test]
    fn hostile_text_stays_inside_its_string() {
        let all: String = (0..=0x7f_u8).map(char::from).chain("é😀\u{2028}".chars()).collect();
        let mut out = Vec::new();
        push_string(&mut out, &all);
        let line = String::from_utf8(out).unwrap();
        assert!(!line.chars().any(|c| c.is_ascii_control()), "{line}");
        assert_eq!(serde_json::from_str::<String>(&line).unwrap(), all);
    }

    #[test]
    fn a_long_field_is_cut_between_characters() {
        for padding in 0..4 {
            let long = format!("{}{}", "x".repeat(padding), "😀".repeat(FIELD_BYTES_MAX));
            let mut out = Vec::new();
            push_string(&mut out, &long);
            let text: String = serde_json::from_slice(&out).unwrap();
            assert!(text.len() <= FIELD_BYTES_MAX + "…".len());
            assert!(text.ends_with("😀…"), "{text}");
        }
    }

    #[test]
    fn times_are_rfc_3339() {
        for (second, expected) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (951_868_799, "2000-02-29T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
            (1_798_761_599, "2026-12-31T23:59:59.000Z"),
        ] {
            let mut out = Vec::new();
            push_time(&mut out, UNIX_EPOCH + Duration::from_secs(second));
            assert_eq!(String::from_utf8(out).unwrap(), expected);
        }
        let mut cache = SecondCache::default();
        let mut out = Vec::new();
        for millis in [5_007, 5_999, 6_000, 5_001] {
            cache.push(&mut out, UNIX_EPOCH + Duration::from_millis(millis));
            out.push(b' ');
        }
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "1970-01-01T00:00:05.007Z 1970-01-01T00:00:05.999Z 1970-01-01T00:00:06.000Z 1970-01-01T00:00:05.001Z "
        );
    }

    #[test]
    fn a_full_buffer_drops_whole_records_and_counts_them() {
        let (log, written, dropped) = log(Style::Json);
        let worker = log.worker();
        let mut made = 0;
        while dropped.get() < 10 {
            worker.record(&record(&ATTEMPTS));
            made += 1;
        }
        assert!(worker.buffer.lock().bytes.len() <= BUFFER_BYTES_MAX);
        log.flush();
        worker.record(&record(&ATTEMPTS));
        log.flush();
        let text = written.text();
        let whole =
            text.lines().filter(|line| serde_json::from_str::<serde_json::Value>(line).is_ok()).count();
        assert_eq!(whole, text.lines().count());
        assert_eq!(whole as u64, made - 10 + 1);
    }

    #[test]
    fn the_writer_writes_by_itself_and_closing_loses_nothing() {
        /// Tells the test about each write.
        struct Telling(mpsc::SyncSender<usize>);
        impl Write for Telling {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.send(memchr::memchr_iter(b'\n', bytes).count()).unwrap();
                Ok(bytes.len())
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (told, written) = mpsc::sync_channel(64);
        let dropped = Metrics::new().access_records_dropped.clone();
        let log = AccessLog::with(Target::Test(Box::new(Telling(told))), Some(Style::Json), dropped);
        let workers = [log.worker(), log.worker()];
        let writer = std::thread::spawn({
            let log = log.clone();
            move || log.run()
        });
        workers[0].record(&record(&ATTEMPTS));
        assert_eq!(written.recv_timeout(Duration::from_secs(30)), Ok(1));
        let sum: usize = std::thread::scope(|scope| {
            for worker in &workers {
                scope.spawn(|| (0..1000).for_each(|_| worker.record(&record(&ATTEMPTS))));
            }
            (0..)
                .map(|_| written.recv_timeout(Duration::from_secs(30)).unwrap())
                .scan(0, |sum, lines| {
                    *sum += lines;
                    Some(*sum)
                })
                .find(|&sum| sum == 2000)
                .unwrap()
        });
        assert_eq!(sum, 2000);
        workers[1].record(&record(&ATTEMPTS));
        log.close();
        writer.join().unwrap();
        assert_eq!(written.try_iter().sum::<usize>(), 1);
    }

    #[test]
    fn a_rotated_file_is_left_for_a_new_one() {
        let directory = tempfile::tempdir().unwrap();
        let (path, rotated) = (directory.path().join("access.log"), directory.path().join("access.log.1"));
        let dropped = Metrics::new().access_records_dropped.clone();
        let log = AccessLog::open(&AccessLogTarget::File(path.clone()), LogFormat::Auto, dropped).unwrap();
        let worker = log.worker();
        worker.record(&record(&ATTEMPTS));
        std::fs::rename(&path, &rotated).unwrap();
        log.reopen().unwrap();
        worker.record(&record(&[]));
        worker.record(&record(&[]));
        log.flush();
        let lines = |path: &Path| std::fs::read_to_string(path).unwrap().lines().count();
        assert_eq!((lines(&rotated), lines(&path)), (1, 2));
    }

    #[test]
    fn records_that_cannot_be_written_are_counted() {
        struct Broken;
        impl Write for Broken {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let dropped = Metrics::new().access_records_dropped.clone();
        let log = AccessLog::with(Target::Test(Box::new(Broken)), Some(Style::Json), dropped.clone());
        let worker = log.worker();
        worker.record(&record(&ATTEMPTS));
        worker.record(&record(&ATTEMPTS));
        log.flush();
        assert_eq!(dropped.get(), 2);
    }

    #[test]
    fn nothing_is_kept_when_off() {
        let log = AccessLog::off(Metrics::new().access_records_dropped.clone());
        let worker = log.worker();
        assert!(!worker.is_on());
        worker.record(&record(&ATTEMPTS));
        assert!(worker.buffer.lock().bytes.is_empty());
    }
}
