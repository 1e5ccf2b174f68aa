//! What requests mean and why they are refused, endpoint by endpoint.

use moetrail_engine::{EngineInfo, GenerateRequest};

use crate::accept::{Accepted, Dialect, RequestContext, accept};
use crate::error::ApiError;
use crate::fixtures;
use crate::rows::RowsFormat;
use crate::sampling::DefaultSampling;
use Dialect::{Chat, Completions, Generate, Sglang};

fn read_with(
    dialect: Dialect,
    body: &str,
    info: &EngineInfo,
    defaults: &DefaultSampling,
) -> Result<Accepted, ApiError> {
    let context = RequestContext {
        info,
        defaults,
        rows_format: None,
        header_id: None,
        weight_version: "0",
        unique: "u1",
        created: 7,
    };
    accept(dialect, body.as_bytes(), &context)
}

fn read(dialect: Dialect, body: &str) -> Result<Accepted, ApiError> {
    read_with(dialect, body, &fixtures::info(), &DefaultSampling::default())
}

#[track_caller]
fn one(dialect: Dialect, body: &str) -> GenerateRequest {
    let mut accepted = read(dialect, body).unwrap_or_else(|error| panic!("{body}: {error}"));
    assert_eq!(accepted.requests.len(), 1);
    accepted.requests.remove(0)
}

#[track_caller]
fn refused_by(info: &EngineInfo, dialect: Dialect, body: &str, param: Option<&str>, part: &str) {
    match read_with(dialect, body, info, &DefaultSampling::default()) {
        Ok(_) => panic!("{body} is accepted"),
        Err(error) => {
            assert_eq!((error.status, error.param.as_deref()), (400, param), "{body}: {error}");
            assert!(error.message.contains(part), "{body}: {error}");
        }
    }
}

#[track_caller]
fn refused(dialect: Dialect, body: &str, param: &str, part: &str) {
    refused_by(&fixtures::info(), dialect, body, Some(param), part);
}

