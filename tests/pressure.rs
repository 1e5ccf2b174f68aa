//! Many requests on a pool that is far too small: the bundled model, over HTTP.

use std::time::{Duration, Instant};

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
        let deadline = Instant::now() + Duration::from_secs(20);
        while server.metric("vllm:kv_cache_usage_perc") > 0.0 {
            assert!(Instant::now() < deadline, "blocks are still referenced");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
