//! Bodies arrive byte for byte, whatever their length, framing and HTTP version on either side.

use bytes::Bytes;

use crate::support::backend::{Backend, RequestSeen, Script};
use crate::support::client::{Answer, Client, End, H2Client, Request};
use crate::support::h2_backend::{H2Answer, H2Backend};
use crate::support::hash;
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::reply::{self, Step};
use crate::support::tls::{Authority, Certificate};

const LENGTHS: [usize; 7] = [0, 1, 977, 65_535, 65_537, 300_000, 3 << 20];

fn random(length: usize) -> Bytes {
    let mut rng = fastrand::Rng::with_seed(length as u64);
    std::iter::repeat_with(|| rng.u8(..)).take(length).collect::<Vec<u8>>().into()
}

/// Gives the body back: with a length, or chunked in odd pieces where the target says so.
fn mirror(request: &RequestSeen) -> Vec<Step> {
    if !request.target.ends_with("chunked") {
        return reply::body(200, "application/octet-stream", request.body.clone());
    }
    let head = [("content-type", "application/octet-stream"), ("transfer-encoding", "chunked")];
    let mut steps = vec![Step::Send(reply::head(200, &head))];
    steps.extend(request.body.chunks(40_961).map(reply::chunk));
    steps.push(reply::last_chunk());
    steps
}

fn h2_mirror(request: &RequestSeen) -> H2Answer {
    let answer = H2Answer::new(200).header("content-type", "application/octet-stream");
    if request.target.ends_with("chunked") {
        return request.body.chunks(40_961).fold(answer, |answer, chunk| answer.data(chunk.to_vec()));
    }
    let length = request.body.len().to_string();
    answer.header("content-length", &length).data(request.body.clone())
}

fn upload(length: usize, target: &str) -> Request {
    Request::new("POST", target).header("content-type", "application/octet-stream").body(random(length))
}

/// The same body, sent chunked in odd pieces.
fn chunked(request: &Request) -> Vec<u8> {
    let head = Request { body: Bytes::new(), ..request.clone() }.header("transfer-encoding", "chunked");
    let mut bytes = head.to_bytes();
    for piece in request.body.chunks(50_021) {
        bytes.extend_from_slice(format!("{:X};ext=\"1\"\r\n", piece.len()).as_bytes());
        bytes.extend_from_slice(piece);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"0\r\n\r\n");
    bytes
}

#[track_caller]
fn assert_mirrored(answer: &Answer, request: &Request) {
    assert_eq!((answer.status, answer.end), (200, End::Clean), "{}", answer.text());
    assert_eq!(answer.body.len(), request.body.len(), "{}", request.target);
    assert!(answer.body == request.body, "{} came back changed", request.target);
    if !request.target.ends_with("chunked") {
        assert_eq!(answer.header("content-length"), Some(&*request.body.len().to_string()));
    }
}

async fn all_lengths_over_http1(mut client: Client) {
    for length in LENGTHS {
        for target in ["/v1/files", "/v1/files?chunked"] {
            let request = upload(length, target);
            assert_mirrored(&client.send(&request).await, &request);
        }
    }
}

async fn all_lengths_over_http2(client: &H2Client) {
    for length in LENGTHS {
        for target in ["/v1/files", "/v1/files?chunked"] {
            let request = upload(length, target);
            assert_mirrored(&client.send(&request).await, &request);
        }
    }
}

