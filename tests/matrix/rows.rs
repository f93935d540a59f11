//! The rows: every fault of the catalogue that needs no stream continued, how a replica has it, and what
//! the client was promised.
//!
//! A fault of the middle of a stream (F16 to F18, F21) is here before the first token, where it has a
//! meaning. What is left out, and why, is in `NOT_HERE`.

use std::time::Duration;

use serde_json::json;

use crate::api::{self, Endpoint, MODEL, Pace};
use crate::replica::{Act, Asked, models, probed};
use crate::support::either::Http;
use crate::support::tls::Certificate;

/// Requests of a cell are numbered from here once somebody is sick.
pub const FIRST: usize = 100;

/// The one that kills (F33).
pub const POISON: usize = FIRST + 8;

/// The connect clocks of the default configuration.
const CONNECT: Duration = Duration::from_secs(2);
const CONNECT_TLS: Duration = Duration::from_secs(3);

/// What of the catalogue has no row, and why.
pub const NOT_HERE: &[(&str, &str)] = &[
    ("F16 to F19, F21 after the first token", "need a stream continued on another replica"),
    ("F22", "is no failure that a request sees: tests/opinion"),
    ("F37", "is about the machine of the proxy itself, not about a replica"),
];

/// Where a replica is asked.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub endpoint: Endpoint,
    /// What the replicas speak.
    pub http: Http,
}

/// What a sick replica does with a numbered request; none: it answers well.
pub type Ill = fn(&Asked, Case) -> Option<Vec<Act>>;

/// How a replica is sick.
#[derive(Clone, Copy)]
pub enum Sickness {
    /// Requests are answered so, probes as ever.
    Requests(Ill),
    /// Probes too.
    RequestsAndProbes(Ill),
    /// Only probes.
    Probes(fn(&Asked) -> Vec<Act>),
    /// The process is gone.
    Refuses,
    /// Connections hang in their handshake.
    Blackhole,
    /// Its name stands for nothing, and never did.
    Unresolvable,
    /// TLS with such a certificate, from now on.
    Shows(Certificate),
    /// Each new connection does this, and no TLS.
    Greets(fn() -> Vec<Act>),
    /// Everything stops, sockets stay open.
    Freezes,
    /// Gone, then loading, then slow.
    Restarts,
    /// Ends politely: what runs is finished, connections are closed, then the listener.
    Drains,
    /// Back at once at the same address, with another model.
    OtherModel,
    /// It is slower by this factor, and right.
    Slow(u32),
    /// The configuration no longer names it.
    Removed,
    /// No replica is sick: every fourth client leaves.
    ClientsLeave,
}

/// What the client was promised.
#[derive(Clone, Copy)]
pub enum Promise {
    /// The whole, correct answer.
    Answer,
    /// The same; a chat stream may lack the usage nobody knows.
    AnswerButUsage,
    /// This status and body, unchanged, from one attempt.
    Relayed(fn(usize, Case) -> (u16, String)),
    /// A 503 with `Retry-After` in the words of its API, after a short wait.
    Unavailable,
    /// An answer, or an honest 429, 503 or 529 with `Retry-After`; and no storm.
    AnswerOrOverload,
    /// One error for the request that kills, answers for everybody else, two deaths at most.
    PoisonFails,
    /// Who stays is answered; the work of who leaves is cancelled.
    AnswerToWhoStays,
}

/// A row of the matrix.
pub struct Row {
    pub id: &'static str,
    pub what: &'static str,
    pub sickness: Sickness,
    pub promise: Promise,
    /// What the fault may cost beside the four seconds: the connect clock.
    pub extra: Duration,
    /// How many of the four replicas are sick, a cell each.
    pub sick: &'static [usize],
    pub endpoints: Vec<Endpoint>,
    pub https: &'static [Http],
    /// Bytes of prompt beside the question.
    pub padding: usize,
    /// evergate has credentials of its own for the replicas.
    pub credentials: bool,
    /// The replicas speak TLS.
    pub tls: bool,
    /// Nothing says that the replica is sick but its silence.
    pub hangs: bool,
    /// Healed, they are not soon seen to serve again: they are gone, or a person is expected to repair them.
    pub no_return: bool,
}

const ALL: &[usize] = &[4];
const STREAMS: [Endpoint; 3] = [Endpoint::ChatStream, Endpoint::Completions, Endpoint::Messages];
const WHOLE: [Endpoint; 2] = [Endpoint::Chat, Endpoint::Embeddings];

