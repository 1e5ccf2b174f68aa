//! The engine on a GPU, which is emulated and slow: rows come from its memory, on streams that advance by chance.

use std::path::Path;

use moetrail_kernels::WeightDtype;
use moetrail_kernels::gpu::Gpu;
use moetrail_models::{Checkpoint, DtypeChoice};
use moetrail_synthetic::{Layout, Synthetic, write_single};

use crate::invariance_tests::{Alone, Met, check, folder as golden, load, runner};
use crate::lifecycle_tests::{request, rest};
use crate::{Engine, EngineConfig, EngineHandle, Event, EventStream, GenerateRequest, SamplingParams, TokenLogprobs};

pub(crate) fn start(gpu: Option<&Gpu>, folder: &Path, config: EngineConfig) -> Engine {
    let checkpoint = Checkpoint::open_folder(folder, "test").expect("the checkpoint opens");
    let decoder = checkpoint.load_on(gpu, DtypeChoice::Auto, false).expect("the checkpoint loads");
    Engine::start(decoder, None, Vec::new(), config).expect("the engine starts")
}

/// Log-probabilities of the prompt, then tokens and log-probabilities of each choice.
#[derive(Default)]
struct Seen {
    prompt: Vec<Option<TokenLogprobs>>,
    choices: Vec<(Vec<u32>, Vec<TokenLogprobs>)>,
}

fn run(handle: &EngineHandle, prompt: &[u32], sampling: SamplingParams) -> Result<Seen, String> {
    let choices = vec![Default::default(); sampling.n];
    let request = GenerateRequest { prompt: prompt.into(), sampling, ..GenerateRequest::default() };
    let mut stream = handle.submit(request).expect("the request is valid");
    let mut seen = Seen { choices, ..Seen::default() };
    while let Some(event) = stream.blocking_next() {
        match event {
            Event::Prompt(prompt) => seen.prompt = prompt.prompt_logprobs.unwrap_or_default(),
            Event::Choice(delta) => {
                let (tokens, logprobs) = &mut seen.choices[delta.index];
                tokens.extend(delta.token_ids);
                logprobs.extend(delta.logprobs);
            }
            Event::Failed(error) => return Err(error.to_string()),
        }
    }
    Ok(seen)
}

/// Tokens are sampled on the device, whoever else is in the batch.
#[test]
fn a_request_gives_the_same_bits_alone_and_in_any_company() {
    let Some(gpu) = moetrail_emulation::gpu(7, 1 << 30) else { return };
    let (alone, met) = (Alone::on(Some(gpu)), Met::default());
    runner(8).run(&load(), |load| check(&alone, &load, &met)).unwrap_or_else(|error| panic!("{error}"));
    let ahead = met.ahead.into_inner();
    println!("{ahead} steps were issued ahead");
    assert!(ahead >= 60, "only {ahead} steps were issued ahead");
}

/// Clients that go away while steps with their rows are on their way change nothing for those who stay.
#[test]
fn who_leaves_in_between_leaves_no_trace() {
    let Some(gpu) = moetrail_emulation::gpu(9, 1 << 30) else { return };
    let folder = golden("qwen3_moe-a");
    // Blocks of two slots, and few of them: those of one who left are another's in the next step.
    let config = EngineConfig {
        max_num_seqs: 4,
        num_blocks: Some(36),
        block_size: 2,
        max_model_len: Some(40),
        ..EngineConfig::default()
    };
    let engine = start(Some(&gpu), &folder, config);
    let handle = engine.handle();
    let request = |first: u32| request(&Vec::from_iter(first..first + 9), 20);
    let outcome = |stream: EventStream| {
        let (tokens, end) = rest(stream);
        (tokens, end.routed_experts.expect("rows were asked for").expect("they are there"))
    };
    let alone = outcome(handle.submit(request(5)).expect("the request is valid"));
    for events in 0..6 {
        let stays = handle.submit(request(5)).expect("the request is valid");
        let mut leaves = handle.submit(request(60 + events)).expect("the request is valid");
        (0..=events).for_each(|_| drop(leaves.blocking_next()));
        drop(leaves);
        let comes = handle.submit(request(5)).expect("the request is valid");
        assert!(outcome(stays) == alone && outcome(comes) == alone, "{events} events");
    }
    // Of twenty steps of a request all but the first and the last are.
    let (steps, ahead) = handle.stats().num_steps();
    assert!(ahead >= 18 * 7, "{ahead} of {steps}");
}