#[test]
fn a_bare_completion_has_openai_s_defaults() {
    let request = one(Completions, r#"{"prompt":"a b"}"#);
    assert_eq!(&*request.prompt, [1, 2]);
    assert_eq!((request.sampling.max_tokens, request.sampling.n, request.sampling.logprobs), (16, 1, None));
    assert_eq!((request.routed_experts_start, request.priority, request.cache_salt), (None, 0, None));
    assert_eq!(request.names, ["cmpl-u1"]);
}

#[test]
fn max_tokens_is_filled_where_it_is_absent() {
    // The default of completions gives way to the model's length, a length that is named does not.
    let long = format!(r#"{{"prompt":[{}1]}}"#, "1,".repeat(59));
    assert_eq!(one(Completions, &long).sampling.max_tokens, 4);
    let chat = r#"{"messages":[{"role":"user","content":"a"}]}"#;
    assert_eq!(one(Chat, chat).sampling.max_tokens, 61);
    assert_eq!(one(Generate, r#"{"token_ids":[1,2]}"#).sampling.max_tokens, 62);
    let small_pool = EngineInfo { num_blocks: 4, ..fixtures::info() };
    let accepted = read_with(Generate, r#"{"token_ids":[1,2]}"#, &small_pool, &DefaultSampling::default());
    let max_tokens = accepted.map(|accepted| accepted.requests[0].sampling.max_tokens);
    assert_eq!(max_tokens, Ok(15), "16 slots hold 2 prompt tokens and all but the last of 15");
    for body in [r#"{"prompt":"a","max_tokens":0}"#, r#"{"prompt":"a","max_tokens":null}"#] {
        assert!(read(Completions, body).is_ok());
    }
    assert_eq!(one(Generate, r#"{"token_ids":[1],"sampling_params":{"max_tokens":0}}"#).sampling.max_tokens, 0);
}

#[test]
fn chat_prefers_the_newer_name_of_max_tokens() {
    let body = |fields: &str| format!(r#"{{"messages":[{{"role":"user","content":"a"}}],{fields}}}"#);
    assert_eq!(one(Chat, &body(r#""max_tokens":5"#)).sampling.max_tokens, 5);
    assert_eq!(one(Chat, &body(r#""max_tokens":5,"max_completion_tokens":6"#)).sampling.max_tokens, 6);
    refused(Chat, &body(r#""max_tokens":100"#), "max_tokens", "100");
    refused(Chat, &body(r#""max_completion_tokens":100"#), "max_completion_tokens", "100");
    refused(Chat, &body(r#""max_completion_tokens":-1"#), "max_completion_tokens", "it is -1");
}

#[test]
fn several_prompts_become_several_requests() {
    let accepted =
        read(Completions, r#"{"prompt":[[1],[2,3]],"n":2,"max_tokens":1}"#).unwrap_or_else(|e| panic!("{e}"));
    let prompts: Vec<&[u32]> = accepted.requests.iter().map(|request| &*request.prompt).collect();
    assert_eq!(prompts, [&[1][..], &[2, 3]]);
    assert_eq!(read(Completions, r#"{"prompt":["a","b a"]}"#).map(|accepted| accepted.requests.len()), Ok(2));
    // Every fault names the prompt that has it.
    refused(Completions, r#"{"prompt":[[1],[]]}"#, "prompt[1]", "no tokens");
    refused(Completions, r#"{"prompt":[[1],[6]]}"#, "prompt[1]", "6");
    refused(
        Completions,
        r#"{"prompt":[[1,2],[1]],"routed_experts_prompt_start":2}"#,
        "routed_experts_prompt_start",
        "(1), inclusive; it is 2",
    );
}

#[test]
fn names_come_from_the_header_then_the_body() {
    let info = fixtures::info();
    let defaults = DefaultSampling::default();
    let id = |header_id: Option<&str>, body: &str| {
        let context = RequestContext {
            info: &info,
            defaults: &defaults,
            rows_format: None,
            header_id,
            weight_version: "0",
            unique: "u2",
            created: 7,
        };
        accept(Generate, body.as_bytes(), &context).map(|accepted| accepted.requests[0].names.clone())
    };
    assert_eq!(id(None, r#"{"token_ids":[1]}"#), Ok(vec!["generate-tokens-u2".into()]));
    assert_eq!(
        id(None, r#"{"token_ids":[1],"request_id":"mine"}"#),
        Ok(vec!["mine".into(), "generate-tokens-mine".into()])
    );
    assert_eq!(
        id(Some("h"), r#"{"token_ids":[1],"request_id":"mine"}"#),
        Ok(vec!["h".into(), "generate-tokens-h".into()])
    );
}

#[test]
fn the_checkpoint_s_defaults_reach_openai_s_endpoints_only() {
    let defaults = DefaultSampling { temperature: 0.5, top_k: 3, ..DefaultSampling::default() };
    let info = fixtures::info();
    let sampling = |dialect, body| {
        read_with(dialect, body, &info, &defaults).map(|accepted| accepted.requests[0].sampling.clone())
    };
    let found = sampling(Completions, r#"{"prompt":"a"}"#).expect("valid");
    assert_eq!((found.temperature, found.top_k), (0.5, 3));
    let found = sampling(Chat, r#"{"messages":[{"role":"user","content":"a"}],"top_k":-1}"#).expect("valid");
    assert_eq!((found.temperature, found.top_k), (0.5, 0));
    let found = sampling(Generate, r#"{"token_ids":[1]}"#).expect("valid");
    assert_eq!((found.temperature, found.top_k), (1.0, 0));
}

#[test]
fn generate_reads_its_settings_from_sampling_params() {
    let request = one(
        Generate,
        r#"{"token_ids":[1,2],"model":"toy-alias","cache_salt":"s","priority":-3,
            "sampling_params":{"max_tokens":3,"logprobs":1,"stop":["x"],"routed_experts_prompt_start":2}}"#,
    );
    assert_eq!((request.sampling.max_tokens, request.sampling.logprobs), (3, Some(1)));
    assert_eq!((request.sampling.stop, request.sampling.detokenize), (vec!["x".to_owned()], false));
    assert_eq!((request.routed_experts_start, request.priority), (Some(2), -3));
    assert_eq!(request.cache_salt.as_deref(), Some("s"));
    assert!(one(Generate, r#"{"token_ids":[1],"output_mode":"text"}"#).sampling.detokenize);
}

#[test]
fn faults_of_generate_are_named_where_they_are() {
    let nested = |fields: &str| format!(r#"{{"token_ids":[1,2],"sampling_params":{{{fields}}}}}"#);
    refused(Generate, "{}", "token_ids", "missing");
    refused(Generate, r#"{"token_ids":null}"#, "token_ids", "missing");
    refused(Generate, r#"{"token_ids":[]}"#, "token_ids", "no tokens");
    refused(Generate, r#"{"token_ids":[6]}"#, "token_ids", "6");
    refused(Generate, r#"{"token_ids":[1,true]}"#, "token_ids[1]", "boolean `true`");
    refused(Generate, r#"{"token_ids":[1],"sampling_params":[1]}"#, "sampling_params", "expected an object");
    refused(Generate, &nested(r#""max_tokens":63"#), "sampling_params.max_tokens", "63");
    refused(Generate, &nested(r#""max_tokens":-1"#), "sampling_params.max_tokens", "it is -1");
    refused(Generate, &nested(r#""logprobs":6"#), "sampling_params.logprobs", "6");
    refused(Generate, &nested(r#""logprobs":-1"#), "sampling_params.logprobs", "it is -1");
    refused(Generate, &nested(r#""prompt_logprobs":6"#), "sampling_params.prompt_logprobs", "6");
    refused(Generate, &nested(r#""n":5"#), "sampling_params.n", "5");
    refused(Generate, &nested(r#""min_tokens":3,"max_tokens":2"#), "sampling_params.min_tokens", "3");
    refused(Generate, &nested(r#""temperature":-1"#), "sampling_params.temperature", "it is -1");
    refused(Generate, &nested(r#""stop_token_ids":[9]"#), "sampling_params.stop_token_ids", "9");
    refused(Generate, &nested(r#""allowed_token_ids":[]"#), "sampling_params.allowed_token_ids", "empty");
    refused(Generate, &nested(r#""bad_words":["x"]"#), "sampling_params.bad_words", "not supported");
    let start = "sampling_params.routed_experts_prompt_start";
    refused(Generate, &nested(r#""routed_experts_prompt_start":3"#), start, "(2), inclusive; it is 3");
    refused(Generate, &nested(r#""routed_experts_prompt_start":1.0"#), start, "floating point `1.0`");
    refused(Generate, &nested(r#""routed_experts_prompt_start":true"#), start, "boolean `true`");
    refused(Generate, r#"{"token_ids":[1],"features":{}}"#, "features", "not supported");
    refused(Generate, r#"{"token_ids":[1],"output_mode":"derender"}"#, "output_mode", "\"derender\"");
}

#[test]
fn given_routing_must_fit_the_prompt() {
    let body = |start: usize| {
        format!(r#"{{"token_ids":[1,2],"routed_experts_replay":{{"data":"AQI=","shape":[1,1,2],"start":{start}}}}}"#)
    };
    let request = one(Generate, &body(1));
    assert_eq!(request.routed_experts_replay.map(|rows| (rows.span().start, rows.span().end)), Some((1, 2)));
    refused(Generate, &body(2), "routed_experts_replay", "rows [2, 3), the prompt has 2 tokens");
    let text = body(1).replace(r#""token_ids":[1,2]"#, r#""input_ids":[1]"#);
    refused(Sglang, &text, "routed_experts_replay", "the prompt has 1 tokens");
}

#[test]
fn sglang_s_names_are_read() {
    let request = one(
        Sglang,
        r#"{"input_ids":[1,2],"rid":"r","routed_experts_start_len":1,"return_logprob":true,"top_logprobs_num":2,
            "sampling_params":{"max_new_tokens":3,"min_new_tokens":1,"sampling_seed":-1,"top_k":-1,"temperature":0}}"#,
    );
    assert_eq!(
        (request.sampling.max_tokens, request.sampling.min_tokens, request.sampling.seed),
        (3, 1, Some(u64::MAX))
    );
    assert_eq!((request.sampling.logprobs, request.sampling.prompt_logprobs), (Some(2), None));
    assert_eq!((request.routed_experts_start, request.names), (Some(1), vec!["r".to_owned()]));
    let scored = one(Sglang, r#"{"text":"a b","return_logprob":true,"logprob_start_len":0}"#);
    assert_eq!((&*scored.prompt, scored.sampling.prompt_logprobs), (&[1, 2][..], Some(0)));
    let accepted = read(Sglang, r#"{"text":["a","b"]}"#).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(accepted.requests.len(), 2);
    refused(Sglang, "{}", "input_ids", "neither text nor input_ids");
    refused(Sglang, r#"{"text":"a","input_ids":[1]}"#, "input_ids", "both given");
    refused(Sglang, r#"{"input_ids":"a"}"#, "input_ids", "a list of token ids");
    let regex = r#"{"input_ids":[1],"sampling_params":{"regex":"a+"}}"#;
    refused(Sglang, regex, "sampling_params.regex", "not supported");
    refused(Sglang, r#"{"input_ids":[1],"routed_experts_start_len":2}"#, "routed_experts_start_len", "it is 2");
    refused(
        Sglang,
        r#"{"input_ids":[1],"sampling_params":{"max_new_tokens":-1}}"#,
        "sampling_params.max_new_tokens",
        "-1",
    );
    refused(Sglang, r#"{"input_ids":[1],"sampling_params":{"temperature":-1}}"#, "sampling_params.temperature", "-1");
    refused(Sglang, r#"{"input_ids":[1],"top_logprobs_num":9,"return_logprob":true}"#, "top_logprobs_num", "9");
    refused(Sglang, r#"{"input_ids":[1],"image_data":"x"}"#, "image_data", "not supported");
}

#[test]
fn two_different_starts_are_refused() {
    let body = |top: i64, nested: i64| {
        format!(
            r#"{{"token_ids":[1,2],"routed_experts_prompt_start":{top},"sampling_params":{{"routed_experts_prompt_start":{nested}}}}}"#
        )
    };
    assert_eq!(one(Generate, &body(1, 1)).routed_experts_start, Some(1));
    refused(
        Generate,
        &body(1, 0),
        "routed_experts_prompt_start",
        "1 at the top level, and sampling_params.routed_experts_prompt_start is 0",
    );
}

#[test]
fn faults_of_completions_are_named() {
    refused(Completions, "{}", "prompt", "missing");
    refused(Completions, r#"{"prompt":""}"#, "prompt", "no tokens");
    refused(Completions, r#"{"prompt":[]}"#, "prompt", "no tokens");
    refused(Completions, r#"{"prompt":"a","logprobs":true}"#, "logprobs", "boolean `true`");
    refused(Completions, r#"{"prompt":"a","max_tokens":64}"#, "max_tokens", "64");
    refused(Completions, r#"{"prompt":"a","suffix":"b"}"#, "suffix", "not supported");
    refused(Completions, r#"{"prompt":"a","cache_salt":""}"#, "cache_salt", "it has 0");
    refused(Completions, r#"{"prompt":"a","priority":1.5}"#, "priority", "floating point `1.5`");
    refused(Completions, r#"{"prompt":"a","stream":"yes"}"#, "stream", "\"yes\"");
    refused(Completions, r#"{"prompt":"a","stream_options":{}}"#, "stream_options", "not true");
    refused_by(&fixtures::info(), Completions, r#"["a"]"#, None, "expected an object");
    refused_by(&fixtures::info(), Completions, "prompt=a", None, "not valid JSON");
    let silent = EngineInfo { tokenizer: None, ..fixtures::info() };
    refused_by(&silent, Completions, r#"{"prompt":"a"}"#, Some("prompt"), "no tokenizer");
    refused_by(&silent, Completions, r#"{"prompt":[1],"stop":"x"}"#, Some("stop"), "tokenizer");
    refused_by(&silent, Generate, r#"{"token_ids":[1],"output_mode":"text"}"#, Some("output_mode"), "tokenizer");
}

#[test]
fn faults_of_chat_are_named() {
    let body = |fields: &str| format!(r#"{{"messages":[{{"role":"user","content":"a"}}],{fields}}}"#);
    refused(Chat, "{}", "messages", "missing");
    refused(Chat, r#"{"messages":[]}"#, "messages", "empty");
    refused(Chat, r#"{"messages":"a"}"#, "messages", "string \"a\"");
    refused(Chat, r#"{"messages":[{"role":"user","content":3}]}"#, "messages[0].content", "it is 3");
    let image = r#"{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]}]}"#;
    refused(Chat, image, "messages[0].content[0].type", "image_url");
    refused(Chat, &body(r#""logprobs":1"#), "logprobs", "integer `1`");
    refused(Chat, &body(r#""top_logprobs":2"#), "top_logprobs", "logprobs is not true");
    refused(Chat, &body(r#""logprobs":true,"top_logprobs":6"#), "top_logprobs", "6");
    refused(Chat, &body(r#""tool_choice":"required""#), "tool_choice", "\"required\"");
    refused(Chat, &body(r#""response_format":{"type":"json_object"}"#), "response_format", "json_object");
    refused(Chat, &body(r#""echo":true"#), "echo", "true");
    let start = "nvext.routed_experts_prompt_start";
    refused(Chat, &body(r#""nvext":{"routed_experts_prompt_start":9}"#), start, "it is 9");
    refused(
        Chat,
        &body(r#""n":2,"nvext":{"extra_fields":["routed_experts"]}"#),
        "n",
        "of one choice; the answer has 2",
    );
    refused(Chat, &body(r#""routed_experts_prompt_start":9"#), "routed_experts_prompt_start", "it is 9");
    let both = r#""continue_final_message":true,"add_generation_prompt":true"#;
    refused(Chat, &body(both), "continue_final_message", "cannot both");
    let silent = EngineInfo { tokenizer: None, ..fixtures::info() };
    refused_by(&silent, Chat, &body(r#""n":1"#), Some("messages"), "no tokenizer");
}

#[test]
fn a_conversation_is_rendered_by_the_template() {
    let request = one(Chat, r#"{"messages":[{"role":"user","content":"a b"},{"role":"assistant","content":"b"}]}"#);
    assert_eq!(&*request.prompt, [4, 1, 2, 5, 2, 5]);
    let continued = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"continue_final_message":true}"#;
    assert_eq!(&*one(Chat, continued).prompt, [4, 1, 5, 2]);
}

#[test]
fn rows_follow_the_server_s_settings() {
    let by_default = EngineInfo { return_routed_experts: true, ..fixtures::info() };
    let start = |info: &EngineInfo, body: &str| {
        read_with(Completions, body, info, &DefaultSampling::default())
            .map(|accepted| accepted.requests[0].routed_experts_start)
    };
    assert_eq!(start(&by_default, r#"{"prompt":"a"}"#), Ok(Some(0)));
    assert_eq!(start(&by_default, r#"{"prompt":"a","return_routed_experts":false}"#), Ok(None));
    let off = EngineInfo { row_layout: None, ..fixtures::info() };
    refused_by(
        &off,
        Completions,
        r#"{"prompt":"a","return_routed_experts":true}"#,
        Some("return_routed_experts"),
        "capture",
    );
    refused_by(
        &off,
        Generate,
        r#"{"token_ids":[1],"sampling_params":{"routed_experts_prompt_start":0}}"#,
        Some("sampling_params.routed_experts_prompt_start"),
        "capture",
    );
}

#[test]
fn an_unknown_model_is_a_404() {
    let error = read(Completions, r#"{"prompt":"a","model":"gpt"}"#).err().expect("unknown");
    assert_eq!((error.status, error.param.as_deref()), (404, Some("model")));
}

#[test]
fn format_names_serve_the_command_line_too() {
    assert_eq!(RowsFormat::from_name("dynamo"), Some(RowsFormat::Nvext));
    assert_eq!(RowsFormat::from_name("xml"), None);
}
