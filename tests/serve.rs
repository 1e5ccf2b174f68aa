//! The server as a user meets it: the binary, over HTTP.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::process::{Answer, Server};

const GENERATE: &str = "/inference/v1/generate";
/// Layers, top-k and MoE layers of the checkpoints used here.
const A: (usize, usize, usize) = (3, 2, 3);
const B: (usize, usize, usize) = (4, 4, 3);

fn prompt(len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| 3 + (i * 37 + i * i) % 300).collect()
}

fn generate(prompt_len: usize, max_tokens: usize, extra: Value) -> Value {
    let mut body = json!({
        "token_ids": prompt(prompt_len),
        "sampling_params": {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": true, "logprobs": 1},
        "return_routed_experts": true,
    });
    merge(&mut body, extra);
    body
}

fn merge(to: &mut Value, from: Value) {
    match (to, from) {
        (Value::Object(to), Value::Object(from)) => {
            for (key, value) in from {
                merge(to.entry(key).or_insert(Value::Null), value);
            }
        }
        (to, from) => *to = from,
    }
}

/// `(start, shape, bytes)` of the object form.
fn object(choice: &Value) -> (usize, Vec<usize>, Vec<u8>) {
    let rows = &choice["routed_experts"];
    let shape = rows["shape"].as_array().expect("a shape").iter().map(|n| n.as_u64().unwrap() as usize).collect();
    let data = STANDARD.decode(rows["data"].as_str().expect("data")).expect("base64");
    assert_eq!(rows["dtype"], "uint8");
    (rows["start"].as_u64().expect("a start") as usize, shape, data)
}

fn ok(answer: Answer) -> Value {
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()
}

fn refused(answer: Answer, param: &str, message: &str) {
    assert_eq!(answer.status, 400, "{}", answer.body);
    let error = &answer.json()["error"];
    assert_eq!(error["param"], param, "{}", answer.body);
    assert!(error["message"].as_str().expect("a message").contains(message), "{message:?} not in {}", answer.body);
    assert_eq!(error["code"], 400);
}

#[test]
fn every_start_returns_exactly_its_rows_and_drains_exactly_their_bytes() {
    for (model, (layers, top_k, moe_layers)) in [("qwen3_moe-a", A), ("qwen3_moe-b", B)] {
        let server = Server::start(model, &["--no-enable-prefix-caching"]);
        let prompt_len = 40;
        for max_tokens in [0, 1, 5] {
            let full = ok(server.post(GENERATE, &generate(prompt_len, max_tokens, json!({}))));
            let (_, _, all) = object(&full["choices"][0]);
            let end = prompt_len + max_tokens.max(1) - 1;
            for start in [0, 1, 15, 16, 17, prompt_len - 1, prompt_len] {
                let before = server.metric("moetrail_routed_experts_d2h_bytes_total");
                let trimmed = server.metric("moetrail_routed_experts_rows_trimmed_total");
                let body = generate(prompt_len, max_tokens, json!({"routed_experts_prompt_start": start}));
                let reply = ok(server.post(GENERATE, &body));
                let (found, shape, data) = object(&reply["choices"][0]);
                assert_eq!((found, shape), (start, vec![end - start, layers, top_k]));
                assert_eq!(data, all[start * layers * top_k..], "start {start}");
                let drained = server.metric("moetrail_routed_experts_d2h_bytes_total") - before;
                assert_eq!(drained as usize, (end - start) * moe_layers * top_k, "start {start}");
                assert_eq!(server.metric("moetrail_routed_experts_rows_trimmed_total") - trimmed, start as f64);
            }
        }
    }
}

#[test]
fn a_request_that_wants_no_rows_costs_no_byte() {
    let server = Server::start("qwen3_moe-a", &[]);
    for extra in [
        json!({"return_routed_experts": false}),
        json!({"return_routed_experts": null}),
        json!({"return_routed_experts": false, "routed_experts_prompt_start": 3}),
    ] {
        let reply = ok(server.post(GENERATE, &generate(20, 4, extra)));
        assert!(reply["choices"][0]["routed_experts"].is_null());
    }
    assert_eq!(server.metric("moetrail_routed_experts_d2h_bytes_total"), 0.0);
    assert_eq!(server.metric("moetrail_routed_experts_rows_returned_total"), 0.0);
    assert!(server.metric("moetrail_routed_experts_rows_captured_total") > 0.0);
    // A start alone asks for rows.
    let body = generate(20, 4, json!({"return_routed_experts": null, "routed_experts_prompt_start": 3}));
    assert_eq!(object(&ok(server.post(GENERATE, &body))["choices"][0]).0, 3);
    let body =
        generate(20, 4, json!({"return_routed_experts": null, "sampling_params": {"routed_experts_prompt_start": 7}}));
    assert_eq!(object(&ok(server.post(GENERATE, &body))["choices"][0]).0, 7);
}

#[test]
fn bad_starts_are_refused_by_name() {
    let server = Server::start("qwen3_moe-a", &[]);
    let start = |value: Value| server.post(GENERATE, &generate(20, 4, json!({"routed_experts_prompt_start": value})));
    let param = "routed_experts_prompt_start";
    refused(start(json!(21)), param, "between 0 and the prompt length (20), inclusive; it is 21");
    refused(start(json!(-1)), param, "-1");
    refused(start(json!(true)), param, "true");
    refused(start(json!(1.5)), param, "1.5");
    refused(start(json!("3")), param, "3");
    let nested = |value: Value| generate(20, 4, json!({"sampling_params": {"routed_experts_prompt_start": value}}));
    refused(server.post(GENERATE, &nested(json!(99))), "sampling_params.routed_experts_prompt_start", "99");
    refused(server.post(GENERATE, &nested(json!(false))), "sampling_params.routed_experts_prompt_start", "false");
    let mut both = nested(json!(1));
    both["routed_experts_prompt_start"] = json!(2);
    assert_eq!(server.post(GENERATE, &both).status, 400);
    both["routed_experts_prompt_start"] = json!(1);
    assert_eq!(server.post(GENERATE, &both).status, 200);
    // Validated even where no rows are wanted.
    let body = generate(20, 4, json!({"routed_experts_prompt_start": 21, "return_routed_experts": false}));
    refused(server.post(GENERATE, &body), param, "21");
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn the_payload_can_be_cut_out_of_the_raw_body() {
    let server = Server::start("qwen3_moe-a", &[]);
    let answer = server.post(GENERATE, &generate(20, 4, json!({"sampling_params": {"n": 2}})));
    let mark = r#""routed_experts":{"data":""#;
    let at = answer.body.find(mark).expect("the exact byte sequence") + mark.len();
    let end = at + answer.body[at..].find('"').expect("a closing quote");
    let cut = STANDARD.decode(&answer.body[at..end]).expect("base64");
    let reply = answer.json();
    assert_eq!(cut, object(&reply["choices"][0]).2);
    assert_eq!(object(&reply["choices"][1]).1, object(&reply["choices"][0]).1);
    let content = reply["choices"][0]["logprobs"]["content"].as_array().expect("logprobs");
    for (entry, id) in content.iter().zip(reply["choices"][0]["token_ids"].as_array().expect("ids")) {
        assert_eq!(entry["token"], format!("token_id:{id}"));
        assert!(entry["logprob"].as_f64().expect("a number") <= 0.0);
    }
}

#[test]
fn prefix_hits_return_the_same_bytes() {
    let server = Server::start("qwen3_moe-a", &[]);
    let body = generate(100, 8, json!({}));
    let first = ok(server.post(GENERATE, &body));
    let second = ok(server.post(GENERATE, &body));
    assert_eq!(first["choices"], second["choices"]);
    assert_eq!(second["usage"]["prompt_tokens_details"]["cached_tokens"], 96);
    assert_eq!(server.metric("vllm:prefix_cache_hits_total"), 96.0);
    assert_eq!(server.metric("moetrail_routed_experts_rows_prefix_cached_total"), 96.0);
    // Another salt shares nothing.
    let salted = ok(server.post(GENERATE, &generate(100, 8, json!({"cache_salt": "other"}))));
    assert_eq!(first["choices"], salted["choices"]);
    assert_eq!(server.metric("vllm:prefix_cache_hits_total"), 96.0);
}

#[test]
fn completions_return_npy_and_stream_the_rows_last() {
    let server = Server::start("qwen3_moe-b", &["--enable-return-routed-experts"]);
    let body = json!({"prompt": prompt(20), "max_tokens": 6, "temperature": 0, "ignore_eos": true, "routed_experts_prompt_start": 5});
    let reply = ok(server.post("/v1/completions", &body));
    let choice = &reply["choices"][0];
    assert_eq!(choice["routed_experts_start"], 5);
    let payload = choice["routed_experts"].as_str().expect("base64").to_owned();
    let file = STANDARD.decode(&payload).expect("base64");
    assert_eq!(&file[..6], b"\x93NUMPY");
    let header = String::from_utf8_lossy(&file[10..128]).into_owned();
    assert!(header.contains("'shape': (20, 4, 4)"), "{header}");

    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let answer = server.post("/v1/completions", &streamed);
    let chunks: Vec<&str> = answer.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    assert_eq!(chunks.last(), Some(&"[DONE]"));
    let chunks: Vec<Value> = chunks[..chunks.len() - 1].iter().map(|c| serde_json::from_str(c).unwrap()).collect();
    let with_rows: Vec<&Value> =
        chunks.iter().filter(|chunk| chunk["choices"][0]["routed_experts"].is_string()).collect();
    assert_eq!(with_rows.len(), 1);
    assert_eq!(with_rows[0]["choices"][0]["routed_experts"], payload);
    assert_eq!(with_rows[0]["choices"][0]["finish_reason"], "length");
    let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, choice["text"].as_str().expect("text"));
}

#[test]
fn without_capture_rows_are_refused_and_the_rest_works() {
    let server = Server::start("qwen3_moe-a", &["--no-capture"]);
    refused(server.post(GENERATE, &generate(20, 4, json!({}))), "return_routed_experts", "does not capture");
    let reply = ok(server.post(GENERATE, &generate(20, 4, json!({"return_routed_experts": null}))));
    assert_eq!(reply["choices"][0]["token_ids"].as_array().map(Vec::len), Some(4));
}

#[test]
fn limits_and_errors_over_http() {
    let server = Server::start("qwen3_moe-a", &["--max-model-len", "64", "--max-num-seqs", "2", "--api-key", "secret"]);
    let answer = server.post(GENERATE, &generate(20, 4, json!({})));
    assert_eq!(answer.status, 401, "{}", answer.body);
    let server = Server::start("qwen3_moe-a", &["--max-model-len", "64", "--max-num-seqs", "2"]);
    refused(server.post(GENERATE, &generate(60, 5, json!({}))), "sampling_params.max_tokens", "64");
    refused(server.post(GENERATE, &generate(65, 0, json!({}))), "token_ids", "64");
    refused(server.post(GENERATE, &generate(8, 1, json!({"sampling_params": {"n": 3}}))), "sampling_params.n", "3");
    refused(server.post(GENERATE, &generate(0, 1, json!({}))), "token_ids", "");
    let mut beyond = generate(4, 1, json!({}));
    beyond["token_ids"][2] = json!(100_000);
    refused(server.post(GENERATE, &beyond), "token_ids", "100000");
    assert_eq!(server.post_text(GENERATE, "{\"token_ids\": [1").status, 400);
    assert_eq!(server.get("/nowhere").status, 404);
    assert_eq!(server.get("/nowhere").json()["error"]["code"], 404);
    let other = json!({"model": "other", "prompt": "x"});
    assert_eq!(server.post("/v1/completions", &other).status, 404);
    // Filling up to the limit is what an absent max_tokens means here.
    let mut open = generate(20, 1, json!({}));
    open["sampling_params"] = json!({"temperature": 0, "ignore_eos": true});
    let reply = ok(server.post(GENERATE, &open));
    assert_eq!(reply["usage"]["completion_tokens"], 44);
}

#[test]
fn a_client_that_hangs_up_frees_its_blocks() {
    let server = Server::start("qwen3_moe-a", &[]);
    let mut body = generate(20, 480, json!({"stream": true}));
    body["sampling_params"]["n"] = json!(4);
    for _ in 0..3 {
        server.post_and_hang_up(GENERATE, &body);
    }
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while server.metric("vllm:num_requests_running") > 0.0 || server.metric("vllm:kv_cache_usage_perc") > 0.0 {
        assert!(std::time::Instant::now() < deadline, "blocks are still referenced");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn sigterm_lets_running_requests_finish() {
    let mut server = Server::start("qwen3_moe-a", &[]);
    std::thread::scope(|scope| {
        let running = scope.spawn(|| server.post(GENERATE, &generate(20, 450, json!({}))));
        while server.metric("vllm:num_requests_running") < 1.0 && !running.is_finished() {}
        server.signal("-TERM");
        let reply = ok(running.join().expect("the request was answered"));
        assert_eq!(reply["choices"][0]["token_ids"].as_array().map(Vec::len), Some(450));
    });
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn start_up_refuses_what_cannot_work() {
    let run = |args: &[&str]| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_moetrail")).arg("serve").args(args).output();
        let output = output.expect("the binary runs");
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let golden = crate::support::golden_folder("qwen3_moe-a");
    let golden = golden.to_str().expect("a UTF-8 path");
    assert!(run(&["/nonexistent/model", "--port", "0"]).contains("/nonexistent/model"));
    let text = run(&[golden, "--port", "0", "--no-capture", "--enable-return-routed-experts"]);
    assert!(text.contains("--enable-return-routed-experts needs capture"), "{text}");
    let text = run(&[golden, "--port", "0", "--max-model-len", "100000"]);
    assert!(text.contains("--max-model-len is 100000"), "{text}");
    let text = run(&[golden, "--port", "0", "--routed-experts-format", "carrier-pigeon"]);
    assert!(text.contains("carrier-pigeon"), "{text}");
}
