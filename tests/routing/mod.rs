//! Which pool a request goes to, and under which name of its model.

use std::time::Duration;

use evergate::policy::health::ProbeVerdict;
use serde_json::json;
use toml::Value;

use crate::support::backend::{Backend, Script};
use crate::support::client::{Answer, H2Client, Request, chat_request_for, send};
use crate::support::proxy::{Proxy, ProxyBuilder};
use crate::support::reply::{self, Step, Talk};
use crate::support::{PATIENCE, eventually};

/// A healthy replica that lists `model`.
async fn serving(model: &str) -> Backend {
    Backend::start(Script::new().talk(Talk { model: model.to_owned(), ..Talk::default() })).await
}

fn names<const N: usize>(names: [&str; N]) -> Value {
    Value::Array(names.into_iter().map(Value::from).collect())
}

fn table<const N: usize>(pairs: [(&str, &str); N]) -> Value {
    Value::Table(pairs.into_iter().map(|(key, value)| (key.to_owned(), value.into())).collect())
}

async fn asks(proxy: &Proxy, model: &str) -> Answer {
    send(proxy.addr, &chat_request_for(model, "which?", false)).await
}

/// Ids of `GET /v1/models`, sorted.
async fn listed(proxy: &Proxy) -> Vec<String> {
    let answer = send(proxy.addr, &Request::get("/v1/models")).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let list = answer.json();
    assert_eq!(list["object"], "list");
    let data = list["data"].as_array().unwrap();
    assert!(data.iter().all(|entry| entry["object"] == "model"), "{list}");
    let mut ids: Vec<String> = data.iter().map(|entry| entry["id"].as_str().unwrap().to_owned()).collect();
    ids.sort_unstable();
    ids
}

/// Every live backend has told its models.
async fn knows(proxy: &Proxy, models: &[&str]) {
    let directory = proxy.running.directory();
    eventually(PATIENCE, || {
        let snapshot = directory.snapshot();
        models.iter().all(|model| snapshot.pools.iter().any(|pool| pool.lists(model)))
    })
    .await;
}

