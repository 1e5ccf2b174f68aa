//! Every path by which rows come gives the same bytes.

use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::process::Server;

const GENERATE: &str = "/inference/v1/generate";
const PROMPT: usize = 53;
const COMPLETION: usize = 30;

/// What the model was given and said, and the object form of its rows.
struct Run {
    tokens: Vec<u64>,
    rows: Value,
}

fn body(prompt: &[u64], max_tokens: usize, start: usize) -> Value {
    json!({
        "token_ids": prompt,
        "routed_experts_prompt_start": start,
        "sampling_params": {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": true},
    })
}

fn ids(value: &Value) -> Vec<u64> {
    value.as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id")).collect()
}

fn post(server: &Server, body: &Value) -> Value {
    let answer = server.post(GENERATE, body);
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()
}

fn run(server: &Server, prompt: &[u64], max_tokens: usize, start: usize) -> Run {
    let mut reply = post(server, &body(prompt, max_tokens, start));
    let choice = reply["choices"][0].take();
    Run { tokens: [prompt, &ids(&choice["token_ids"])].concat(), rows: choice["routed_experts"].clone() }
}

/// `moetrail routes …`: its standard output as JSON.
fn routes(args: &[&str], input: &Value) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moetrail"));
    let mut child =
        command.arg("routes").args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("runs");
    child.stdin.take().expect("piped").write_all(input.to_string().as_bytes()).expect("it reads");
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success());
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// Rows of consecutive payloads as one, by their own starts.
fn join(parts: &[Value]) -> Value {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("joined.json");
    let merge = |joined: Value, next: &Value| {
        std::fs::write(&file, joined.to_string()).expect("it can be written");
        routes(&["merge", file.to_str().expect("UTF-8"), "-", "--overlap", "strict"], next)
    };
    parts.iter().skip(1).fold(parts[0].clone(), merge)
}

#[test]
fn every_path_gives_the_same_bytes() {
    for model in ["qwen3_moe-b", "mixtral-a"] {
        let server = Server::start(model, &["--block-size", "4"]);
        let prompt: Vec<u64> = (0..PROMPT as u64).map(|i| 3 + (i * 37 + i * i) % 300).collect();
        let full = run(&server, &prompt, COMPLETION, 0);
        assert_eq!(full.rows["shape"][0], PROMPT + COMPLETION - 1);

        // A prefix hit, and prompts computed in chunks.
        let hit = post(&server, &body(&prompt, COMPLETION, 0));
        assert!(hit["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64() > Some(40));
        assert_eq!(hit["choices"][0]["routed_experts"], full.rows);
        let chunked = Server::start(model, &["--max-num-batched-tokens", "7", "--no-enable-prefix-caching"]);
        assert_eq!(run(&chunked, &prompt, COMPLETION, 0).rows, full.rows);

        // Preempted, swapped, and replayed after a preemption: the same request eight times on a pool for two or three.
        for mode in [&[][..], &["--swap-space", "1"], &["--reprefill-routing", "replay"]] {
            let tiny = ["--num-gpu-blocks-override", "50", "--block-size", "4", "--no-enable-prefix-caching"];
            let server = Server::start(model, &[&tiny[..], mode].concat());
            std::thread::scope(|scope| {
                let all: Vec<_> = (0..8).map(|_| scope.spawn(|| run(&server, &prompt, COMPLETION, 0).rows)).collect();
                all.into_iter().for_each(|rows| assert_eq!(rows.join().expect("answered"), full.rows, "{mode:?}"));
            });
            assert!(server.metric("vllm:num_preemptions_total") > 0.0);
        }

        // Streamed in deltas.
        let mut streamed = body(&prompt, COMPLETION, 0);
        streamed["stream"] = json!(true);
        streamed["routed_experts_stream"] = json!("delta");
        let answer = server.post(GENERATE, &streamed);
        let chunks = answer.body.lines().filter_map(|line| line.strip_prefix("data: {"));
        let chunks = chunks.map(|rest| serde_json::from_str::<Value>(&format!("{{{rest}")).expect("JSON"));
        let (mut deltas, mut said) = (Vec::new(), 0);
        for chunk in chunks {
            let choice = &chunk["choices"][0];
            said += choice["token_ids"].as_array().map_or(0, Vec::len);
            if let Some(start) = choice["routed_experts"]["start"].as_u64() {
                let rows = choice["routed_experts"]["shape"][0].as_u64().expect("rows");
                assert!(start + rows <= (PROMPT + said - 1) as u64, "rows run ahead of the tokens");
                deltas.push(choice["routed_experts"].clone());
            }
        }
        assert_eq!((said, deltas.len()), (COMPLETION, COMPLETION));
        assert_eq!(join(&deltas), full.rows);

        // Turn by turn, each from the boundary row on.
        let mut turns = Vec::new();
        let (mut tokens, mut parts) = (prompt.clone(), Vec::new());
        for (turn, length) in [(0, 10), (1, 12), (2, 8)] {
            let start = if turn == 0 { 0 } else { tokens.len() - 1 };
            let next = run(&server, &tokens, length, start);
            turns.push(json!({
                "prompt_ids": tokens, "completion_ids": next.tokens[tokens.len()..], "routed_experts": next.rows,
            }));
            parts.push(next.rows);
            tokens = next.tokens;
        }
        assert_eq!(tokens, full.tokens);
        assert_eq!(join(&parts), full.rows);
        let stitched = routes(&["stitch", "-"], &json!({ "turns": turns }));
        assert_eq!(stitched, json!({"branches": [{"token_ids": full.tokens, "routed_experts": full.rows}]}));

        // A prefill that samples one token, and a decode that returns what follows, with and without an overlap.
        let prefill = run(&server, &prompt, 1, 0).rows;
        for start in [0, PROMPT - 1, PROMPT] {
            let decode = run(&server, &prompt, COMPLETION, start).rows;
            assert_eq!(join(&[prefill.clone(), decode]), full.rows, "decode from {start}");
        }

        // Replayed: given back as they were given.
        let mut replay = body(&full.tokens[..full.tokens.len() - 1], 0, 0);
        replay["routed_experts_replay"] = full.rows.clone();
        let replayed = post(&server, &replay);
        assert_eq!(replayed["choices"][0]["routed_experts"], full.rows);
        assert_eq!(replayed["routed_experts_replay_stats"]["cells_changed"], 0);
    }
}
