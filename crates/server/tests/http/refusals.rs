//! What is refused, and in which words.

use axum::body::Body;
use axum::http::{Method, Request, header};
use moetrail_engine::EngineConfig;

use crate::support::{Server, request};

#[tokio::test]
async fn routes_and_methods_that_do_not_exist() {
    let server = Server::start();
    server.get("/v2/models").await.refused(404, None, "GET /v2/models");
    server.get("/v1/completions").await.refused(405, None, "GET");
    server.post("/metrics", "").await.refused(405, None, "POST");
}

#[tokio::test]
async fn bodies_that_are_malformed_or_too_large() {
    let server = Server::start();
    for path in ["/v1/completions", "/v1/chat/completions", "/inference/v1/generate", "/tokenize", "/detokenize"] {
        server.post(path, "{").await.refused(400, None, "not valid JSON");
        server.post(path, "[]").await.refused(400, None, "an object");
    }
    let small = Server { state: server.state.clone().with_body_limit(100), engine: server.engine.clone() };
    let long = format!(r#"{{"prompt":"{}"}}"#, "a".repeat(200));
    small.post("/v1/completions", &long).await.refused(413, None, "limit of 100 bytes");
}

#[tokio::test]
async fn parameters_are_named() {
    let server = Server::start();
    let (generate, start) = ("/inference/v1/generate", "routed_experts_prompt_start");
    let nested = "sampling_params.routed_experts_prompt_start";
    let body = r#"{"token_ids":[5,6],"routed_experts_prompt_start":3}"#;
    server.post(generate, body).await.refused(400, Some(start), "(2), inclusive; it is 3");
    let body = r#"{"token_ids":[5,6],"sampling_params":{"routed_experts_prompt_start":-1}}"#;
    server.post(generate, body).await.refused(400, Some(nested), "it is -1");
    let body = r#"{"token_ids":[5,384]}"#;
    server.post(generate, body).await.refused(400, Some("token_ids"), "384");
    let body = r#"{"prompt":"a","model":"gpt"}"#;
    server.post("/v1/completions", body).await.refused(404, Some("model"), "\"gpt\"");
    let body = r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#;
    server.post("/v1/chat/completions", body).await.refused(400, Some("messages[0].content[0].type"), "image_url");
}

#[tokio::test]
async fn a_server_without_capture_says_so() {
    let server = Server::with(EngineConfig { capture: false, ..EngineConfig::default() }, None);
    let body = r#"{"prompt":"a","return_routed_experts":true}"#;
    server.post("/v1/completions", body).await.refused(400, Some("return_routed_experts"), "does not capture");
    assert_eq!(server.post("/v1/completions", r#"{"prompt":"a"}"#).await.status, 200);
}

#[tokio::test]
async fn a_key_is_needed_where_there_is_one() {
    let server = Server::with(EngineConfig::default(), Some("secret"));
    let with = |path: &str, authorization: &str| {
        Request::builder().uri(path).header(header::AUTHORIZATION, authorization).body(Body::empty()).expect("valid")
    };
    assert_eq!(server.get("/health").await.status, 200);
    server.get("/v1/models").await.refused(401, None, "is needed");
    server.call(with("/v1/models", "Bearer secrets")).await.refused(401, None, "not this server's");
    assert_eq!(server.call(with("/v1/models", "Bearer secret")).await.status, 200);
    for path in ["/v1/completions", "/v1/chat/completions", "/inference/v1/generate", "/tokenize", "/detokenize"] {
        server.post(path, "{}").await.refused(401, None, "is needed");
    }
}

#[tokio::test]
async fn a_full_server_asks_to_come_back() {
    let config = EngineConfig { max_num_seqs: 1, max_queued_requests: 0, ..EngineConfig::default() };
    let server = Server::with(config, None);
    // The first prompt stands still, or it might end before the second comes.
    server.post("/pause?mode=keep", "").await.json();
    let answer = server.post("/v1/completions", r#"{"prompt":["a","b","c"],"max_tokens":400,"ignore_eos":true}"#).await;
    server.post("/resume", "").await.json();
    answer.refused(503, None, "limit of 1");
    assert_eq!(answer.headers[header::RETRY_AFTER], "1");
    // The prompt that had been taken was cancelled with the others.
    while server.engine.num_live() > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(server.post("/v1/completions", r#"{"prompt":"a"}"#).await.status, 200);
}

#[tokio::test]
async fn an_engine_that_shuts_down_takes_nothing() {
    let server = Server::start();
    server.engine.shutdown();
    let answer = server.post("/v1/completions", r#"{"prompt":"a"}"#).await;
    answer.refused(503, None, "shutting down");
    assert!(!answer.headers.contains_key(header::RETRY_AFTER));
}

#[tokio::test]
async fn headers_are_answered() {
    let server = Server::start();
    let mut ask = request(Method::POST, "/v1/completions", r#"{"prompt":"a","max_tokens":1}"#);
    ask.headers_mut().insert("x-request-id", "mine".parse().expect("valid"));
    ask.headers_mut().insert(header::CONTENT_TYPE, "text/plain".parse().expect("valid"));
    ask.headers_mut().insert(header::ORIGIN, "https://example.com".parse().expect("valid"));
    let answer = server.call(ask).await;
    assert_eq!(answer.json()["id"], "cmpl-mine");
    assert_eq!(answer.headers["x-request-id"], "mine");
    assert_eq!(answer.headers["access-control-allow-origin"], "*");
    assert!(server.get("/health").await.headers.contains_key("x-request-id"));
}
