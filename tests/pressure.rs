//! Many requests on a pool that is far too small: the bundled model, over HTTP.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use moetrail_routes::ExpertRows;
use moetrail_routes::format::Import;
use serde_json::{Value, json};

use crate::process::Server;

const GENERATE: &str = "/inference/v1/generate";
const REQUESTS: usize = 64;

/// Numbers that look random and are the same in every run.
fn draw(seed: usize, below: usize) -> usize {
    let mut x = seed as u64 ^ 0x9E37_79B9_7F4A_7C15;
    for _ in 0..3 {
        x = (x ^ x >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    }
    (x >> 33) as usize % below
}

/// A request of its own kind: prompts share prefixes, some are sampled, some have two choices, starts are drawn.
fn request(index: usize) -> Value {
    let prompt_len = 6 + draw(index, 60);
    let family = draw(index + 1000, 4);
    let prompt: Vec<usize> = (0..prompt_len).map(|i| 3 + (i * i * 7 + i * 13 + family * 101) % 1500).collect();
    let start = draw(index + 2000, prompt_len + 1);
    json!({
        "token_ids": prompt,
        "sampling_params": {
            "max_tokens": 100 + draw(index + 3000, 150),
            "temperature": if index.is_multiple_of(2) { 0.0 } else { 1.0 },
            "seed": index,
            "n": if index.is_multiple_of(8) { 2 } else { 1 },
            "ignore_eos": true,
            "logprobs": 1,
        },
        "routed_experts_prompt_start": start,
    })
}

fn choices(server: &Server, index: usize) -> Value {
    let answer = server.post(GENERATE, &request(index));
    assert_eq!(answer.status, 200, "{}", answer.body);
    let choices = answer.json()["choices"].take();
    for choice in choices.as_array().expect("choices") {
        assert!(choice["routed_experts"]["data"].is_string(), "request {index} lost its rows: {choice}");
    }
    choices
}

/// All requests at once, with clients in between that hang up.
fn all_at_once(server: &Server) -> Vec<Value> {
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..REQUESTS).map(|index| scope.spawn(move || choices(server, index))).collect();
        for index in 0..REQUESTS / 4 {
            scope.spawn(move || {
                let mut body = request(index);
                body["stream"] = json!(true);
                server.post_and_hang_up(GENERATE, &body);
            });
        }
        running.into_iter().map(|handle| handle.join().expect("the request was answered")).collect()
    })
}

#[test]
fn rows_are_the_same_under_preemption_swap_and_replay_as_alone() {
    let alone = Server::bundled(&["--no-enable-prefix-caching"]);
    let expect: Vec<Value> = (0..REQUESTS).map(|index| choices(&alone, index)).collect();
    drop(alone);
    for mode in [
        &["--reprefill-routing", "recompute"][..],
        &["--reprefill-routing", "replay"],
        &["--swap-space", "1"],
        // Room for a few blocks only: some sequences are swapped, others are computed again.
        &["--swap-space", "0.0003"],
    ] {
        let tiny = [
            "--num-gpu-blocks-override",
            "100",
            "--block-size",
            "8",
            "--max-num-batched-tokens",
            "128",
            "--verify-reprefill",
        ];
        let server = Server::bundled(&[&tiny[..], mode].concat());
        let found = all_at_once(&server);
        for (index, (found, expect)) in found.iter().zip(&expect).enumerate() {
            assert!(found == expect, "{mode:?}: request {index} differs");
        }
        let preemptions = server.metric("vllm:num_preemptions_total");
        let moved = server.metric("moetrail_routed_experts_moved_bytes_total");
        println!("{mode:?}: {preemptions} preemptions, {moved} bytes of rows moved");
        assert!(preemptions >= 150.0, "{mode:?}: {preemptions} preemptions");
        assert_eq!(moved > 0.0, mode != ["--reprefill-routing", "recompute"]);
        let again = server.metric("moetrail_routed_experts_rows_deduplicated_total");
        assert_eq!(server.metric("moetrail_routed_experts_reprefill_rows_compared_total"), again);
        assert_eq!(server.metric("moetrail_routed_experts_reprefill_rows_differing_total"), 0.0);
        assert_eq!(server.metric("moetrail_routed_experts_generation_mismatch_total"), 0.0);
        wait_for_free_blocks(&server);
    }
}

