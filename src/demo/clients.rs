//! The clients of the demo: each asks, reads the whole answer, compares it with what the model says, rests
//! a moment, asks again.
//!
//! They know nothing of replicas and never ask twice: whatever goes wrong behind the proxy and is not put
//! right there shows here. Every other answer is a stream, as chats are; the rest are wanted whole.

use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::clock;
use crate::demo::tally::{Books, Seen};
use crate::sim::ReplicaConfig;
use crate::sse::Decoder;

/// Enough that a replica in trouble always has some of their work.
pub(super) const CLIENTS: usize = 12;
/// Longest rest between an answer and the next question.
const REST_MAX: Duration = Duration::from_millis(400);
/// Longer than any clock of the demo: what takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(20);
/// An event of the simulated engines is a few hundred bytes.
const EVENT_BYTES_MAX: usize = 64 * 1024;

const SUBJECTS: [&str; 6] = [
    "two lights are better than one",
    "a frozen server is worse than a dead one",
    "an answer should not be said twice",
    "waiting a moment often helps",
    "silence is not an answer",
    "a good proxy is a boring one",
];

/// The clients at work. Dropping it sends them home at once.
pub(super) struct Clients {
    tasks: JoinSet<()>,
    closing: watch::Sender<bool>,
}

impl Clients {
    /// Sends them to `proxy`. `model` is the replica whose answers are right.
    pub(super) fn start(proxy: SocketAddr, model: ReplicaConfig, books: Arc<Mutex<Books>>) -> Self {
        let (closing, closed) = watch::channel(false);
        let model = Arc::new(model);
        let mut tasks = JoinSet::new();
        for nth in 0..CLIENTS {
            let client = Client { nth, proxy, model: model.clone(), books: books.clone(), connection: None };
            tasks.spawn(client.work(closed.clone()));
        }
        Self { tasks, closing }
    }

    /// No more questions; returns when the last answer is there.
    pub(super) async fn finish(self) {
        self.closing.send_replace(true);
        self.tasks.join_all().await;
    }
}

struct Client {
    nth: usize,
    proxy: SocketAddr,
    model: Arc<ReplicaConfig>,
    books: Arc<Mutex<Books>>,
    connection: Option<SendRequest<Full<Bytes>>>,
}

/// A question and its right answer.
struct Question {
    body: Bytes,
    stream: bool,
    right: String,
}

/// What a stream has said so far.
#[derive(Default)]
struct Said {
    text: String,
    finish: Option<String>,
    error: Option<String>,
    done: bool,
    garbage: bool,
}

impl Client {
    async fn work(mut self, mut closed: watch::Receiver<bool>) {
        let mut rng = clock::rng();
        for number in 1_u64.. {
            let rest = REST_MAX.mul_f64(rng.f64());
            tokio::select! {
                () = tokio::time::sleep(rest) => {}
                // An error is the demo gone, which means the same.
                _ = closed.wait_for(|closed| *closed) => return,
            }
            let question = Question::new(&self.model, self.nth, number);
            let began = clock::now();
            let seen = match tokio::time::timeout(PATIENCE, self.ask(&question)).await {
                Ok(seen) => seen.unwrap_or_else(|failed| failed),
                Err(_elapsed) => Seen::Failed(format!("no end of an answer within {} s", PATIENCE.as_secs())),
            };
            if seen != Seen::Answered {
                self.connection = None;
            }
            self.books.lock().add(&seen, clock::now().since(began));
        }
    }

    /// Asks once. The error is what was seen instead of an answer that could be read to its end.
    async fn ask(&mut self, question: &Question) -> Result<Seen, Seen> {
        let request = Request::post("/v1/chat/completions")
            .header(header::HOST, self.proxy.to_string())
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(question.body.clone()))
            .map_err(|error| Seen::Failed(error.to_string()))?;
        let connection = self.connect().await.map_err(|error| failed("cannot connect", &error))?;
        let answer = connection.send_request(request).await.map_err(|error| failed("no answer", &error))?;
        let status = answer.status();
        if status != StatusCode::OK {
            let body = answer.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
            return Err(Seen::Failed(format!("status {}: {}", status.as_u16(), message(&body))));
        }
        if question.stream {
            read_stream(answer.into_body(), question).await
        } else {
            read_whole(answer.into_body(), question).await
        }
    }

    async fn connect(&mut self) -> std::io::Result<&mut SendRequest<Full<Bytes>>> {
        if let Some(mut kept) = self.connection.take()
            && kept.ready().await.is_ok()
        {
            return Ok(self.connection.insert(kept));
        }
        let stream = TcpStream::connect(self.proxy).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(std::io::Error::other)?;
        // Its errors are seen by whoever asks; it ends with its sender.
        tokio::spawn(connection);
        Ok(self.connection.insert(sender))
    }
}

impl Question {
    fn new(model: &ReplicaConfig, client: usize, number: u64) -> Self {
        let turn = usize::try_from(number).unwrap_or_default().wrapping_add(client);
        let stream = turn.is_multiple_of(2);
        let subject = SUBJECTS[turn % SUBJECTS.len()];
        let content = format!("Client {client} asks for the time number {number} why {subject}.");
        let body = json!({
            "model": model.model,
            "stream": stream,
            "messages": [{"role": "user", "content": content}],
        });
        let right = model.answer_to_chat(&body).unwrap_or_default();
        Self { body: body.to_string().into(), stream, right }
    }
}

