//! What goes wrong goes wrong alone, and says so.

use std::path::Path;

use moetrail_kernels::WeightDtype;
use moetrail_models::{Checkpoint, DtypeChoice};
use moetrail_synthetic::{Layout, Synthetic, write_single};
use serde_json::json;

use crate::fault::Fault;
use crate::{
    Engine, EngineConfig, EngineHandle, Event, Finish, FinishReason, GenerateRequest, PauseMode, SamplingParams,
    StartError, SubmitError,
};

fn open(folder: &Path, config: EngineConfig) -> Result<Engine, StartError> {
    let checkpoint = Checkpoint::open_folder(folder, "synthetic").expect("the checkpoint opens");
    let decoder = checkpoint.load(DtypeChoice::Auto, false).expect("the checkpoint loads");
    Engine::start(decoder, None, Vec::new(), config)
}

fn start(synthetic: &Synthetic, config: EngineConfig) -> Result<Engine, StartError> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    synthetic.write(folder.path(), Layout::EachExpert);
    open(folder.path(), config)
}

fn request(prompt: &[u32], max_tokens: usize) -> GenerateRequest {
    GenerateRequest {
        prompt: prompt.into(),
        sampling: SamplingParams { max_tokens, temperature: 0.0, detokenize: false, ..SamplingParams::default() },
        routed_experts_start: Some(0),
        ..GenerateRequest::default()
    }
}

/// The ends of all choices, or the failure of the request.
fn run(handle: &EngineHandle, request: GenerateRequest) -> Result<Vec<Finish>, String> {
    let mut stream = handle.submit(request).map_err(|error| error.to_string())?;
    let mut ends = Vec::new();
    while let Some(event) = stream.blocking_next() {
        match event {
            Event::Failed(error) => return Err(error.to_string()),
            Event::Choice(delta) => ends.extend(delta.finish),
            Event::Prompt(_) => {}
        }
    }
    Ok(ends)
}

#[test]
fn a_dense_model_is_refused_under_capture_and_served_without() {
    let dense = Synthetic::new("qwen3_moe").set("mlp_only_layers", json!([0, 1, 2]));
    let error = start(&dense, EngineConfig::default()).err().expect("nothing to capture").to_string();
    assert_eq!(
        error,
        "the model is dense: it routes nothing, so there is nothing to capture; serve it with --no-capture"
    );
    let engine = start(&dense, EngineConfig { capture: false, ..EngineConfig::default() }).expect("it starts");
    let unwanted = GenerateRequest { routed_experts_start: None, ..request(&[1, 2], 3) };
    assert!(run(&engine.handle(), unwanted).expect("it answers")[0].routed_experts.is_none());
    let error = run(&engine.handle(), request(&[1, 2], 3)).unwrap_err();
    assert_eq!(error, "routed experts were asked for, but this server does not capture them");
}

#[test]
fn a_nan_fails_its_request_and_no_other() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let synthetic = Synthetic::new("mixtral");
    synthetic.write_config(folder.path());
    let mut tensors = synthetic.tensors(Layout::EachExpert);
    let (shape, values) = tensors.get_mut("model.embed_tokens.weight").expect("an embedding");
    // Token 95 poisons whatever reads it; the self-check's tokens are even.
    let hidden = shape[1];
    values[95 * hidden..].fill(f32::NAN);
    write_single(folder.path(), &tensors, WeightDtype::F32);
    let engine = open(folder.path(), EngineConfig::default()).expect("it starts");
    let handle = engine.handle();
    let good = |seed: u32| {
        let mut good = request(&[3 + seed, 4, 5], 20);
        // A bystander must not say the poisoned token itself.
        good.sampling.logit_bias = vec![(95, -1e9)];
        good
    };
    let before: Vec<_> = (0..4).map(|i| handle.submit(good(i)).expect("it is valid")).collect();
    let error = run(&handle, request(&[3, 95, 5], 20)).unwrap_err();
    assert_eq!(error, "the model produced NaN router logits at position 1");
    for mut stream in before {
        let mut finished = false;
        while let Some(event) = stream.blocking_next() {
            assert!(!matches!(event, Event::Failed(_)), "a bystander failed: {event:?}");
            finished |= matches!(event, Event::Choice(delta) if delta.finish.is_some());
        }
        assert!(finished);
    }
    assert_eq!(handle.num_live(), 0);
}

#[test]
fn lost_rows_are_reported_on_the_choice_and_its_tokens_stay() {
    let config = EngineConfig { fault: Fault::BlockGivenAway, ..EngineConfig::default() };
    let engine = start(&Synthetic::new("olmoe"), config).expect("it starts");
    let ends = run(&engine.handle(), request(&[1, 2, 3], 4)).expect("the tokens are there");
    assert_eq!(ends[0].reason, FinishReason::Length);
    let error = ends[0].routed_experts.clone().expect("rows were asked for").unwrap_err();
    assert_eq!(error.code, "generation_mismatch");
    assert!(error.message.contains("its rows are gone"), "{error}");
    let text = engine.handle().stats().encode();
    assert!(
        text.lines().any(|l| l.starts_with("moetrail_routed_experts_generation_mismatch_total") && l.ends_with(" 1"))
    );
}