fn wait_for_free_blocks(server: &Server) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while server.metric("vllm:kv_cache_usage_perc") > 0.0 {
        assert!(Instant::now() < deadline, "blocks are still referenced");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn rows(choice: &Value) -> ExpertRows {
    Import::default().read(choice).expect("the object form").expect("rows")
}

/// A choice says what it says alone, or the beginning of it if it was aborted. Returns whether it was.
fn check_aborted_or_whole(found: &Value, expect: &Value, prompt_len: usize) -> bool {
    let length = found["token_ids"].as_array().expect("ids").len();
    let beginning = |value: &Value| value.as_array().expect("a list")[..length].to_vec();
    assert_eq!(found["token_ids"].as_array(), Some(&beginning(&expect["token_ids"])));
    assert_eq!(found["logprobs"]["content"].as_array(), Some(&beginning(&expect["logprobs"]["content"])));
    let aborted = found["finish_reason"] == "abort";
    if aborted && found["routed_experts"].is_null() {
        assert_eq!(length, 0, "rows are missing: {found}");
        return true;
    }
    let (rows, expect) = (rows(found), rows(expect));
    assert_eq!(rows, expect.slice(rows.span()));
    match aborted {
        false => assert_eq!(rows, expect),
        // After a first token, the whole prompt has been forwarded.
        true if length > 0 => assert_eq!(rows.span().end, (prompt_len + length - 1).max(rows.start())),
        true => assert!(rows.span().end <= prompt_len),
    }
    aborted
}

#[test]
fn rows_are_true_while_an_operator_intervenes() {
    let alone = Server::bundled(&["--no-enable-prefix-caching"]);
    let expect: Vec<Value> = (0..REQUESTS).map(|index| choices(&alone, index)).collect();
    drop(alone);
    let flags = ["--num-gpu-blocks-override", "100", "--block-size", "8", "--swap-space", "0.0003"];
    let server = Server::bundled(&flags);
    let bundled = concat!(env!("CARGO_MANIFEST_DIR"), "/models/bundled");
    let done = AtomicUsize::new(0);
    let (mut aborted, mut recomputed) = (0, 0);
    std::thread::scope(|scope| {
        let (server, done) = (&server, &done);
        let running: Vec<_> = (0..REQUESTS)
            .map(|index| {
                scope.spawn(move || {
                    let mut body = request(index);
                    body["request_id"] = json!(format!("request {index}"));
                    let answer = server.post(GENERATE, &body);
                    done.fetch_add(1, Ordering::Relaxed);
                    assert_eq!(answer.status, 200, "{}", answer.body);
                    answer.json()["choices"].take()
                })
            })
            .collect();
        let order = |path: &str, body: Value| assert_eq!(server.post(path, &body).status, 200, "{path}");
        for round in 0.. {
            if done.load(Ordering::Relaxed) == REQUESTS {
                break;
            }
            order(&format!("/pause?mode=keep&clear_cache={}", round % 2 == 0), json!({}));
            order("/inference/v1/abort_requests", json!({"request_ids": [format!("request {}", round % REQUESTS)]}));
            order("/resume", json!({}));
            order("/reset_prefix_cache", json!({}));
            // The same weights under another name: what is said stays comparable.
            order("/update_weights", json!({"path": bundled, "weight_version": format!("round {round}")}));
            std::thread::sleep(Duration::from_millis(50));
        }
        for (index, handle) in running.into_iter().enumerate() {
            let choices = handle.join().expect("the request was answered");
            let (choices, expect) = (choices.as_array().expect("choices"), expect[index].as_array().expect("choices"));
            assert_eq!(choices.len(), expect.len());
            let prompt_len = request(index)["token_ids"].as_array().expect("ids").len();
            for (found, expect) in choices.iter().zip(expect) {
                aborted += usize::from(check_aborted_or_whole(found, expect, prompt_len));
                recomputed += usize::from(found["routed_experts_recomputed"] == true);
            }
        }
    });
    println!("{aborted} choices aborted, {recomputed} computed again");
    assert!(aborted > 0 && recomputed >= 10, "{aborted} aborted, {recomputed} computed again");
    wait_for_free_blocks(&server);
}
