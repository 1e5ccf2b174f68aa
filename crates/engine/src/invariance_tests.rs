//! Schedule invariance: a request gives the same bits alone and in any company.
//!
//! Random loads run on random pools; tokens, log-probabilities and rows of every request must equal, bit for bit, those
//! of the same request alone on a roomy engine without prefix cache. The counters must be exact, too.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use moetrail_kernels::gpu::Gpu;
use moetrail_models::{Checkpoint, DtypeChoice};
use moetrail_routes::ExpertRows;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestCaseError, TestRunner};

use crate::fault::Fault;
use crate::{
    Engine, EngineConfig, EngineHandle, Event, EventStream, GenerateRequest, PauseMode, ReprefillRouting,
    SamplingParams, TokenLogprobs,
};

const MODELS: [&str; 4] = ["qwen3_moe-a", "qwen3_moe-b", "olmoe-b", "mixtral-b"];

/// `(id, bits of the log-probability, rank, bits of the alternatives)`.
type LogprobBits = (u32, u32, u32, Vec<(u32, u32)>);

/// What a client sees of one choice, bit for bit.
#[derive(Debug, Clone, PartialEq, Default)]
struct Seen {
    tokens: Vec<u32>,
    logprobs: Vec<LogprobBits>,
    rows: Option<Result<(usize, Vec<u8>), String>>,
    finish: Option<&'static str>,
    row_bytes: usize,
}

impl Seen {
    /// Adds the rows of a chunk, which follow those of the chunk before.
    fn add_rows(&mut self, rows: &ExpertRows) {
        self.row_bytes = rows.layout().row_bytes();
        let (start, data) = match self.rows.get_or_insert_with(|| Ok((rows.start(), Vec::new()))) {
            Ok(seen) => seen,
            Err(error) => panic!("rows after {error}"),
        };
        assert_eq!(*start + data.len() / self.row_bytes, rows.start(), "chunks of rows leave no gap");
        data.extend_from_slice(rows.data());
    }
}

#[derive(Debug, Clone, Default)]
struct Outcome {
    prompt_logprobs: Vec<(u32, u32)>,
    choices: BTreeMap<usize, Seen>,
    failed: Option<String>,
    /// Choices under which computed state was dropped.
    recomputed: usize,
}

impl PartialEq for Outcome {
    /// What was dropped on the way does not show.
    fn eq(&self, other: &Self) -> bool {
        (&self.prompt_logprobs, &self.choices, &self.failed) == (&other.prompt_logprobs, &other.choices, &other.failed)
    }
}

fn bits(entry: &TokenLogprobs) -> LogprobBits {
    let top = entry.top.iter().map(|(id, logprob)| (*id, logprob.to_bits())).collect();
    (entry.token_id, entry.logprob.to_bits(), entry.rank, top)
}

impl Outcome {
    fn take(&mut self, event: Event) {
        match event {
            Event::Prompt(prompt) => {
                let entries = prompt.prompt_logprobs.unwrap_or_default();
                self.prompt_logprobs = entries.iter().flatten().map(|e| (e.token_id, e.logprob.to_bits())).collect();
            }
            Event::Choice(delta) => {
                let seen = self.choices.entry(delta.index).or_default();
                seen.tokens.extend(delta.token_ids);
                seen.logprobs.extend(delta.logprobs.iter().map(bits));
                if let Some(rows) = delta.routed_experts {
                    seen.add_rows(&rows);
                }
                if let Some(finish) = delta.finish {
                    seen.finish = Some(finish.reason.as_str());
                    match finish.routed_experts {
                        Some(Ok(rows)) => seen.add_rows(&rows),
                        Some(Err(error)) => seen.rows = Some(Err(error.to_string())),
                        None => {}
                    }
                    if let (Some(versions), Some(Ok((start, data)))) = (finish.recomputed, &seen.rows) {
                        // The stretches of the versions follow each other and cover the rows.
                        let end = versions.iter().fold(*start, |end, next| {
                            assert_eq!(next.span.start, end);
                            next.span.end
                        });
                        assert_eq!(end - start, data.len() / seen.row_bytes.max(1));
                        self.recomputed += 1;
                    }
                }
            }
            Event::Failed(error) => self.failed = Some(error.to_string()),
        }
    }
}