impl Row {
    fn new(id: &'static str, what: &'static str, sickness: Sickness) -> Self {
        Self {
            id,
            what,
            sickness,
            promise: Promise::Answer,
            extra: Duration::ZERO,
            sick: &[1, 2, 3],
            endpoints: Endpoint::JSON.to_vec(),
            https: &Http::BOTH,
            padding: 0,
            credentials: false,
            tls: false,
            hangs: false,
            no_return: false,
        }
    }

    fn ill(id: &'static str, what: &'static str, ill: Ill) -> Self {
        Self::new(id, what, Sickness::Requests(ill))
    }

    fn on(self, endpoints: &[Endpoint]) -> Self {
        Self { endpoints: endpoints.to_vec(), ..self }
    }

    fn sick(self, sick: &'static [usize]) -> Self {
        Self { sick, ..self }
    }

    fn promise(self, promise: Promise) -> Self {
        Self { promise, ..self }
    }

    fn extra(self, extra: Duration) -> Self {
        Self { extra, ..self }
    }

    fn tls(self) -> Self {
        Self { tls: true, ..self }
    }

    fn hangs(self) -> Self {
        Self { hangs: true, ..self }
    }

    fn grpc(self) -> Self {
        Self { https: &[Http::Two], ..self }.on(&[Endpoint::Infer])
    }
}

/// All rows, in the order of the catalogue.
pub fn rows() -> Vec<Row> {
    let mut rows = on_connecting();
    rows.extend(before_the_head());
    rows.extend(behind_the_head());
    rows.extend(over_time());
    rows
}

fn on_connecting() -> Vec<Row> {
    vec![
        Row::new("F01", "connection refused", Sickness::Refuses),
        Row::new("F02", "accept queue full", Sickness::Blackhole).extra(CONNECT),
        Row { no_return: true, ..Row::new("F03", "a name without an address", Sickness::Unresolvable) },
        Row::new("F04", "certificate expired", Sickness::Shows(Certificate::Expired)).tls(),
        Row::new("F04", "certificate of another name", Sickness::Shows(Certificate::WrongName)).tls(),
        Row::new(
            "F04",
            "not TLS",
            Sickness::Greets(|| vec![Act::Raw("HTTP/1.1 400 Bad Request\r\n\r\n".into()), Act::Fin]),
        )
        .tls(),
        Row::new("F04", "TLS handshake hangs", Sickness::Greets(|| vec![Act::Stall]))
            .tls()
            .extra(CONNECT_TLS),
    ]
}

