//! What answers look like, endpoint by endpoint.

use moetrail_engine::{
    ChoiceDelta, Event, Finish, FinishReason, PromptOutput, ReplayStats, RequestError, RowsError, StopReason,
    TokenLogprobs,
};
use moetrail_routes::format::Import;
use moetrail_routes::{ExpertDtype, ExpertRows, RowLayout, TokenSpan};
use serde_json::{Value, json};

use crate::accept::{Dialect, Reply, RequestContext, accept};
use crate::fixtures;
use crate::output::RequestOutput;
use crate::sampling::DefaultSampling;
use Dialect::{Chat, Completions, Generate, Sglang};

fn reply(dialect: Dialect, body: &str) -> Box<dyn Reply> {
    let (info, defaults) = (fixtures::info(), DefaultSampling::default());
    let context = RequestContext {
        info: &info,
        defaults: &defaults,
        rows_format: None,
        header_id: None,
        weight_version: "3",
        unique: "u",
        created: 7,
    };
    accept(dialect, body.as_bytes(), &context).unwrap_or_else(|error| panic!("{body}: {error}")).reply
}

fn rows(start: usize, count: usize) -> Option<Result<ExpertRows, RowsError>> {
    let layout = RowLayout { num_layers: 1, top_k: 2, dtype: ExpertDtype::U8 };
    Some(Ok(ExpertRows::new(start, layout, (0..2 * count).map(|id| id as u8).collect()).expect("whole rows")))
}

fn logprob(token_id: u32, logprob: f32) -> TokenLogprobs {
    TokenLogprobs { token_id, logprob, rank: 1, top: vec![(token_id, logprob)] }
}

/// One choice that says "a b" and stops.
fn events(index: usize, rows: Option<Result<ExpertRows, RowsError>>) -> Vec<Event> {
    let delta = |token_id: u32, text: &str, finish| {
        let (text, logprobs) = (text.to_owned(), vec![logprob(token_id, -0.5)]);
        Event::Choice(ChoiceDelta { index, token_ids: vec![token_id], text, logprobs, routed_experts: None, finish })
    };
    let stop_reason = Some(StopReason::Text("x".into()));
    let finish = Finish { reason: FinishReason::Stop, stop_reason, routed_experts: rows, recomputed: None };
    vec![delta(1, "a", None), delta(2, " b", Some(finish))]
}

fn prompt(cached_tokens: usize) -> Event {
    let prompt_logprobs = Some(vec![None, Some(logprob(2, -0.25))]);
    Event::Prompt(PromptOutput { cached_tokens, prompt_logprobs, replay_stats: None })
}

fn output(n: usize, all: Vec<Event>) -> RequestOutput {
    let mut output = RequestOutput::new(n);
    for event in all {
        output.push(event).expect("no failure");
    }
    assert!(output.is_finished());
    output
}

fn body(dialect: Dialect, request: &str, outputs: Vec<RequestOutput>) -> (String, Value) {
    let text = String::from_utf8(reply(dialect, request).body(outputs)).expect("UTF-8");
    let value = serde_json::from_str(&text).expect("JSON");
    (text, value)
}

fn chunks(dialect: Dialect, request: &str, all: Vec<(usize, Event)>) -> Vec<Value> {
    let mut reply = reply(dialect, request);
    let mut bytes: Vec<Vec<u8>> = all.into_iter().flat_map(|(prompt, event)| reply.chunks(prompt, event)).collect();
    bytes.extend(reply.closing_chunks());
    bytes.iter().map(|chunk| serde_json::from_slice(chunk).expect("JSON")).collect()
}

const USAGE: &str =
    r#"{"prompt_tokens":2,"total_tokens":4,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":1}}"#;