/// A request and when it comes.
#[derive(Debug, Clone)]
struct Arrival {
    request: GenerateRequest,
    /// After so many events of the request before it.
    after_events: usize,
    /// The next turn of the request before it: that prompt, what its last choice said, then this prompt.
    next_turn: bool,
    /// What an operator does just before.
    order: Option<Order>,
}

#[derive(Debug, Clone, Copy)]
enum Order {
    Reset,
    /// To the same weights under another version.
    UpdateWeights,
    /// `keep`, with or without a reset, and resume.
    Pause {
        clear_cache: bool,
    },
}

impl Order {
    fn carry_out(self, handle: &EngineHandle, model: &str) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let done = runtime.block_on(async {
            match self {
                Self::Reset => handle.reset_prefix_cache().await,
                Self::UpdateWeights => handle.update_weights(folder(model), None).await.map(drop),
                Self::Pause { clear_cache } => {
                    handle.pause(PauseMode::Keep, clear_cache).await?;
                    handle.resume().await
                }
            }
        });
        done.expect("the order is carried out");
    }
}

fn folder(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(model)
}

fn start(gpu: Option<&Gpu>, model: &str, config: EngineConfig) -> Engine {
    let checkpoint = Checkpoint::open_folder(&folder(model), model).expect("the golden checkpoint opens");
    let decoder = checkpoint.load_on(gpu, DtypeChoice::Auto, false).expect("the golden checkpoint loads");
    Engine::start(decoder, None, checkpoint.eos_token_ids(), config).expect("the engine starts")
}

fn run_all(handle: &EngineHandle, model: &str, arrivals: &[Arrival]) -> Vec<Outcome> {
    let mut streams: Vec<EventStream> = Vec::new();
    let mut outcomes: Vec<Outcome> = Vec::new();
    for arrival in arrivals {
        if let (Some(stream), Some(outcome)) = (streams.last_mut(), outcomes.last_mut()) {
            for event in (0..arrival.after_events).map_while(|_| stream.blocking_next()) {
                outcome.take(event);
            }
        }
        if let Some(order) = arrival.order {
            order.carry_out(handle, model);
        }
        streams.push(handle.submit(arrival.request.clone()).expect("the request is valid"));
        outcomes.push(Outcome::default());
    }
    for (stream, outcome) in streams.iter_mut().zip(&mut outcomes) {
        while let Some(event) = stream.blocking_next() {
            outcome.take(event);
        }
    }
    outcomes
}

fn counter(handle: &EngineHandle, name: &str) -> u64 {
    let text = handle.stats().encode();
    let lines = text.lines().filter(|line| line.starts_with(&format!("{name}{{")));
    let values = lines.map(|line| line.rsplit(' ').next().and_then(|value| value.parse::<u64>().ok()));
    values.map(|value| value.expect("a counter is a number")).reduce(|a, b| a + b).expect("the counter exists")
}

prop_compose! {
    fn request()(
        family in 0u32..3,
        prompt_len in prop_oneof![1usize..12, 12usize..70],
        tail in prop::option::of(3u32..300),
        n in prop_oneof![3 => Just(1usize), 1 => 2usize..4],
        max_tokens in prop_oneof![1 => Just(0usize), 8 => 1usize..24],
        sampled: bool,
        seed in 0u64..4,
        with_logprobs in prop::option::of(0usize..3),
        with_prompt_logprobs in prop::option::weighted(0.15, Just(1usize)),
        start in prop::option::weighted(0.85, 0.0f64..=1.0),
        salt in prop::option::weighted(0.2, "[ab]"),
        priority in -1i32..2,
        penalised in prop::bool::weighted(0.2),
        stops in prop::bool::weighted(0.3),
        routed_experts_delta: bool,
    ) -> GenerateRequest {
        // Three families of prompts that share prefixes within the family.
        let mut prompt: Vec<u32> = (0..prompt_len as u32).map(|i| 3 + (i * i * 7 + i * 13 + family * 101) % 300).collect();
        if let (Some(last), Some(tail)) = (prompt.last_mut(), tail) {
            *last = tail;
        }
        GenerateRequest {
            prompt: prompt.into(),
            sampling: SamplingParams {
                n,
                max_tokens,
                temperature: if sampled { 1.0 } else { 0.0 },
                top_k: if seed == 1 { 20 } else { 0 },
                top_p: if seed == 2 { 0.9 } else { 1.0 },
                seed: Some(seed),
                repetition_penalty: if penalised { 1.3 } else { 1.0 },
                // A third of the sampled tokens: many choices end where nobody expects it.
                stop_token_ids: if stops { (0..384).filter(|id| id % 3 == 1).collect() } else { Vec::new() },
                logprobs: with_logprobs,
                prompt_logprobs: with_prompt_logprobs,
                detokenize: false,
                ..SamplingParams::default()
            },
            priority,
            cache_salt: salt,
            routed_experts_start: start.map(|share| (share * prompt_len as f64) as usize),
            routed_experts_delta,
            ..GenerateRequest::default()
        }
    }
}