#[test]
fn more_than_256_experts_take_two_bytes() {
    let wide = Synthetic::new("qwen3_moe").set("num_experts", json!(300)).set("moe_intermediate_size", json!(4));
    let engine = start(&wide, EngineConfig::default()).expect("it starts");
    let prompt: Vec<u32> = (0..60).collect();
    let ends = run(&engine.handle(), request(&prompt, 2)).expect("it answers");
    let rows = ends[0].routed_experts.as_ref().expect("asked for").as_ref().expect("not lost");
    assert_eq!(rows.layout().dtype.name(), "uint16");
    assert_eq!(rows.data().len(), 61 * 3 * 2 * 2);
    let ids: Vec<u16> = (0..61).flat_map(|position| rows.ids(position, 1).expect("a row")).collect();
    assert!(ids.iter().all(|id| *id < 300) && ids.iter().any(|id| *id > 255), "{ids:?}");
}

#[test]
fn limits_are_named() {
    let config = EngineConfig { max_num_seqs: 1, max_queued_requests: 0, ..EngineConfig::default() };
    let engine = start(&Synthetic::new("olmoe"), config).expect("it starts");
    let handle = engine.handle();
    let refuse = |request: GenerateRequest, param: &str, text: &str| match handle.submit(request).err() {
        Some(SubmitError::Invalid { param: found, message }) => {
            assert_eq!(found, param);
            assert!(message.contains(text), "{message}");
        }
        other => panic!("{param}: {other:?}"),
    };
    let with = |change: &dyn Fn(&mut SamplingParams)| {
        let mut request = request(&[1, 2, 3], 4);
        change(&mut request.sampling);
        request
    };
    refuse(request(&[], 4), "prompt", "no tokens");
    refuse(request(&[1, 96], 4), "prompt", "token id 96 is not below the vocabulary size 96");
    refuse(request(&[1; 129], 0), "prompt", "129");
    refuse(request(&[1; 120], 9), "max_tokens", "max_tokens is 9 and the prompt has 120 tokens");
    refuse(with(&|s| s.n = 2), "n", "n is 2, max_num_seqs is 1");
    refuse(with(&|s| s.logprobs = Some(21)), "logprobs", "logprobs is 21");
    refuse(with(&|s| s.prompt_logprobs = Some(50)), "prompt_logprobs", "50");
    refuse(with(&|s| s.logit_bias = vec![(200, 1.0)]), "logit_bias", "200");
    refuse(with(&|s| s.stop_token_ids = vec![300]), "stop_token_ids", "300");
    refuse(with(&|s| s.allowed_token_ids = Some(vec![])), "allowed_token_ids", "empty");
    refuse(with(&|s| s.stop = vec!["x".into()]), "stop", "tokenizer");
    let beyond = GenerateRequest { routed_experts_start: Some(4), ..request(&[1, 2, 3], 4) };
    refuse(beyond, "routed_experts_prompt_start", "it is 4");

    // One runs, none may wait. It stands still, or it might end before the other comes.
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(handle.pause(PauseMode::Keep, false)).expect("it pauses");
    let running = handle.submit(request(&[1, 2, 3], 120)).expect("there is room");
    assert_eq!(handle.submit(request(&[1], 1)).err(), Some(SubmitError::Full { limit: 1 }));
    drop(running);
    engine.shutdown();
    assert_eq!(handle.submit(request(&[1], 1)).err(), Some(SubmitError::Closed));
}

#[test]
fn masks_that_leave_nothing_fail_the_request() {
    let engine = start(&Synthetic::new("olmoe"), EngineConfig::default()).expect("it starts");
    let mut request = request(&[1, 2, 3], 4);
    request.sampling.allowed_token_ids = Some(vec![7]);
    request.sampling.stop_token_ids = vec![7];
    request.sampling.min_tokens = 2;
    assert_eq!(run(&engine.handle(), request).unwrap_err(), "bias, masks and min_tokens leave no token to sample");
}

#[test]
fn bad_settings_name_their_flag() {
    let message = |config: EngineConfig| start(&Synthetic::new("olmoe"), config).err().expect("refused").to_string();
    let default = EngineConfig::default;
    assert!(message(EngineConfig { max_num_seqs: 0, ..default() }).starts_with("--max-num-seqs must be at least 1"));
    assert!(message(EngineConfig { block_size: 0, ..default() }).starts_with("--block-size must be at least 1"));
    assert!(message(EngineConfig { max_num_batched_tokens: 0, ..default() }).starts_with("--max-num-batched-tokens"));
    assert!(message(EngineConfig { max_model_len: Some(129), ..default() }).contains("129; the model takes 1 to 128"));
    assert!(message(EngineConfig { num_blocks: Some(0), ..default() }).starts_with("--num-gpu-blocks-override is 0"));
    assert!(message(EngineConfig { num_blocks: Some(1 << 40), ..default() }).starts_with("--num-gpu-blocks-override"));
    let contradiction = EngineConfig { capture: false, return_routed_experts: true, ..default() };
    assert!(message(contradiction).contains("needs capture"));
}