fn before_the_head() -> Vec<Row> {
    vec![
        // What else ran on the connection would be cut behind its first token: only an idle one closes.
        Row::ill("F05", "FIN on a reused connection", |asked, _| {
            (asked.index > 0 && asked.alone).then(|| vec![Act::Fin])
        })
        .sick(&[1, 4]),
        Row::ill("F05", "RST on a reused connection", |asked, _| {
            (asked.index > 0 && asked.alone).then(|| vec![Act::Kill])
        })
        .sick(&[1, 4]),
        Row::ill("F06", "FIN instead of a head", |_, _| Some(vec![Act::Fin])),
        Row::ill("F06", "RST instead of a head", |_, _| Some(vec![Act::Kill])),
        Row::ill("F07", "half a head, then FIN", |_, case| {
            let half: &[u8] = match case.http {
                Http::One => b"HTTP/1.1 200 OK\r\ncontent-ty",
                // A HEADERS frame of 64 bytes of which three come.
                Http::Two => b"\0\0\x40\x01\x04\0\0\0\x01\x88\x5f\x1d",
            };
            Some(vec![Act::Raw(half.into()), Act::Fin])
        }),
        Row::ill("F07", "not HTTP", |_, _| {
            Some(vec![Act::Raw("\x15\x03\x01 nonsense, and more of it\r\n\r\n".into()), Act::Stall])
        }),
        Row::ill("F07", "a head without bounds", |_, case| {
            let headers = vec![
                ("content-type", case.endpoint.content_type().to_owned()),
                ("x-long", "x".repeat(1 << 20)),
            ];
            Some(vec![Act::Head { status: 200, headers }, Act::Stall])
        }),
        Row::ill("F08", "never answers, health 200", |_, _| Some(vec![Act::Stall])).hangs(),
        Row::new("F08", "everything silent", Sickness::Freezes).hangs(),
        Row::ill("F09", "500", |_, case| Some(error(500, case))),
        Row::ill("F09", "502, 504, 520 in turn", |asked, case| {
            Some(error([502, 504, 520][asked.nth % 3], case))
        }),
        Row::ill("F10", "503 without Retry-After", |_, case| Some(error(503, case))),
        Row::ill("F10", "429 with Retry-After: 5", |_, case| Some(busy(429, Some(5), case))),
        Row::ill("F10", "529 overloaded", |_, case| Some(busy(529, None, case))),
        Row::ill("F11", "the client's own fault", |asked, case| {
            let (status, body) = client_fault(asked.number.unwrap_or_default(), case);
            Some(case.endpoint.whole(status, &body))
        })
        .sick(ALL)
        .promise(Promise::Relayed(client_fault)),
        Row {
            credentials: true,
            no_return: true,
            ..Row::ill("F12", "401 on evergate's own credentials", |_, case| Some(error(401, case)))
        },
        Row {
            no_return: true,
            ..Row::new(
                "F12",
                "404, the model is missing",
                Sickness::RequestsAndProbes(|asked, case| match asked.path.as_str() {
                    "/v1/models" => Some(models(&[])),
                    _ if asked.number.is_none() => None,
                    _ => {
                        let said = json!({"error": {"message": format!("The model `{MODEL}` does not exist."),
                            "type": "NotFoundError", "code": 404}});
                        Some(case.endpoint.whole(404, &said.to_string()))
                    }
                }),
            )
        },
        Row::new(
            "F39",
            "a head a byte at a time",
            Sickness::Requests(|_, case| {
                let mut acts = vec![Act::Dribble(Duration::from_millis(150))];
                acts.extend(case.endpoint.begun(0, 0, 0));
                acts.push(Act::Stall);
                Some(acts)
            }),
        )
        .hangs(),
        Row {
            // More than the window of an HTTP/2 stream.
            padding: 160 << 10,
            ..Row::ill("F39", "does not read the request", |_, _| Some(vec![Act::Deaf, Act::Stall]))
        }
        .hangs(),
    ]
}