#[tokio::test]
async fn http1_to_http1() {
    let backend = Backend::start(Script::new().by_request(mirror)).await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    all_lengths_over_http1(Client::connect(proxy.addr).await).await;
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_chunked_upload_loses_its_chunks_and_nothing_else() {
    let backend = Backend::start(Script::new().by_request(mirror)).await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    let mut client = Client::connect(proxy.addr).await;
    for length in LENGTHS {
        let request = upload(length, "/v1/files");
        client.write(&chunked(&request)).await.unwrap();
        assert_mirrored(&client.try_read_answer("POST").await.unwrap(), &request);
    }
    proxy.is_quiet().await;
}

#[tokio::test]
async fn http2_to_http1() {
    let backend = Backend::start(Script::new().by_request(mirror)).await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    all_lengths_over_http2(&H2Client::connect(proxy.addr).await).await;
    proxy.is_quiet().await;
}

#[tokio::test]
async fn http1_to_http2() {
    let backend = H2Backend::start(h2_mirror).await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()).set("pool.http", "2"));
    all_lengths_over_http1(Client::connect(proxy.addr).await).await;
    proxy.is_quiet().await;
}

#[tokio::test]
async fn http2_to_http2() {
    let backend = H2Backend::start(h2_mirror).await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()).set("pool.http", "2"));
    all_lengths_over_http2(&H2Client::connect(proxy.addr).await).await;
    proxy.is_quiet().await;
}

#[tokio::test]
async fn tls_on_both_sides_with_either_version() {
    let authority = Authority::new();
    let ours = authority.server(Certificate::Good, &[]);
    let proxy_to = |url: &str| {
        let builder = ProxyBuilder::new()
            .backend(url)
            .set("listener.tls.certificate", ours.certificate_path().to_str().unwrap())
            .set("listener.tls.key", ours.key_path().to_str().unwrap())
            .set("pool.tls.ca", authority.ca_path().to_str().unwrap());
        Proxy::start(&builder)
    };
    let old = authority.server(Certificate::Good, &["http/1.1"]);
    let new = authority.server(Certificate::Good, &["h2"]);
    let h1 = Backend::start_tls(Script::new().by_request(mirror), &old).await;
    let h2 = H2Backend::start_tls(h2_mirror, &new).await;
    for proxy in [proxy_to(&h1.url()), proxy_to(&h2.url())] {
        let client = Client::connect_tls(proxy.addr, authority.client(&["http/1.1"])).await.unwrap();
        all_lengths_over_http1(client).await;
        let client = H2Client::connect_tls(proxy.addr, authority.client(&["h2"])).await.unwrap();
        all_lengths_over_http2(&client).await;
        proxy.is_quiet().await;
    }
    assert!(h1.requests().iter().all(|seen| seen.header("x-forwarded-proto") == Some("https")));
}

/// Inference bodies take another way: they are kept, and their answers are held until whole.
#[tokio::test]
async fn bodies_that_are_kept_are_not_changed_either() {
    let tokens = |request: &RequestSeen| {
        format!("{{\"count\": 1, \"tokens\" :[1],\"hash\":\"{}\"}}\n", hash(&request.body))
    };
    let h1 = Backend::start(Script::new().by_request(move |request| match request.path() {
        "/health" => reply::json(200, &serde_json::Value::Null),
        _ => reply::body(200, "application/json", tokens(request)),
    }))
    .await;
    let h2 = H2Backend::start(move |request| {
        H2Answer::new(200).header("content-type", "application/json").data(tokens(request))
    })
    .await;
    for (url, http) in [(h1.url(), "1"), (h2.url(), "2")] {
        let proxy = Proxy::start(&ProxyBuilder::new().backend(&url).set("pool.http", http));
        let (mut old, new) = (Client::connect(proxy.addr).await, H2Client::connect(proxy.addr).await);
        for length in LENGTHS {
            let request = upload(length, "/tokenize");
            let expected =
                format!("{{\"count\": 1, \"tokens\" :[1],\"hash\":\"{}\"}}\n", hash(&request.body));
            for answer in [old.send(&request).await, new.send(&request).await] {
                assert_eq!((answer.status, answer.text()), (200, expected.clone()));
            }
            old.write(&chunked(&request)).await.unwrap();
            assert_eq!(old.try_read_answer("POST").await.unwrap().text(), expected);
        }
        proxy.is_quiet().await;
    }
}