#[tokio::test]
async fn a_model_goes_to_the_pool_that_names_it_or_whose_backends_list_it() {
    let (a, b, c) = (serving("a").await, serving("b").await, serving("c").await);
    let builder = ProxyBuilder::new()
        .named_pool("first")
        .backend(&a.url())
        .set("pool.models", names(["a"]))
        .named_pool("second")
        .backend(&b.url())
        .set("pool.models", names(["b"]))
        .named_pool("third")
        .backend(&c.url());
    let proxy = Proxy::start(&builder);
    knows(&proxy, &["a", "b", "c"]).await;
    for (model, backend) in [("a", &a), ("b", &b), ("c", &c), ("b", &b)] {
        let before = backend.requests().len();
        assert_eq!(asks(&proxy, model).await.json()["model"], model);
        assert_eq!(backend.requests().len(), before + 1);
    }
    // Without a model: the first.
    send(proxy.addr, &Request::get("/v1/files")).await;
    assert_eq!(a.requests().len(), 2);
    // As the client wrote it, JSON escapes and all.
    let odd = Request::new("POST", "/v1/chat/completions")
        .body(r#"{"model":"zzz", "messages":[], "model" : "\u0062"}"#);
    assert_eq!(send(proxy.addr, &odd).await.json()["model"], "b");
    proxy.is_quiet().await;
}

#[tokio::test]
async fn an_unknown_model_is_told_what_there_is() {
    let (a, b) = (serving("a").await, serving("listed-b").await);
    let builder = ProxyBuilder::new()
        .named_pool("first")
        .backend(&a.url())
        .set("pool.models", names(["a"]))
        .set("pool.aliases", table([("gpt", "a")]))
        .named_pool("second")
        .backend(&b.url());
    let proxy = Proxy::start(&builder);
    knows(&proxy, &["a", "listed-b"]).await;
    let answer = asks(&proxy, "nope").await;
    assert_eq!(answer.status, 404);
    let error = &answer.json()["error"];
    assert_eq!((error["code"].as_str(), error["param"].as_str()), (Some("unknown_model"), Some("model")));
    assert_eq!(error["type"], "invalid_request_error");
    assert_eq!(error["request_id"].as_str(), answer.header("x-request-id"));
    let message = error["message"].as_str().unwrap();
    assert_eq!(message, "the model `nope` is not served here; known models: a, gpt, listed-b");
    assert!(a.requests().is_empty() && b.requests().is_empty());
    // In the words of others too.
    let request = Request::post_json("/v1/messages", &json!({"model": "nope", "messages": []}));
    let answer = send(proxy.addr, &request).await;
    assert_eq!((answer.status, answer.json()["error"]["type"].as_str()), (404, Some("not_found_error")));
    proxy.is_quiet().await;
}

#[tokio::test]
async fn an_alias_changes_the_models_name_and_no_other_byte() {
    let backend = serving("Qwen/Qwen3-8B \"x\"").await;
    let builder = ProxyBuilder::new()
        .backend(&backend.url())
        .set("pool.aliases", table([("gpt-4o", "Qwen/Qwen3-8B \"x\"")]));
    let proxy = Proxy::start(&builder);
    let (head, tail) = (
        "\n{ \"messages\" : [ {\"role\":\"user\",\"content\":\"\\u00e9 \\\"model\\\": \\\"gpt-4o\\\"\"} ],\t\"x\":1.50e3, \"model\" :  ",
        " , \"nested\":{\"model\":\"gpt-4o\"}, \"big\": 12345678901234567890}\r\n",
    );
    let h2 = H2Client::connect(proxy.addr).await;
    for spelled in ["\"gpt-4o\"", "\"gpt\\u002d4o\""] {
        let body = format!("{head}{spelled}{tail}");
        let request = Request::new("POST", "/v1/chat/completions").body(body.clone());
        for answer in [send(proxy.addr, &request).await, h2.send(&request).await] {
            assert_eq!(answer.status, 200, "{}", answer.text());
            let renamed = format!("{head}\"Qwen/Qwen3-8B \\\"x\\\"\"{tail}");
            let seen = backend.requests().pop().unwrap();
            assert_eq!(String::from_utf8_lossy(&seen.body), renamed);
            assert_eq!(seen.header("content-length"), Some(&*renamed.len().to_string()));
        }
    }
    // What is not an alias goes as it is, and an alias is applied once.
    let body = "{\"model\": \"other\", \"messages\": []}";
    send(proxy.addr, &Request::new("POST", "/v1/chat/completions").body(body)).await;
    assert_eq!(&backend.requests().pop().unwrap().body[..], body.as_bytes());
    proxy.is_quiet().await;
}

#[tokio::test]
async fn routes_are_tried_in_order_before_any_model() {
    let backends =
        [serving("m").await, serving("m").await, serving("m").await, serving("m").await, serving("m").await];
    let builder = backends.iter().enumerate().fold(ProxyBuilder::new(), |builder, (nth, backend)| {
        builder.named_pool(&format!("p{nth}")).backend(&backend.url())
    });
    let builder = builder
        .route("p1", &[("path_prefix", "/team".into())])
        .route("p2", &[("host", "*.api.example".into())])
        .route("p3", &[("headers", table([("x-tenant", "blue")])), ("path_prefix", "/v1".into())])
        .route("p4", &[("models", names(["exact", "family-*"]))]);
    let proxy = Proxy::start(&builder);
    let chat = |model: &str| chat_request_for(model, "which?", false);
    for (request, to) in [
        (Request::get("/team"), 1),
        (Request::get("/team/x?y"), 1),
        (Request::get("/teams"), 0),
        (Request::get("/x").header("host", "a.api.example:8080"), 2),
        (Request::get("/x").header("host", "api.example"), 0),
        (Request::get("/team").header("host", "a.api.example"), 1),
        (Request::get("/v1/files").header("x-tenant", "blue"), 3),
        (Request::get("/v1/files").header("x-tenant", "Blue"), 0),
        (Request::get("/v2/files").header("x-tenant", "blue"), 0),
        (chat("exact"), 4),
        (chat("family-x"), 4),
        (chat("family-x").header("x-tenant", "blue"), 3),
    ] {
        let before = backends[to].requests().len();
        let answer = send(proxy.addr, &request).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(backends[to].requests().len(), before + 1, "{request:?}");
    }
    // HTTP/2 says its host otherwise.
    let request = Request::get("/x");
    let builder = ProxyBuilder::new()
        .named_pool("p0")
        .backend(&backends[0].url())
        .named_pool("p1")
        .backend(&backends[1].url())
        .route("p1", &[("host", "evergate.test".into())]);
    let proxy = Proxy::start(&builder);
    let before = backends[1].requests().len();
    H2Client::connect(proxy.addr).await.send(&request).await;
    assert_eq!(backends[1].requests().len(), before + 1);
}

#[tokio::test]
async fn a_route_may_have_a_clock_and_a_replay_rule_of_its_own() {
    let slow = Backend::start(Script::new().by_request(|request| match request.path() {
        "/health" => reply::json(200, &json!({})),
        "/v1/rude" => vec![Step::Rst],
        _ => [vec![Step::Delay(Duration::from_millis(600))], reply::echo(request)].concat(),
    }))
    .await;
    let builder = ProxyBuilder::new()
        .backend(&slow.url())
        .set("pool.retry.wait_max", "0s")
        .route("default", &[("path_prefix", "/v1/hurry".into()), ("total", "100ms".into())])
        .route("default", &[("path_prefix", "/v1/rude".into()), ("replay", "never".into())]);
    let proxy = Proxy::start(&builder);
    let answer = send(proxy.addr, &Request::get("/v1/hurry")).await;
    assert_eq!((answer.status, answer.json()["error"]["code"].as_str()), (504, Some("backend_timeout")));
    assert!(answer.elapsed < Duration::from_millis(500), "{:?}", answer.elapsed);
    assert_eq!(send(proxy.addr, &Request::get("/v1/files")).await.status, 200);
    let answer = send(proxy.addr, &Request::get("/v1/rude")).await;
    assert_eq!(answer.status, 502, "{}", answer.text());
    let tries = slow.requests().iter().filter(|seen| seen.path() == "/v1/rude").count();
    assert_eq!(tries, 1, "GET could be sent again, and the route forbids it");
}

#[tokio::test]
async fn one_pool_without_models_takes_every_name() {
    let backend = serving("m").await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    for request in [
        chat_request_for("whatever", "?", false),
        Request::get("/v1/files"),
        Request::post_json("/v2/models/any/infer", &json!({"inputs": []})),
    ] {
        assert_ne!(send(proxy.addr, &request).await.status, 404);
    }
    assert_eq!(backend.requests().len(), 3);
}

#[tokio::test]
async fn models_are_the_union_of_what_live_backends_list_and_the_aliases() {
    let (a, b, c) = (serving("a").await, serving("b").await, serving("c").await);
    let down = Backend::refusing().await;
    let builder = ProxyBuilder::new()
        .named_pool("first")
        .backend(&a.url())
        .backend(&b.url())
        .backend(&down.url())
        .set("pool.aliases", table([("gpt-4o", "a")]))
        .set("pool.probe.interval", "100ms")
        .set("pool.probe.interval_unsteady", "50ms")
        .named_pool("second")
        .backend(&c.url())
        .set("pool.aliases", table([("gpt-5", "elsewhere")]));
    let proxy = Proxy::start(&builder);
    knows(&proxy, &["a", "b", "c"]).await;
    assert_eq!(listed(&proxy).await, ["a", "b", "c", "gpt-4o", "gpt-5"]);
    let answer = send(proxy.addr, &Request::get("/v1/models")).await;
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let alias =
        answer.json()["data"].as_array().unwrap().iter().find(|entry| entry["id"] == "gpt-4o").cloned();
    assert_eq!(alias.unwrap()["owned_by"], "test", "described as what it stands for");
    // A replica that dies takes its own names away, and no others.
    b.stop().await;
    let gone = async {
        while listed(&proxy).await != ["a", "c", "gpt-4o", "gpt-5"] {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    crate::support::within(PATIENCE, gone).await;
    proxy.is_quiet().await;
}

#[tokio::test]
async fn models_are_asked_of_a_backend_while_no_list_is_known() {
    let backend = Backend::start(Script::new().by_request(|request| match request.path() {
        "/health" => reply::json(200, &json!({})),
        "/v1/models" if request.header("x-forwarded-for").is_none() => reply::error(404),
        _ => reply::json(200, &json!({"object": "list", "data": [], "from": "the backend"})),
    }))
    .await;
    let proxy = Proxy::start(&ProxyBuilder::new().backend(&backend.url()));
    let answer = send(proxy.addr, &Request::get("/v1/models")).await;
    assert_eq!(answer.json()["from"], "the backend");
}

#[tokio::test]
async fn one_model_is_asked_of_the_pool_that_has_it() {
    let model = |name: &'static str| {
        Script::new().talk(Talk { model: name.to_owned(), ..Talk::default() }).by_request(move |request| {
            match request.path() {
                "/health" => reply::json(200, &json!({})),
                "/v1/models" => {
                    reply::json(200, &json!({"object": "list", "data": [{"id": name, "object": "model"}]}))
                }
                _ => reply::json(200, &json!({"id": name, "object": "model", "target": request.target})),
            }
        })
    };
    let (a, b) = (Backend::start(model("a")).await, Backend::start(model("org/b")).await);
    let builder = ProxyBuilder::new()
        .named_pool("first")
        .backend(&a.url())
        .named_pool("second")
        .backend(&b.url())
        .set("pool.aliases", table([("bee", "org/b")]));
    let proxy = Proxy::start(&builder);
    knows(&proxy, &["a", "org/b"]).await;
    for (path, id, target) in [
        ("/v1/models/a", "a", "/v1/models/a"),
        ("/v1/models/org/b", "org/b", "/v1/models/org/b"),
        ("/v1/models/org%2Fb", "org/b", "/v1/models/org%2Fb"),
        ("/v1/models/bee", "org/b", "/v1/models/org%2Fb"),
    ] {
        let answer = send(proxy.addr, &Request::get(path)).await;
        assert_eq!(
            (answer.status, answer.json()["id"].as_str()),
            (200, Some(id)),
            "{path} {}",
            answer.text()
        );
        assert_eq!(answer.json()["target"], target);
    }
    let answer = send(proxy.addr, &Request::get("/v1/models/nope")).await;
    assert_eq!((answer.status, answer.json()["error"]["code"].as_str()), (404, Some("unknown_model")));
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_model_in_the_path_counts_as_one_in_the_body() {
    let infer = |model: &'static str| {
        Script::new().by_request(move |request| match request.path() {
            "/health" => reply::json(200, &json!({})),
            "/v1/models" => reply::error(404),
            _ => reply::json(
                200,
                &json!({"model_name": model, "outputs": [], "predictions": [], "target": request.target}),
            ),
        })
    };
    let (a, b) = (Backend::start(infer("a")).await, Backend::start(infer("b")).await);
    let builder = ProxyBuilder::new()
        .named_pool("first")
        .backend(&a.url())
        .set("pool.models", names(["a"]))
        .named_pool("second")
        .backend(&b.url())
        .set("pool.models", names(["b"]))
        .set("pool.aliases", table([("bee", "b")]));
    let proxy = Proxy::start(&builder);
    let body = json!({"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1.0]}]});
    for (path, model) in [
        ("/v2/models/a/infer", "a"),
        ("/v2/models/b/infer", "b"),
        ("/v2/models/b/versions/3/infer", "b"),
        ("/v1/models/b:predict", "b"),
    ] {
        let answer = send(proxy.addr, &Request::post_json(path, &body)).await;
        assert_eq!(
            (answer.status, answer.json()["model_name"].as_str()),
            (200, Some(model)),
            "{path} {}",
            answer.text()
        );
        assert_eq!(answer.json()["target"], path);
    }
    // A name that is an alias is changed where it stands.
    let answer = send(proxy.addr, &Request::post_json("/v2/models/bee/versions/3/infer?x=y", &body)).await;
    assert_eq!(answer.json()["target"], "/v2/models/b/versions/3/infer?x=y", "{}", answer.text());
    let answer = send(proxy.addr, &Request::post_json("/v2/models/nope/infer", &body)).await;
    assert_eq!((answer.status, answer.json()["error"].is_string()), (404, true), "{}", answer.text());
    proxy.is_quiet().await;
}

/// A replica that answers whatever model it is asked for in the name of the one it has, as llama.cpp does.
fn answering(model: &str) -> Script {
    Script::new().talk(Talk { model: model.to_owned(), ..Talk::default() })
}

#[tokio::test]
async fn f36_a_backend_that_comes_back_with_another_model_answers_nobody_who_wants_the_old_one() {
    let (kept, changed) = (serving("llama").await, serving("llama").await);
    let builder = ProxyBuilder::new().backend(&kept.url()).backend(&changed.url());
    let builder = ["interval", "interval_unsteady"]
        .iter()
        .fold(builder, |builder, key| builder.set(&format!("pool.probe.{key}"), "50ms"))
        .set("pool.health.slow_start", "0s");
    let proxy = Proxy::start(&builder);
    let lists = |backend: &Backend, model: &str| proxy.backend(backend.addr()).lists(model);
    eventually(PATIENCE, || lists(&kept, "llama") && lists(&changed, "llama")).await;

    let over = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let (over, addr) = (over.clone(), proxy.addr);
            tokio::spawn(async move {
                let mut answers = Vec::new();
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    let answer = send(addr, &chat_request_for("llama", "which?", false)).await;
                    answers.push((answer.status, answer.json()["model"].as_str().map(str::to_owned)));
                }
                answers
            })
        })
        .collect();
    for _ in 0..8 {
        changed.has_seen(changed.requests().len() + 4).await;
        changed.stop().await;
        changed.set_script(answering("qwen"));
        changed.restart().await;
        eventually(PATIENCE, || lists(&changed, "qwen")).await;
        let asked = changed.all_requests().len();
        eventually(PATIENCE, || changed.all_requests().len() > asked + 10).await;

        // Nothing is sent there: only its probes can tell that it is away.
        changed.stop().await;
        let away = proxy.backend(changed.addr());
        eventually(PATIENCE, || away.last_probe().is_some_and(|last| last.verdict == ProbeVerdict::Fail))
            .await;
        changed.set_script(answering("llama"));
        changed.restart().await;
        eventually(PATIENCE, || lists(&changed, "llama")).await;
    }
    over.store(true, std::sync::atomic::Ordering::Relaxed);
    for client in clients {
        let answers = client.await.unwrap();
        let wrong: Vec<_> =
            answers.iter().filter(|answer| **answer != (200, Some("llama".to_owned()))).collect();
        assert!(wrong.is_empty(), "{} of {}: {:?}", wrong.len(), answers.len(), wrong.first());
    }
    proxy.is_quiet().await;
}

#[tokio::test]
async fn a_model_is_asked_for_where_it_is_listed_and_nowhere_else_of_its_pool() {
    let (llama, qwen) = (serving("llama").await, serving("qwen").await);
    let proxy = Proxy::start(
        &ProxyBuilder::new().backend(&llama.url()).backend(&qwen.url()).set("pool.retry.wait_max", "100ms"),
    );
    knows(&proxy, &["llama", "qwen"]).await;
    for _ in 0..10 {
        for model in ["llama", "qwen"] {
            assert_eq!(asks(&proxy, model).await.json()["model"], model);
        }
        // Nobody lists it: anybody may know it all the same.
        assert_eq!(asks(&proxy, "other").await.status, 200);
    }
    // The list of one that is gone still says whose model it is: no answer is better than another one's.
    llama.stop().await;
    for _ in 0..10 {
        let answer = asks(&proxy, "llama").await;
        assert!(answer.status >= 500, "{}", answer.text());
        assert_eq!(asks(&proxy, "qwen").await.json()["model"], "qwen");
    }
    proxy.is_quiet().await;
}