fn behind_the_head() -> Vec<Row> {
    let opens = |id, what, ill| Row::ill(id, what, ill).on(&STREAMS);
    vec![
        Row::ill("F13", "an empty 200", |_, case| {
            let headers = vec![("content-type", case.endpoint.content_type().to_owned())];
            Some(vec![Act::HeadOnly { status: 200, headers }])
        }),
        Row::ill("F13", "a page of HTML", |_, _| {
            Some(api::sized(200, vec![("content-type", "text/html".to_owned())], "<html>It works!</html>"))
        }),
        opens("F14", "opens with a server error", |_, case| {
            let said = json!({"error": {"message": "CUDA error: device-side assert", "type": "server_error",
                "code": 500}});
            Some(opens_with(&worded(said, "api_error", case), case))
        }),
        opens("F14", "opens with an overload", |_, case| {
            let said = json!({"error": {"message": "The request queue is full", "type": "overloaded_error",
                "code": 503}});
            Some(opens_with(&worded(said, "overloaded_error", case), case))
        }),
        opens("F14", "opens with the client's fault", |asked, case| {
            let (_, body) = opening_client_fault(asked.number.unwrap_or_default(), case);
            Some(opens_with(&serde_json::from_str(&body).unwrap(), case))
        })
        .sick(ALL)
        .promise(Promise::Relayed(opening_client_fault)),
        opens("F15", "a head, then silence, health 200", |_, case| Some(silent(case))).hangs(),
        Row::new(
            "F15",
            "a head, then silence, health too",
            Sickness::RequestsAndProbes(|asked, case| {
                Some(if asked.number.is_some() { silent(case) } else { vec![Act::Stall] })
            }),
        )
        .on(&STREAMS)
        .hangs(),
        opens("F16", "cut before the first token", |asked, case| {
            let end = if asked.nth.is_multiple_of(2) { Act::Cut } else { Act::Kill };
            Some(ahead(asked, case, &[end]))
        }),
        opens("F17", "a clean end before the first token", |asked, case| {
            Some(ahead(asked, case, &[Act::End]))
        }),
        opens("F18", "aborted before the first token", |asked, case| {
            let said = match case.endpoint {
                Endpoint::Messages => {
                    "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"api_error\",\"message\":\"boom\"}}\n\n"
                }
                Endpoint::Completions => {
                    "data: {\"choices\":[{\"index\":0,\"text\":\"\",\"finish_reason\":\"abort\"}]}\n\ndata: [DONE]\n\n"
                }
                _ => {
                    "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"abort\"}]}\n\ndata: [DONE]\n\n"
                }
            };
            Some(ahead(asked, case, &[Act::Data(said.into()), Act::End]))
        }),
        // The time a stream takes is the replica's own, and the streams are short.
        Row::new("F20", "ten times slower than its peers", Sickness::Slow(10)).on(&STREAMS),
        opens("F21", "garbage before the first token", |asked, case| {
            Some(ahead(asked, case, &[Act::Data("data: \u{1}\u{2}{[}\n\n".into()), Act::Stall]))
        }),
        opens("F21", "broken framing before the first token", |asked, case| {
            Some(ahead(asked, case, &[Act::Raw("zz\r\nnonsense".into()), Act::Stall]))
        }),
        opens("F23", "dies behind the finish", |asked, case| {
            let number = asked.number?;
            let mut acts = case.endpoint.begun(number, asked.replica, case.endpoint.up_to_finish(number));
            // Over HTTP/2 a reset of the connection would take streams with it that are not finished.
            let dies = case.http == Http::One && asked.nth.is_multiple_of(2);
            // What a reset overtakes has not been said.
            acts.push(Act::Wait(Pace::USUAL.gap));
            acts.push(if dies { Act::Kill } else { Act::Cut });
            Some(acts)
        })
        .promise(Promise::AnswerButUsage),
        Row::ill("F24", "a body shorter than its length", |asked, case| Some(half(asked, case, &[Act::Fin])))
            .on(&WHOLE),
        Row::ill("F24", "a body longer than its length", |asked, case| {
            let body = case.endpoint.pieces(asked.number?, asked.replica).concat();
            let headers = vec![
                ("content-type", case.endpoint.content_type().to_owned()),
                ("content-length", (body.len() / 2).to_string()),
            ];
            Some(vec![Act::Head { status: 200, headers }, Act::Data(body.into()), Act::End])
        })
        .on(&WHOLE),
        Row::ill("F24", "a body reset half-way", |asked, case| Some(half(asked, case, &[Act::Kill])))
            .on(&WHOLE),
        Row::ill("F24", "a body that stalls", |asked, case| Some(half(asked, case, &[Act::Stall])))
            .on(&WHOLE)
            .hangs(),
        Row::ill("F24", "broken JSON", |asked, case| {
            let body = case.endpoint.pieces(asked.number?, asked.replica).concat();
            Some(case.endpoint.whole(200, &body[..body.len() / 2]))
        })
        .on(&WHOLE),
        Row::ill("F24", "NaN in an embedding", |asked, case| {
            let body = case.endpoint.pieces(asked.number?, asked.replica).concat();
            Some(case.endpoint.whole(200, &body.replace("0.5,", "NaN,")))
        })
        .on(&[Endpoint::Embeddings]),
        Row::ill("F38", "UNAVAILABLE, trailers only", |_, _| {
            let headers =
                vec![("content-type", "application/grpc".to_owned()), ("grpc-status", "14".to_owned())];
            Some(vec![Act::HeadOnly { status: 200, headers }])
        })
        .grpc(),
        Row::ill("F38", "INTERNAL in the trailers", |_, case| {
            Some(vec![case.endpoint.head(), Act::Trailers(vec![("grpc-status", "13".to_owned())])])
        })
        .grpc(),
        Row::ill("F38", "RESOURCE_EXHAUSTED", |_, _| {
            let headers =
                vec![("content-type", "application/grpc".to_owned()), ("grpc-status", "8".to_owned())];
            Some(vec![Act::HeadOnly { status: 200, headers }])
        })
        .grpc(),
    ]
}