#[test]
fn generate_answers_with_tokens_and_the_object() {
    let request = r#"{"token_ids":[1,2],"routed_experts_prompt_start":1,"return_token_ids":true,
        "kv_transfer_params":{"x":"\"routed_experts\":{\"data\":\"no\"}"},"sampling_params":{"logprobs":1,"prompt_logprobs":0}}"#;
    let (text, value) = body(Generate, request, vec![output(1, [vec![prompt(1)], events(0, rows(1, 2))].concat())]);
    assert!(
        text.starts_with(r#"{"request_id":"generate-tokens-u","output_mode":"tokens","model":"toy","created":7,"#),
        "{text}"
    );
    assert!(
        text.contains(r#","routed_experts":{"data":"AAECAw==","shape":[2,1,2],"start":1,"dtype":"uint8"}}]"#),
        "{text}"
    );
    assert!(text.contains(&format!("\"usage\":{USAGE}")), "{text}");
    let choice = &value["choices"][0];
    assert_eq!(choice["token_ids"], json!([1, 2]));
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &json!("x")));
    assert_eq!(choice["logprobs"]["content"][1]["token"], "token_id:2");
    assert_eq!(choice["logprobs"]["content"].as_array().map(Vec::len), Some(2));
    assert!(choice.get("text").is_none());
    assert_eq!(value["prompt_logprobs"], json!([null, {"2": {"logprob": -0.25, "rank": 1, "decoded_token": "b"}}]));
    assert_eq!(value["prompt_token_ids"], json!([1, 2]));
    assert!(value["kv_transfer_params"]["x"].is_string());
}

#[test]
fn rows_that_were_not_asked_for_are_null() {
    let (_, value) = body(Generate, r#"{"token_ids":[1,2]}"#, vec![output(1, events(0, None))]);
    assert_eq!(value["choices"][0]["routed_experts"], Value::Null);
    assert!(value["choices"][0].as_object().is_some_and(|choice| choice.contains_key("routed_experts")));
    assert_eq!(value["choices"][0]["logprobs"], Value::Null);
    assert!(value.get("prompt_token_ids").is_none());
}

#[test]
fn a_lost_first_choice_takes_the_others_rows_with_it() {
    let lost = Some(Err(RowsError { code: "generation_mismatch", message: "block 3 has a new owner".into() }));
    let all = [events(0, lost), events(1, rows(0, 3))].concat();
    let request = r#"{"token_ids":[1,2],"return_routed_experts":true,"sampling_params":{"n":2}}"#;
    let (text, value) = body(Generate, request, vec![output(2, all)]);
    assert!(!text.contains("\"data\""), "{text}");
    assert_eq!(value["choices"][0]["routed_experts_error"]["code"], "generation_mismatch");
    assert_eq!(value["choices"][1]["routed_experts"], Value::Null);
    assert_eq!(value["choices"][1]["token_ids"], json!([1, 2]));
}

#[test]
fn completions_number_their_choices_prompt_by_prompt() {
    let request = r#"{"prompt":["a b","b b"],"n":2,"return_routed_experts":true,"return_token_ids":true}"#;
    let both = || [vec![prompt(1)], events(0, rows(0, 3)), events(1, rows(0, 3))].concat();
    let (_, value) = body(Completions, request, vec![output(2, both()), output(2, both())]);
    assert_eq!(value["object"], "text_completion");
    assert_eq!(value["usage"]["completion_tokens"], 8);
    assert_eq!(value["usage"]["prompt_tokens_details"]["cached_tokens"], 2);
    let choices = value["choices"].as_array().expect("a list");
    assert_eq!(choices.iter().map(|choice| choice["index"].as_u64()).collect::<Vec<_>>(), [0, 1, 2, 3].map(Some));
    assert_eq!((&choices[3]["text"], &choices[3]["prompt_token_ids"]), (&json!("a b"), &json!([2, 2])));
    assert!(choices[0]["routed_experts"].as_str().is_some_and(|npy| npy.starts_with("k05VTVBZ")));
    assert_eq!(choices[0]["routed_experts_start"], 0);
    assert!(choices[0].get("prompt_logprobs").is_none());
}

#[test]
fn an_echo_brings_text_and_logprobs_of_the_prompt() {
    let request = r#"{"prompt":"a b","echo":true,"logprobs":1}"#;
    let (_, value) = body(Completions, request, vec![output(1, [vec![prompt(0)], events(0, None)].concat())]);
    let choice = &value["choices"][0];
    assert_eq!(choice["text"], "a ba b");
    assert_eq!(choice["logprobs"]["tokens"], json!(["a", "b", "a", "b"]));
    assert_eq!(choice["logprobs"]["token_logprobs"], json!([null, -0.25, -0.5, -0.5]));
    assert_eq!(choice["logprobs"]["top_logprobs"], json!([null, {"b": -0.25}, {"a": -0.5}, {"b": -0.5}]));
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 1, 2, 3]));
}