fn order() -> impl Strategy<Value = Order> {
    prop_oneof![
        Just(Order::Reset),
        Just(Order::UpdateWeights),
        any::<bool>().prop_map(|clear_cache| Order::Pause { clear_cache })
    ]
}

#[derive(Debug, Clone)]
pub(crate) struct Load {
    model: &'static str,
    arrivals: Vec<Arrival>,
    spare_blocks: usize,
    config: EngineConfig,
}

pub(crate) fn load() -> impl Strategy<Value = Load> {
    let arrival = (request(), 0usize..6, prop::bool::weighted(0.3), prop::option::weighted(0.35, order()));
    let swap_space = prop_oneof![Just(0usize), 1usize..1 << 20, Just(64 << 20)];
    let routing = prop_oneof![Just(ReprefillRouting::Recompute), Just(ReprefillRouting::Replay)];
    let limits = (
        (0usize..MODELS.len(), 1usize..20, 0usize..6, 0usize..4, 4usize..80, prop::bool::weighted(0.75)),
        (swap_space, routing),
    );
    (prop::collection::vec(arrival, 2..7), limits).prop_map(|(arrivals, limits)| {
        let ((model, block_size, spare_blocks, extra_seqs, max_num_batched_tokens, enable_prefix_caching), limits) =
            limits;
        let (swap_space, reprefill_routing) = limits;
        let arrival = |(request, after_events, next_turn, order)| Arrival { request, after_events, next_turn, order };
        let arrivals: Vec<Arrival> = arrivals.into_iter().map(arrival).collect();
        let widest = arrivals.iter().map(|a| a.request.sampling.n).max().unwrap_or(1);
        let config = EngineConfig {
            max_num_seqs: widest + extra_seqs,
            max_num_batched_tokens,
            block_size,
            enable_prefix_caching,
            swap_space,
            reprefill_routing,
            verify_reprefill: true,
            ..EngineConfig::default()
        };
        Load { model: MODELS[model], arrivals, spare_blocks, config }
    })
}

/// Runs every request alone, turn by turn, and writes the prompts of later turns.
fn expect(alone: &EngineHandle, model: &str, arrivals: &mut [Arrival]) -> Vec<Outcome> {
    let mut outcomes: Vec<Outcome> = Vec::new();
    for i in 0..arrivals.len() {
        if let (true, Some(before)) = (arrivals[i].next_turn, outcomes.last()) {
            let said = before.choices.values().next_back().map(|seen| seen.tokens.clone()).unwrap_or_default();
            let own = &arrivals[i].request.prompt[..arrivals[i].request.prompt.len().min(8)];
            let prompt = [&arrivals[i - 1].request.prompt, &said[..], own].concat();
            arrivals[i].request.prompt = prompt.into();
            arrivals[i].request.routed_experts_start =
                arrivals[i].request.routed_experts_start.map(|start| start.min(arrivals[i].request.prompt.len()));
            arrivals[i].request.cache_salt = arrivals[i - 1].request.cache_salt.clone();
            // The turn before has ended by then.
            arrivals[i].after_events = usize::MAX;
        }
        let undisturbed = Arrival { order: None, ..arrivals[i].clone() };
        outcomes.extend(run_all(alone, model, std::slice::from_ref(&undisturbed)));
        if arrivals[i].request.sampling.n > 1 {
            let mut single = undisturbed;
            single.request.sampling.n = 1;
            let single = run_all(alone, model, &[single]).remove(0);
            assert_eq!(outcomes[i].choices[&0], single.choices[&0], "choice 0 of n > 1 differs from n = 1");
        }
    }
    outcomes
}

