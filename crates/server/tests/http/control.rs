//! The routes by which a trainer steers the engine.

use std::path::Path;

use serde_json::{Value, json};

use crate::support::Server;

const GENERATE: &str = "/inference/v1/generate";

fn long(max_tokens: usize) -> String {
    let sampling = json!({"max_tokens": max_tokens, "temperature": 0, "ignore_eos": true});
    json!({"token_ids": [5, 6, 7], "request_id": "long", "sampling_params": sampling, "return_routed_experts": true})
        .to_string()
}

#[tokio::test]
async fn a_pause_refuses_until_it_is_resumed() {
    let server = Server::start();
    assert_eq!(server.get("/is_paused").await.json(), json!({"is_paused": false}));
    server.post("/pause?mode=nap", "").await.refused(400, Some("mode"), "\"nap\"");
    server.post("/pause?clear_cache=x", "").await.refused(400, Some("clear_cache"), "\"x\"");
    assert_eq!(server.post("/pause?mode=wait&clear_cache=false", "").await.json(), json!({"status": "paused"}));
    assert_eq!(server.get("/is_paused").await.json(), json!({"is_paused": true}));
    let refused = server.post(GENERATE, &long(2)).await;
    assert_eq!(refused.headers["retry-after"], "1");
    refused.refused(503, None, "paused");
    assert_eq!(server.get("/health").await.status, 200);
    assert_eq!(server.post("/resume", "").await.json(), json!({"status": "resumed"}));
    assert_eq!(server.post(GENERATE, &long(2)).await.status, 200);
    server.post("/pause", r#"{"mode":"keep"}"#).await.json();
    let body = long(2);
    let (answer, _) = tokio::join!(server.post(GENERATE, &body), async {
        // Taken, and standing still.
        while server.engine.num_live() == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        server.post("/resume", "").await
    });
    assert_eq!(answer.json()["usage"]["completion_tokens"], 2);
}

#[tokio::test]
async fn requests_are_aborted_by_the_name_they_were_given() {
    let server = Server::start();
    server.post("/pause?mode=keep", "").await.json();
    let body = long(50);
    let (answer, aborted) = tokio::join!(server.post(GENERATE, &body), async {
        while server.engine.num_live() == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        let none = server.post("/inference/v1/abort_requests", r#"{"request_ids":["other"]}"#).await.json();
        assert_eq!(none, json!({"aborted": 0}));
        server.post("/inference/v1/abort_requests", r#"{"request_ids":["long"]}"#).await.json()
    });
    assert_eq!(aborted, json!({"aborted": 1}));
    let choice = answer.json()["choices"][0].take();
    assert_eq!((&choice["finish_reason"], &choice["routed_experts"]), (&json!("abort"), &Value::Null));
    server.post("/inference/v1/abort_requests", r#"{"request_ids":[1]}"#).await.refused(
        400,
        Some("request_ids[0]"),
        "1",
    );
    assert_eq!(server.post("/abort_requests", "").await.json(), json!({"aborted": 0}));
}

#[tokio::test]
async fn weights_are_updated_or_stay() {
    let server = Server::start();
    let golden = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name);
    let update = |path: &Path, version: Value| json!({"path": path, "weight_version": version}).to_string();
    server.post("/update_weights", "{}").await.refused(400, Some("path"), "missing");
    server.post("/update_weights", &update(Path::new("/nope"), json!(1))).await.refused(400, Some("path"), "/nope");
    let other = update(&golden("qwen3_moe-a"), Value::Null);
    server.post("/update_weights", &other).await.refused(400, Some("path"), "another architecture");
    let bad = update(&golden("mixtral-a"), json!([1]));
    server.post("/update_weights", &bad).await.refused(400, Some("weight_version"), "[1]");
    assert_eq!(server.get("/server_info").await.json()["weight_version"], "0");
    let before = server.post(GENERATE, &long(5)).await.json()["choices"].take();
    let done = server.post("/update_weights", &update(&golden("mixtral-a"), json!(7))).await.json();
    assert_eq!((&done["success"], &done["weight_version"]), (&json!(true), &json!("7")));
    assert_eq!(server.get("/get_server_info").await.json()["weight_version"], "7");
    assert_eq!(server.post(GENERATE, &long(5)).await.json()["choices"], before);
    let native = server.post("/generate", r#"{"input_ids":[5,6],"sampling_params":{"max_new_tokens":1}}"#).await.json();
    assert_eq!(native["meta_info"]["weight_version"], "7");
}

#[tokio::test]
async fn a_reset_forgets_prefixes() {
    let server = Server::start();
    let prompt: Vec<u32> = (3..60).collect();
    let body = json!({"token_ids": prompt, "sampling_params": {"max_tokens": 1}}).to_string();
    let cached = async || {
        let usage = server.post(GENERATE, &body).await.json()["usage"].take();
        usage["prompt_tokens_details"]["cached_tokens"].as_u64()
    };
    assert_eq!((cached().await, cached().await), (Some(0), Some(48)));
    assert_eq!(server.post("/reset_prefix_cache", "").await.json(), json!({"success": true}));
    assert_eq!((cached().await, cached().await), (Some(0), Some(48)));
    assert_eq!(server.get("/flush_cache").await.status, 200);
    assert_eq!(cached().await, Some(0));
}

#[tokio::test]
async fn every_route_that_is_described_is_there_and_needs_its_key() {
    let server = Server::with(moetrail_engine::EngineConfig::default(), Some("secret"));
    let description = server.get("/openapi.json").await.json();
    let paths = description["paths"].as_object().expect("paths");
    let open = ["/health", "/ping", "/version", "/metrics", "/openapi.json"];
    for (path, methods) in paths {
        for method in methods.as_object().expect("methods").keys() {
            let method = method.to_uppercase().parse().expect("a method");
            let answer = server.call(crate::support::request(method, &path.replace("{id}", "x"), "")).await;
            let expect = if open.contains(&path.as_str()) { 200 } else { 401 };
            assert_eq!(answer.status, expect, "{path}: {}", answer.text);
        }
    }
}