async fn read_whole(body: Incoming, question: &Question) -> Result<Seen, Seen> {
    let body = body.collect().await.map_err(|error| failed("the answer broke off", &error))?.to_bytes();
    let Ok(answer) = serde_json::from_slice::<Value>(&body) else {
        return Err(Seen::Wrong("the answer is not JSON".to_owned()));
    };
    let choice = &answer["choices"][0];
    Ok(judge(choice["message"]["content"].as_str(), choice["finish_reason"].as_str(), &question.right))
}

async fn read_stream(mut body: Incoming, question: &Question) -> Result<Seen, Seen> {
    let mut decoder = Decoder::new(EVENT_BYTES_MAX);
    let mut said = Said::default();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| failed("the stream broke off without a word", &error))?;
        let Ok(chunk) = frame.into_data() else { continue };
        let fed = decoder.feed(&chunk, |event| {
            said.hear(event.data);
            ControlFlow::Continue(())
        });
        fed.map_err(|_too_large| Seen::Wrong("an event without end".to_owned()))?;
    }
    Ok(said.judged(&question.right))
}

impl Said {
    fn hear(&mut self, data: &[u8]) {
        if data == b"[DONE]" {
            self.done = true;
            return;
        }
        let Ok(event) = serde_json::from_slice::<Value>(data) else {
            self.garbage = true;
            return;
        };
        if !event["error"].is_null() {
            self.error = Some(message(data));
        }
        let choice = &event["choices"][0];
        self.text += choice["delta"]["content"].as_str().unwrap_or_default();
        if let Some(finish) = choice["finish_reason"].as_str() {
            self.finish = Some(finish.to_owned());
        }
    }

    fn judged(&self, right: &str) -> Seen {
        match &self.error {
            _ if self.garbage => Seen::Wrong("an event that is not JSON".to_owned()),
            Some(error) if self.text.is_empty() => {
                Seen::Failed(format!("an error instead of an answer: {error}"))
            }
            Some(_) if self.done => Seen::Wrong("[DONE] after an error".to_owned()),
            Some(_) if !right.starts_with(&self.text) => {
                Seen::Wrong("other words before it was cut".to_owned())
            }
            Some(_) => Seen::Cut,
            None if !self.done => {
                Seen::Failed("the stream ended without [DONE] and without an error".to_owned())
            }
            None => judge(Some(&self.text), self.finish.as_deref(), right),
        }
    }
}

/// Judges an answer that claims to be complete.
fn judge(text: Option<&str>, finish: Option<&str>, right: &str) -> Seen {
    match (text, finish) {
        (Some(text), Some("stop")) if text == right => Seen::Answered,
        (Some(text), Some("stop")) => {
            let same = text.bytes().zip(right.bytes()).take_while(|(a, b)| a == b).count();
            Seen::Wrong(format!("other words than the model's from byte {same} of {} on", right.len()))
        }
        (Some(_), finish) => Seen::Wrong(format!("finish reason {finish:?} instead of \"stop\"")),
        (None, _) => Seen::Wrong("no text".to_owned()),
    }
}

/// The message of an error body or event, else the beginning of what it is.
fn message(body: &[u8]) -> String {
    let json: Value = serde_json::from_slice(body).unwrap_or_default();
    match json["error"]["message"].as_str() {
        Some(message) => message.to_owned(),
        None => String::from_utf8_lossy(&body[..body.len().min(80)]).into_owned(),
    }
}

fn failed(what: &str, error: &dyn std::error::Error) -> Seen {
    Seen::Failed(format!("{what}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(events: &[&str]) -> Said {
        let mut said = Said::default();
        events.iter().for_each(|event| said.hear(event.as_bytes()));
        said
    }

    const HELLO: &str = r#"{"choices":[{"delta":{"content":"Hello"}}]}"#;
    const WORLD: &str = r#"{"choices":[{"delta":{"content":" world"},"finish_reason":"stop"}]}"#;
    const ERROR: &str = r#"{"error":{"message":"the backend was lost"}}"#;

    #[test]
    fn a_stream_is_right_only_when_it_is_whole() {
        let right = "Hello world";
        assert_eq!(heard(&[HELLO, WORLD, "[DONE]"]).judged(right), Seen::Answered);
        assert!(matches!(heard(&[HELLO, WORLD]).judged(right), Seen::Failed(_)));
        assert!(matches!(heard(&[HELLO, "[DONE]"]).judged(right), Seen::Wrong(_)));
        assert!(matches!(heard(&[HELLO, HELLO, WORLD, "[DONE]"]).judged(right), Seen::Wrong(_)));
        assert!(matches!(heard(&[]).judged(right), Seen::Failed(_)));
        assert!(matches!(heard(&["{"]).judged(right), Seen::Wrong(_)));
    }

    #[test]
    fn only_an_error_after_words_that_were_right_is_a_cut() {
        assert_eq!(heard(&[HELLO, ERROR]).judged("Hello world"), Seen::Cut);
        assert!(matches!(heard(&[HELLO, ERROR]).judged("Help"), Seen::Wrong(_)));
        assert!(matches!(heard(&[HELLO, ERROR, "[DONE]"]).judged("Hello world"), Seen::Wrong(_)));
        let Seen::Failed(why) = heard(&[ERROR]).judged("Hello world") else { panic!("not a cut") };
        assert!(why.ends_with("the backend was lost"), "{why}");
    }

    #[test]
    fn every_question_has_its_own_answer_and_half_of_them_are_streamed() {
        let model = ReplicaConfig::default();
        let questions: Vec<Question> = (1..=30).map(|number| Question::new(&model, 1, number)).collect();
        assert_eq!(questions.iter().filter(|question| question.stream).count(), 15);
        for (at, question) in questions.iter().enumerate() {
            assert!(question.right.len() > 100);
            assert!(questions[..at].iter().all(|earlier| earlier.right != question.right));
        }
    }
}