/// How many cases met what makes them worth running.
#[derive(Default)]
pub(crate) struct Met {
    preemption: AtomicU32,
    prefix_hit: AtomicU32,
    several_chunks: AtomicU32,
    several_choices: AtomicU32,
    swap: AtomicU32,
    recomputed: AtomicU32,
    /// Steps that were issued ahead, in all cases together.
    pub(crate) ahead: AtomicU32,
}

/// Runs one load and compares every request with itself alone.
pub(crate) fn check(alone: &Alone, load: &Load, met: &Met) -> Result<(), TestCaseError> {
    let mut load = load.clone();
    let expect = expect(&alone.engines[load.model].handle(), load.model, &mut load.arrivals);
    let blocks =
        |r: &GenerateRequest| (r.prompt.len() + r.sampling.max_tokens.max(1) - 1).div_ceil(load.config.block_size);
    let longest = load.arrivals.iter().map(|a| blocks(&a.request)).max().unwrap_or(1);
    load.config.num_blocks = Some(longest + load.spare_blocks);
    let engine = start(alone.gpu.as_ref(), load.model, load.config.clone());
    let handle = engine.handle();
    let outcomes = run_all(&handle, load.model, &load.arrivals);
    let bump = |counter: &AtomicU32, met: bool| counter.fetch_add(u32::from(met), Ordering::Relaxed);
    bump(&met.preemption, counter(&handle, "vllm:num_preemptions_total") > 0);
    bump(&met.prefix_hit, counter(&handle, "vllm:prefix_cache_hits_total") > 0);
    bump(&met.swap, counter(&handle, "moetrail_routed_experts_moved_bytes_total") > 0 && load.config.swap_space > 0);
    met.ahead.fetch_add(counter(&handle, "moetrail_steps_ahead_total") as u32, Ordering::Relaxed);
    bump(&met.recomputed, outcomes.iter().any(|outcome| outcome.recomputed > 0));
    let longest = load.arrivals.iter().map(|a| a.request.prompt.len()).max().unwrap_or(0);
    bump(&met.several_chunks, longest > load.config.max_num_batched_tokens);
    bump(&met.several_choices, load.arrivals.iter().any(|a| a.request.sampling.n > 1));

    let (mut rows_returned, mut rows_drained, mut row_bytes) = (0, 0, 0);
    for ((arrival, outcome), expect) in load.arrivals.iter().zip(&outcomes).zip(&expect) {
        let request = &arrival.request;
        prop_assert_eq!(outcome, expect);
        prop_assert_eq!(outcome.choices.len(), request.sampling.n);
        let prompt_len = request.prompt.len();
        for seen in outcome.choices.values() {
            let Some(start) = request.routed_experts_start else {
                prop_assert_eq!(&seen.rows, &None);
                continue;
            };
            let end = prompt_len + seen.tokens.len().max(1) - 1;
            let layout = handle.info().row_layout.expect("capture is on");
            row_bytes = layout.row_bytes();
            let Some(Ok((found, data))) = &seen.rows else {
                return Err(TestCaseError::fail(format!("no rows: {:?}", seen.rows)));
            };
            prop_assert_eq!((*found, data.len()), (start, (end - start) * row_bytes));
            rows_returned += end - start;
            // The prompt's rows are copied to the host once for all choices.
            rows_drained += end - start.max(prompt_len).min(end);
        }
        rows_drained += request.routed_experts_start.map_or(0, |start| prompt_len - start);
    }
    prop_assert_eq!(counter(&handle, "moetrail_routed_experts_rows_returned_total"), rows_returned as u64);
    if load.model != "qwen3_moe-b" {
        // Without dense layers a ring row is as wide as a row on the wire.
        prop_assert_eq!(counter(&handle, "moetrail_routed_experts_d2h_bytes_total"), (rows_drained * row_bytes) as u64);
    }
    // Of a device's logits the host sees those that it has to penalise, and no others; choices begin from the same row.
    let penalised = load.arrivals.iter().zip(&outcomes).filter(|(arrival, _)| {
        let sampling = &arrival.request.sampling;
        alone.gpu.is_some() && sampling.repetition_penalty != 1.0 && sampling.max_tokens > 0
    });
    let rows = penalised.map(|(_, outcome)| 1 + outcome.choices.values().map(|c| c.tokens.len() - 1).sum::<usize>());
    let logit_bytes = rows.sum::<usize>() * handle.info().vocab_size * 4;
    prop_assert_eq!(counter(&handle, "moetrail_logits_d2h_bytes_total"), logit_bytes as u64);
    let again = counter(&handle, "moetrail_routed_experts_rows_deduplicated_total");
    prop_assert_eq!(counter(&handle, "moetrail_routed_experts_reprefill_rows_compared_total"), again);
    prop_assert_eq!(counter(&handle, "moetrail_routed_experts_reprefill_rows_differing_total"), 0);
    engine.shutdown();
    let idle = |line: &str| line.starts_with("vllm:kv_cache_usage_perc") && line.ends_with(" 0.0");
    let no_block_left = handle.stats().encode().lines().any(idle);
    prop_assert!(no_block_left, "blocks are still referenced");
    Ok(())
}

