//! What requests give.

use serde_json::{Value, json};

use crate::support::{SHAPE, Server};

const GREEDY: &str = r#""temperature":0,"ignore_eos":true"#;

fn object_shape(choice: &Value) -> (Value, Value) {
    (choice["routed_experts"]["shape"].clone(), choice["routed_experts"]["start"].clone())
}

#[tokio::test]
async fn the_server_says_what_it_serves() {
    let server = Server::start();
    for path in ["/health", "/ping"] {
        assert_eq!(server.get(path).await.status, 200);
    }
    assert_eq!(server.post("/ping", "").await.status, 200);
    assert!(server.get("/version").await.json()["version"].is_string());
    let models = server.get("/v1/models").await.json();
    assert_eq!((&models["data"][0]["id"], &models["data"][0]["max_model_len"]), (&json!("org/toy"), &json!(512)));
    assert_eq!(server.get("/v1/models/org/toy").await.json()["id"], "org/toy");
    server.get("/v1/models/gpt").await.refused(404, Some("model"), "\"gpt\"");
}

#[tokio::test]
async fn generate_returns_rows_from_the_start_on() {
    let (server, (layers, top_k)) = (Server::start(), SHAPE);
    let ask = |start: usize, max_tokens: usize| {
        format!(
            r#"{{"token_ids":[5,6,7,8],"sampling_params":{{{GREEDY},"max_tokens":{max_tokens},"logprobs":1,"routed_experts_prompt_start":{start}}}}}"#
        )
    };
    for (start, max_tokens, rows) in [(0, 3, 6), (2, 3, 4), (4, 1, 0), (4, 2, 1), (0, 0, 4), (4, 0, 0)] {
        let answer = server.post("/inference/v1/generate", &ask(start, max_tokens)).await;
        let choice = answer.json()["choices"][0].clone();
        assert_eq!(object_shape(&choice), (json!([rows, layers, top_k]), json!(start)), "{start} {max_tokens}");
        assert_eq!(choice["token_ids"].as_array().map(Vec::len), Some(max_tokens));
        assert_eq!(choice["logprobs"]["content"].as_array().map(Vec::len), Some(max_tokens));
        assert_eq!(choice["finish_reason"], "length");
        assert!(answer.text.contains(r#""routed_experts":{"data":""#), "{}", answer.text);
    }
}

#[tokio::test]
async fn a_stream_joins_to_the_answer_in_one_piece() {
    let server = Server::start();
    let ask = |stream: bool| {
        format!(
            r#"{{"prompt":["the cat","a dog"],"n":2,"max_tokens":9,"seed":3,"ignore_eos":true,"return_token_ids":true,
            "logprobs":1,"return_routed_experts":true,"routed_experts_format":"object","stream":{stream}}}"#
        )
    };
    let whole = server.post("/v1/completions", &ask(false)).await.json();
    let chunks = server.post("/v1/completions", &ask(true)).await.chunks();
    let choices = whole["choices"].as_array().expect("a list");
    assert_eq!(choices.len(), 4);
    for choice in choices {
        let own = || chunks.iter().map(|chunk| &chunk["choices"][0]).filter(|delta| delta["index"] == choice["index"]);
        let text: String = own().filter_map(|delta| delta["text"].as_str()).collect();
        let ids: Vec<&Value> = own().filter_map(|delta| delta["token_ids"].as_array()).flatten().collect();
        assert_eq!(Some(text.as_str()), choice["text"].as_str());
        assert_eq!(ids, choice["token_ids"].as_array().expect("ids").iter().collect::<Vec<_>>());
        let last = own().next_back().expect("a finishing chunk");
        assert_eq!(last["routed_experts"], choice["routed_experts"]);
        assert_eq!(last["finish_reason"], choice["finish_reason"]);
        assert!(own().rev().skip(1).all(|delta| delta.get("routed_experts").is_none()));
    }
}

#[tokio::test]
async fn chat_answers_in_one_piece_and_in_chunks() {
    let server = Server::start();
    let ask = |stream: bool| {
        format!(
            r#"{{"model":"org/toy","messages":[{{"role":"user","content":"hello"}}],"max_tokens":6,{GREEDY},"stream":{stream},
            "stream_options":{}}}"#,
            if stream { r#"{"include_usage":true}"# } else { "null" }
        )
    };
    let whole = server.post("/v1/chat/completions", &ask(false)).await.json();
    let chunks = server.post("/v1/chat/completions", &ask(true)).await.chunks();
    let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(whole["choices"][0]["message"]["content"], text);
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let usage = chunks.last().map(|chunk| chunk["usage"].clone()).expect("a chunk");
    assert_eq!(usage["completion_tokens"], 6);
    assert_eq!(usage["prompt_tokens"], whole["usage"]["prompt_tokens"]);
}

#[tokio::test]
async fn npy_is_the_default_of_openai_s_endpoints() {
    let server = Server::start();
    let body = r#"{"prompt":[5,6,7],"max_tokens":2,"routed_experts_prompt_start":1}"#;
    let choice = server.post("/v1/completions", body).await.json()["choices"][0].clone();
    assert!(choice["routed_experts"].as_str().is_some_and(|npy| npy.starts_with("k05VTVBZ")));
    assert_eq!(choice["routed_experts_start"], 1);
    let plain = server.post("/v1/completions", r#"{"prompt":[5,6,7],"max_tokens":2}"#).await.json();
    assert_eq!(plain["choices"][0]["routed_experts"], Value::Null);
}

#[tokio::test]
async fn text_goes_both_ways() {
    let server = Server::start();
    let tokens = server.post("/tokenize", r#"{"prompt":"héllo","return_token_strs":true}"#).await.json();
    assert_eq!(tokens["count"].as_u64(), tokens["tokens"].as_array().map(|ids| ids.len() as u64));
    let text = server.post("/detokenize", &json!({"tokens": tokens["tokens"]}).to_string()).await.json();
    assert_eq!(text["prompt"], "héllo");
}

#[tokio::test]
async fn large_bodies_and_answers_take_the_same_way() {
    // Long enough to be parsed and formatted off the async workers.
    let server = Server::start();
    let ids: Vec<u32> = (0..480).map(|id| id % 380).collect();
    let padding = "x".repeat(64 << 10);
    let body = json!({"token_ids": ids, "user": padding, "return_routed_experts": true,
        "sampling_params": {"n": 120, "max_tokens": 2, "ignore_eos": true, "logprobs": 5, "prompt_logprobs": 5}});
    let answer = server.post("/inference/v1/generate", &body.to_string()).await.json();
    let choices = answer["choices"].as_array().expect("a list");
    assert_eq!(choices.len(), 120);
    assert!(choices.iter().all(|choice| object_shape(choice) == (json!([481, 3, 2]), json!(0))));
    assert_eq!(answer["prompt_logprobs"].as_array().map(Vec::len), Some(480));
}

#[tokio::test]
async fn metrics_are_the_engine_s_and_the_server_s() {
    let server = Server::start();
    server.post("/v1/completions", r#"{"prompt":"a","max_tokens":2,"ignore_eos":true}"#).await.json();
    let text = server.get("/metrics").await.text;
    assert_eq!(text.matches("# EOF").count(), 1);
    assert_eq!(server.metric("vllm:generation_tokens_total").await, 2.0);
    let route = r#"http_requests_total{handler="/v1/completions",method="POST",status="200"}"#;
    assert_eq!(server.metric(route).await, 1.0);
}