#[test]
fn chat_answers_with_a_message() {
    let request =
        r#"{"messages":[{"role":"user","content":"a"}],"logprobs":true,"top_logprobs":1,"return_token_ids":true}"#;
    let (_, value) = body(Chat, request, vec![output(1, [vec![prompt(1)], events(0, None)].concat())]);
    assert_eq!((&value["id"], &value["object"]), (&json!("chatcmpl-u"), &json!("chat.completion")));
    let choice = &value["choices"][0];
    assert_eq!(choice["message"], json!({"role": "assistant", "content": "a b"}));
    assert_eq!(choice["logprobs"]["content"][0]["bytes"], json!([97]));
    assert_eq!(choice["logprobs"]["content"][0]["top_logprobs"][0]["token"], "a");
    assert_eq!((&choice["token_ids"], &value["prompt_token_ids"]), (&json!([1, 2]), &json!([4, 1, 5])));
}

#[test]
fn streamed_completions_send_rows_on_the_finishing_chunk() {
    let request = r#"{"prompt":"a b","stream":true,"stream_options":{"include_usage":true,"continuous_usage_stats":true},
        "routed_experts_prompt_start":1,"routed_experts_format":"object","echo":true,"logprobs":0,"return_token_ids":true}"#;
    let all = [vec![prompt(1)], events(0, rows(1, 2))].concat();
    let chunks = chunks(Completions, request, all.into_iter().map(|event| (0, event)).collect());
    assert_eq!(chunks.len(), 3);
    let (first, last) = (&chunks[0]["choices"][0], &chunks[1]["choices"][0]);
    assert_eq!((&first["text"], &first["prompt_token_ids"]), (&json!("a ba"), &json!([1, 2])));
    assert_eq!(first["finish_reason"], Value::Null);
    assert!(first.get("routed_experts").is_none());
    assert_eq!(chunks[0]["usage"]["completion_tokens"], 1);
    assert_eq!(
        (&last["text"], &last["finish_reason"], &last["stop_reason"]),
        (&json!(" b"), &json!("stop"), &json!("x"))
    );
    assert_eq!(last["routed_experts"], json!({"data": "AAECAw==", "shape": [2, 1, 2], "start": 1, "dtype": "uint8"}));
    assert_eq!((&last["logprobs"]["text_offset"], &last["token_ids"]), (&json!([3]), &json!([2])));
    assert!(last.get("prompt_token_ids").is_none());
    let usage: Value = serde_json::from_str(USAGE).expect("JSON");
    assert_eq!((&chunks[2]["choices"], &chunks[2]["usage"]), (&json!([]), &usage));
}

#[test]
fn streamed_prompts_keep_their_numbers() {
    let request = r#"{"prompt":["a","b"],"stream":true}"#;
    let all = events(0, None).into_iter().flat_map(|event| [(0, event.clone()), (1, event)]).collect();
    let indices: Vec<_> = chunks(Completions, request, all).iter().map(|c| c["choices"][0]["index"].as_u64()).collect();
    assert_eq!(indices, [0, 1, 0, 1].map(Some));
}

#[test]
fn streamed_chat_begins_with_the_role_of_each_choice() {
    let request = r#"{"messages":[{"role":"user","content":"a"}],"stream":true,"n":2,"return_token_ids":true,
        "prompt_logprobs":0,"return_routed_experts":true}"#;
    let all = [vec![prompt(0)], events(1, rows(0, 4)), events(0, rows(0, 4))].concat();
    let chunks = chunks(Chat, request, all.into_iter().map(|event| (0, event)).collect());
    let seen: Vec<_> =
        chunks.iter().map(|c| (c["choices"][0]["index"].clone(), c["choices"][0]["delta"].clone())).collect();
    let (role, a, b) = (json!({"role": "assistant", "content": ""}), json!({"content": "a"}), json!({"content": " b"}));
    let expect =
        [(1, &role), (1, &a), (1, &b), (0, &role), (0, &a), (0, &b)].map(|(i, delta)| (json!(i), delta.clone()));
    assert_eq!(seen, expect);
    assert_eq!(chunks[0]["object"], "chat.completion.chunk");
    assert_eq!(chunks[0]["prompt_token_ids"], json!([4, 1, 5]));
    assert!(chunks[0]["prompt_logprobs"].is_array());
    assert!(chunks[1].get("prompt_token_ids").is_none() && chunks[1].get("prompt_logprobs").is_none());
    assert!(chunks[1].get("usage").is_none());
    assert_eq!(chunks[2]["choices"][0]["routed_experts_start"], 0);
}