/// One engine per model that only ever runs one request at a time, and where all engines compute.
pub(crate) struct Alone {
    engines: BTreeMap<&'static str, Engine>,
    gpu: Option<Gpu>,
}

impl Alone {
    pub(crate) fn on(gpu: Option<Gpu>) -> Self {
        let config = EngineConfig { enable_prefix_caching: false, num_blocks: Some(256), ..EngineConfig::default() };
        let engine = |model| (model, start(gpu.as_ref(), model, config.clone()));
        Self { engines: MODELS.into_iter().map(engine).collect(), gpu }
    }
}

pub(crate) fn runner(cases: u32) -> TestRunner {
    // A failure prints its load; the seed keeps runs comparable. MOETRAIL_TEST_SEED draws others.
    let seed = std::env::var("MOETRAIL_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20_261_120);
    let config = Config { cases, rng_seed: RngSeed::Fixed(seed), failure_persistence: None, ..Config::default() };
    TestRunner::new(config)
}

#[test]
fn a_request_gives_the_same_bits_alone_and_in_any_company() {
    let (alone, met) = (Alone::on(None), Arc::new(Met::default()));
    runner(500).run(&load(), |load| check(&alone, &load, &met)).unwrap_or_else(|error| panic!("{error}"));
    let kinds =
        [&met.preemption, &met.prefix_hit, &met.several_chunks, &met.several_choices, &met.swap, &met.recomputed];
    let (met, ahead) = (kinds.map(|c| c.load(Ordering::Relaxed)), met.ahead.load(Ordering::Relaxed));
    assert_eq!(ahead, 0, "on the host nothing is issued ahead");
    println!("of 500 cases, {met:?} met preemption, a prefix hit, several chunks, n > 1, swap, dropped state");
    assert!(met.iter().all(|met| *met >= 50), "a kind of case was met too rarely: {met:?}");
}

#[test]
fn planted_faults_are_caught() {
    let (alone, met) = (Alone::on(None), Met::default());
    for fault in [Fault::RowShift, Fault::StaleBlock, Fault::RowLostOnCopyOnWrite, Fault::RowLostOnSwap] {
        let load = load().prop_map(move |mut load| {
            load.config.fault = fault;
            load
        });
        let caught = runner(200).run(&load, |load| check(&alone, &load, &met));
        // A panic would be a failure, too, but no proof that wrong rows are noticed.
        let reason = caught.expect_err("the fault went unnoticed").to_string();
        assert!(reason.contains("assertion failed"), "{fault:?}: {reason}");
    }
}