fn over_time() -> Vec<Row> {
    vec![
        Row::ill("F25", "probes pass, requests fail", |asked, case| {
            Some(if asked.nth.is_multiple_of(2) { vec![Act::Kill] } else { error(500, case) })
        }),
        Row::new("F26", "probes fail, requests work", Sickness::Probes(|_| vec![Act::Kill]))
            .sick(&[1, 2, 3, 4]),
        Row::new(
            "F26",
            "probes say 503, requests work",
            Sickness::Probes(|asked| match asked.path.as_str() {
                "/health" => api::sized(503, Vec::new(), "busy"),
                path => probed(path),
            }),
        )
        .sick(&[1, 2, 3, 4]),
        Row::ill("F27", "a fifth of the requests fails", |asked, case| {
            ((asked.nth + asked.replica) % 5 == 1).then(|| error(500, case))
        }),
        // What fails in no time has nothing in flight, and looks like the least loaded.
        Row::ill("F28", "fails at once: a black hole", |_, _| Some(vec![Act::Kill])),
        Row::new("F29", "restart: refused, loading, slow", Sickness::Restarts),
        Row::new("F30", "a polite drain", Sickness::Drains),
        Row::new("F31", "all are down", Sickness::Refuses).sick(ALL).promise(Promise::Unavailable),
        Row::ill("F32", "all are overloaded", |_, case| Some(busy(429, Some(1), case)))
            .sick(ALL)
            .promise(Promise::AnswerOrOverload),
        // A stream behind its first token would have to be continued when its replica is killed.
        Row::ill("F33", "a request that kills", |asked, _| {
            (asked.number == Some(POISON)).then(|| vec![Act::Die(Duration::from_secs(1))])
        })
        .on(&WHOLE)
        .sick(ALL)
        .promise(Promise::PoisonFails),
        Row::new("F34", "every fourth client leaves", Sickness::ClientsLeave)
            .sick(&[0])
            .promise(Promise::AnswerToWhoStays),
        Row { no_return: true, ..Row::new("F35", "removed by a reload while busy", Sickness::Removed) },
        Row { no_return: true, ..Row::new("F36", "another model at the same address", Sickness::OtherModel) },
    ]
}

/// The endpoint's own way of saying `error`.
fn worded(error: serde_json::Value, anthropic: &str, case: Case) -> serde_json::Value {
    if case.endpoint != Endpoint::Messages {
        return error;
    }
    json!({"type": "error", "error": {"type": anthropic, "message": error["error"]["message"]}})
}

fn error(status: u16, case: Case) -> Vec<Act> {
    let said = json!({"error": {"message": "scripted", "type": "server_error", "code": status}});
    case.endpoint.whole(status, &worded(said, "api_error", case).to_string())
}

fn busy(status: u16, retry_after: Option<u32>, case: Case) -> Vec<Act> {
    let said = json!({"error": {"message": "Too many requests", "type": "overloaded", "code": status}});
    let mut headers = vec![("content-type", "application/json".to_owned())];
    headers.extend(retry_after.map(|seconds| ("retry-after", seconds.to_string())));
    api::sized(status, headers, &worded(said, "overloaded_error", case).to_string())
}

fn client_fault(number: usize, case: Case) -> (u16, String) {
    let status = [400, 404, 409, 413, 422][number % 5];
    let said = json!({"error": {"message": format!("{number}: max_tokens must be positive"),
        "type": "invalid_request_error", "param": "max_tokens", "code": status}});
    (status, worded(said, "invalid_request_error", case).to_string())
}

/// The client's fault said inside a stream: the status is in the words.
fn opening_client_fault(number: usize, case: Case) -> (u16, String) {
    let said = json!({"error": {"message": format!("{number}: temperature must be non-negative"),
        "type": "invalid_request_error", "code": 400}});
    (400, worded(said, "invalid_request_error", case).to_string())
}

fn opens_with(error: &serde_json::Value, case: Case) -> Vec<Act> {
    let name = if case.endpoint == Endpoint::Messages { "event: error\n" } else { "" };
    vec![case.endpoint.head(), Act::Data(format!("{name}data: {error}\n\n").into()), Act::End]
}

/// The beginning of the right answer, as far as it shows no token, and then this.
fn ahead(asked: &Asked, case: Case, then: &[Act]) -> Vec<Act> {
    let number = asked.number.unwrap_or_default();
    let mut acts = case.endpoint.begun(number, asked.replica, case.endpoint.ahead());
    acts.push(Act::Wait(Pace::USUAL.first));
    acts.extend_from_slice(then);
    acts
}

fn silent(case: Case) -> Vec<Act> {
    vec![case.endpoint.head(), Act::Stall]
}

/// The right head, half of the right body, and then this.
fn half(asked: &Asked, case: Case, then: &[Act]) -> Vec<Act> {
    let number = asked.number.unwrap_or_default();
    let body = case.endpoint.pieces(number, asked.replica).concat();
    let mut acts = case.endpoint.whole(200, &body);
    acts.truncate(1);
    acts.push(Act::Data(body[..body.len() / 2].to_owned().into()));
    acts.push(Act::Wait(Pace::USUAL.first));
    acts.extend_from_slice(then);
    acts
}