#[test]
fn streamed_tokens_come_with_their_logprobs() {
    let request = r#"{"token_ids":[1,2],"stream":true,"return_token_ids":true,"output_mode":"text","routed_experts_prompt_start":2,
        "sampling_params":{"logprobs":0}}"#;
    let all = [vec![prompt(0)], events(0, rows(2, 1))].concat();
    let chunks = chunks(Generate, request, all.into_iter().map(|event| (0, event)).collect());
    assert_eq!(chunks.len(), 2);
    assert_eq!((&chunks[0]["choices"][0]["text"], &chunks[0]["prompt_token_ids"]), (&json!("a"), &json!([1, 2])));
    assert_eq!(chunks[1]["choices"][0]["logprobs"]["content"][0]["logprob"], json!(-0.5));
    assert_eq!(chunks[1]["choices"][0]["routed_experts"]["start"], 2);
    assert!(chunks[1].get("prompt_token_ids").is_none());
}

#[test]
fn a_failure_is_told_by_the_output() {
    let mut output = RequestOutput::new(1);
    let failed = Event::Failed(RequestError::NotANumber { place: "logits", position: 4 });
    let error = output.push(failed).expect_err("a failure");
    assert_eq!((error.status, error.kind()), (500, "InternalServerError"));
    assert!(error.message.contains("position 4"), "{error}");
}

/// Where a reply or a chunk has its payload.
fn payload(value: &Value) -> Option<&Value> {
    let places = [
        &value["choices"][0]["routed_experts"],
        &value["choices"][0]["message"]["routed_experts"],
        &value["choices"][0]["delta"]["routed_experts"],
        &value["nvext"]["routed_experts"],
        &value["meta_info"]["routed_experts"],
    ];
    places.into_iter().find(|place| !place.is_null())
}

fn start_beside(value: &Value) -> Option<usize> {
    let start = value["choices"][0]["routed_experts_start"].as_u64();
    start.or(value["meta_info"]["routed_experts_start_len"].as_u64()).map(|start| start as usize)
}