/// What was sampled has the same log-probabilities when it is scored as a prompt, and no logits cross for either, but
/// those of the first tokens, which may not be the end. The pool is sized by the largest step.
#[test]
fn a_prompt_is_scored_as_it_was_sampled() {
    let Some(gpu) = moetrail_emulation::gpu(3, 1 << 30) else { return };
    let folder = golden("qwen3_moe-a");
    let config = EngineConfig {
        max_num_seqs: 3,
        max_num_batched_tokens: 7,
        max_model_len: Some(40),
        block_size: 4,
        ..EngineConfig::default()
    };
    let engine = start(Some(&gpu), &folder, config);
    let handle = engine.handle();
    let prompt: Vec<u32> = (3..14).collect();
    let sampling = SamplingParams {
        n: 3,
        top_k: 40,
        min_p: 0.001,
        seed: Some(5),
        logprobs: Some(2),
        min_tokens: 2,
        stop_token_ids: vec![1],
        detokenize: false,
        ..SamplingParams::default()
    };
    let sampled = run(&handle, &prompt, sampling.clone()).expect("it answers");
    assert_ne!(sampled.choices[0].0, sampled.choices[1].0);
    for (tokens, logprobs) in &sampled.choices {
        let scoring =
            SamplingParams { n: 1, max_tokens: 0, min_tokens: 0, prompt_logprobs: Some(2), ..sampling.clone() };
        let scored = run(&handle, &[&prompt[..], tokens].concat(), scoring).expect("it answers");
        let scored: Vec<TokenLogprobs> = scored.prompt.into_iter().skip(prompt.len()).flatten().collect();
        assert!(logprobs.iter().all(|entry| entry.top.len() == 2));
        assert_eq!(&scored, logprobs);
    }
    // One row for the first tokens, three for the second.
    let bytes = format!(" {}", 4 * handle.info().vocab_size * 4);
    let text = handle.stats().encode();
    assert!(text.lines().any(|line| line.starts_with("moetrail_logits_d2h_bytes_total{") && line.ends_with(&bytes)));
}

/// The swap space of a device is pinned memory, of which there may not be as much; the option is named.
#[test]
fn a_swap_space_that_cannot_be_pinned_is_refused() {
    let Some(gpu) = moetrail_emulation::gpu(0, 1 << 28) else { return };
    let folder = golden("qwen3_moe-a");
    let checkpoint = Checkpoint::open_folder(&folder, "test").expect("the checkpoint opens");
    let decoder = checkpoint.load_on(Some(&gpu), DtypeChoice::Auto, false).expect("the checkpoint loads");
    let config = EngineConfig { num_blocks: Some(16), swap_space: 1 << 30, ..EngineConfig::default() };
    let error = Engine::start(decoder, None, Vec::new(), config).err().expect("it is refused").to_string();
    assert!(error.starts_with("--swap-space is 1024 MiB") && error.contains("pinned memory"), "{error}");
}

/// A row of the head that is NaN makes every row of logits NaN, wherever they are looked at.
#[test]
fn nan_logits_fail_their_request() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let synthetic = Synthetic::new("mixtral");
    synthetic.write_config(folder.path());
    let mut tensors = synthetic.tensors(Layout::EachExpert);
    let (shape, values) = tensors.get_mut("lm_head.weight").expect("a head");
    values[7 * shape[1]..8 * shape[1]].fill(f32::NAN);
    write_single(folder.path(), &tensors, WeightDtype::F32);
    let gpu = moetrail_emulation::gpu(3, 1 << 30);
    for gpu in [None].into_iter().chain(gpu.as_ref().map(Some)) {
        let config = EngineConfig { num_blocks: Some(64), ..EngineConfig::default() };
        let engine = start(gpu, folder.path(), config);
        let greedy = SamplingParams { temperature: 0.0, detokenize: false, ..SamplingParams::default() };
        let fails = |sampling: SamplingParams| run(&engine.handle(), &[3, 4, 5], sampling).err();
        let at = |position| Some(format!("the model produced NaN logits at position {position}"));
        assert_eq!(fails(greedy.clone()), at(2));
        assert_eq!(fails(SamplingParams { temperature: 1.0, top_p: 0.9, ..greedy.clone() }), at(2));
        assert_eq!(fails(SamplingParams { frequency_penalty: 1.0, ..greedy.clone() }), at(2));
        assert_eq!(fails(SamplingParams { prompt_logprobs: Some(1), ..greedy }), at(0));
    }
}