/// Every form, in a body, at the end of a stream and in the deltas of one, is read back as the rows that were sent.
#[test]
fn every_form_comes_back_from_every_endpoint() {
    let requests = [
        (Completions, r#""prompt":[1,2]"#),
        (Chat, r#""messages":[{"role":"user","content":"a"}]"#),
        (Generate, r#""token_ids":[1,2]"#),
        (Sglang, r#""input_ids":[1,2]"#),
    ];
    for (dialect, prompt) in requests {
        for format in ["object", "npy", "sglang", "dynamo", "list", "nemo", "skyrl"] {
            if (dialect, format) == (Sglang, "dynamo") {
                // This endpoint has one place for rows.
                continue;
            }
            let request = |more: &str| {
                format!(r#"{{{prompt},"return_routed_experts":true,"routed_experts_format":"{format}"{more}}}"#)
            };
            let read = |value: &Value, count: usize| {
                let hints = Import {
                    start: start_beside(value),
                    shape: Some([count, 1, 2]),
                    bare_skyrl: true,
                    ..Import::default()
                };
                let found = payload(value).unwrap_or_else(|| panic!("{dialect:?} {format}: {value}"));
                hints.read(found).expect("it is read").expect("rows")
            };
            let whole = rows(0, 3).expect("rows").expect("not lost");
            let (_, value) = body(dialect, &request(""), vec![output(1, events(0, rows(0, 3)))]);
            assert_eq!(read(&value, 3), whole, "{dialect:?} {format}");
            let all: Vec<(usize, Event)> = events(0, rows(0, 3)).into_iter().map(|event| (0, event)).collect();
            let streamed = chunks(dialect, &request(r#","stream":true"#), all);
            let with_rows: Vec<&Value> = streamed.iter().filter(|chunk| payload(chunk).is_some()).collect();
            assert_eq!(with_rows.len(), 1);
            assert_eq!(read(with_rows[0], 3), whole, "{dialect:?} {format} streamed");
            if matches!(format, "nemo" | "skyrl") {
                continue;
            }
            let mut deltas = events(0, Some(Ok(whole.slice(TokenSpan::new(2, 3)))));
            if let Event::Choice(first) = &mut deltas[0] {
                first.routed_experts = Some(whole.slice(TokenSpan::new(0, 2)));
            }
            let deltas = deltas.into_iter().map(|event| (0, event)).collect();
            let streamed = chunks(dialect, &request(r#","stream":true,"routed_experts_stream":"delta""#), deltas);
            let with_rows: Vec<&Value> = streamed.iter().filter(|chunk| payload(chunk).is_some()).collect();
            assert_eq!(with_rows.len(), 2);
            let parts = [read(with_rows[0], 2), read(with_rows[1], 1)];
            assert_eq!((parts[0].start(), parts[1].start()), (0, 2), "{dialect:?} {format} in deltas");
            assert_eq!([parts[0].data(), parts[1].data()].concat(), whole.data());
        }
    }
}

#[test]
fn sglang_s_answer_has_its_meta_info() {
    let request = r#"{"input_ids":[1,2],"rid":"r","return_logprob":true,"top_logprobs_num":1,"logprob_start_len":1,
        "return_text_in_logprobs":true,"routed_experts_start_len":1}"#;
    let (_, value) = body(Sglang, request, vec![output(1, [vec![prompt(1)], events(0, rows(1, 2))].concat())]);
    assert_eq!((&value["text"], &value["output_ids"]), (&json!("a b"), &json!([1, 2])));
    let meta = &value["meta_info"];
    assert_eq!((&meta["id"], &meta["weight_version"]), (&json!("r"), &json!("3")));
    assert_eq!(meta["finish_reason"], json!({"type": "stop", "matched": "x"}));
    assert_eq!(meta["routed_experts_start_len"], 1);
    assert_eq!(meta["routed_experts"], "AAAAAAEAAAACAAAAAwAAAA==");
    assert_eq!((&meta["prompt_tokens"], &meta["completion_tokens"]), (&json!(2), &json!(2)));
    assert_eq!(meta["output_token_logprobs"], json!([[-0.5, 1, "a"], [-0.5, 2, "b"]]));
    assert_eq!(meta["output_top_logprobs"], json!([[[-0.5, 1, "a"]], [[-0.5, 2, "b"]]]));
    assert_eq!(meta["input_token_logprobs"], json!([[-0.25, 2, "b"]]));
    // Streams repeat what was said, and several prompts give a list.
    let all = events(0, None).into_iter().map(|event| (0, event)).collect();
    let texts: Vec<Value> =
        chunks(Sglang, r#"{"input_ids":[1,2],"stream":true}"#, all).iter().map(|chunk| chunk["text"].clone()).collect();
    assert_eq!(texts, ["a", "a b"]);
    let two = vec![output(1, events(0, None)), output(1, events(0, None))];
    let (_, value) = body(Sglang, r#"{"input_ids":[[1,2],[1]]}"#, two);
    assert_eq!((value[1]["index"].as_u64(), &value[1]["output_ids"]), (Some(1), &json!([1, 2])));
}

#[test]
fn replay_is_summed_up_for_the_whole_answer() {
    let stats = ReplayStats { rows: 1, cells: 2, cells_changed: 1 };
    let replayed = Event::Prompt(PromptOutput { replay_stats: Some(stats), ..PromptOutput::default() });
    let one = || output(1, [vec![replayed.clone()], events(0, None)].concat());
    let (_, value) = body(Generate, r#"{"token_ids":[1,2]}"#, vec![one()]);
    assert_eq!(value["routed_experts_replay_stats"], json!({"rows": 1, "cells": 2, "cells_changed": 1}));
    let (_, value) = body(Completions, r#"{"prompt":["a","b"]}"#, vec![one(), one()]);
    assert_eq!(value["routed_experts_replay_stats"], json!({"rows": 2, "cells": 4, "cells_changed": 2}));
    let all = [vec![replayed.clone()], events(0, None)].concat().into_iter().map(|event| (0, event)).collect();
    let streamed = chunks(Generate, r#"{"token_ids":[1,2],"stream":true}"#, all);
    assert_eq!(streamed[0]["routed_experts_replay_stats"]["cells"], 2);
    assert!(streamed[1].get("routed_experts_replay_stats").is_none());
}
