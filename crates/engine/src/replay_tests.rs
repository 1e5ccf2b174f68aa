//! Replay in: given routing takes the place of the router's, and comes back as it was given.

use std::path::Path;
use std::sync::Arc;

use moetrail_models::{Checkpoint, DtypeChoice};
use moetrail_routes::ExpertRows;

use crate::{
    Engine, EngineConfig, EngineHandle, Event, GenerateRequest, ReplayRows, ReplayStats, ReprefillRouting,
    SamplingParams,
};

/// The second one has a dense layer.
const MODELS: [&str; 4] = ["qwen3_moe-a", "qwen3_moe-b", "olmoe-b", "mixtral-b"];

fn start(model: &str, config: EngineConfig) -> Engine {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(model);
    let checkpoint = Checkpoint::open_folder(&folder, model).expect("the golden checkpoint opens");
    let decoder = checkpoint.load(DtypeChoice::Auto, false).expect("the golden checkpoint loads");
    Engine::start(decoder, None, checkpoint.eos_token_ids(), config).expect("the engine starts")
}

#[derive(Debug, Clone, PartialEq, Default)]
struct Seen {
    tokens: Vec<u32>,
    /// Bits of the log-probabilities.
    logprobs: Vec<u32>,
    prompt_logprobs: Vec<u32>,
    rows: Option<ExpertRows>,
    stats: Option<ReplayStats>,
}

fn run(handle: &EngineHandle, request: GenerateRequest) -> Seen {
    let (mut stream, mut seen) = (handle.submit(request).expect("the request is valid"), Seen::default());
    while let Some(event) = stream.blocking_next() {
        match event {
            Event::Prompt(prompt) => {
                let entries = prompt.prompt_logprobs.unwrap_or_default();
                seen.prompt_logprobs = entries.iter().flatten().map(|entry| entry.logprob.to_bits()).collect();
                seen.stats = prompt.replay_stats;
            }
            Event::Choice(delta) => {
                seen.tokens.extend(delta.token_ids);
                seen.logprobs.extend(delta.logprobs.iter().map(|entry| entry.logprob.to_bits()));
                seen.rows = delta.finish.and_then(|finish| finish.routed_experts?.ok()).or(seen.rows);
            }
            Event::Failed(error) => panic!("{error}"),
        }
    }
    seen
}

/// Sampled, with the log-probabilities under which it was sampled.
fn rollout(length: u32) -> GenerateRequest {
    GenerateRequest {
        prompt: (0..length).map(|i| 3 + (i * i * 7 + i * 13) % 300).collect(),
        sampling: SamplingParams {
            max_tokens: 40,
            temperature: 1.0,
            seed: Some(u64::from(length)),
            ignore_eos: true,
            logprobs: Some(0),
            detokenize: false,
            ..SamplingParams::default()
        },
        routed_experts_start: Some(0),
        ..GenerateRequest::default()
    }
}

/// What a trainer asks: the log-probabilities of given tokens under given routing.
fn recompute(handle: &EngineHandle, tokens: &[u32], rows: &ExpertRows) -> GenerateRequest {
    let shape = handle.info().routing.as_ref().expect("the model routes");
    GenerateRequest {
        prompt: tokens.into(),
        sampling: SamplingParams { max_tokens: 0, prompt_logprobs: Some(0), ..rollout(1).sampling },
        routed_experts_start: Some(0),
        routed_experts_replay: Some(Arc::new(ReplayRows::new(rows, shape).expect("valid rows"))),
        ..GenerateRequest::default()
    }
}

/// Every row moved to the position before, the first one to the last.
fn shifted(rows: &ExpertRows) -> ExpertRows {
    let mut data = rows.data().to_vec();
    data.rotate_left(rows.layout().row_bytes());
    ExpertRows::new(rows.start(), rows.layout(), data).expect("whole rows")
}

#[test]
fn log_probabilities_under_ones_own_routing_are_those_of_the_sampling() {
    for model in MODELS {
        let engine = start(model, EngineConfig { num_blocks: Some(64), ..EngineConfig::default() });
        let handle = engine.handle();
        let request = rollout(30);
        let sampled = run(&handle, request.clone());
        let rows = sampled.rows.clone().expect("rows");
        let tokens = [&request.prompt, &sampled.tokens[..]].concat();

        let again = run(&handle, recompute(&handle, &tokens, &rows));
        assert_eq!(again.prompt_logprobs[29..], sampled.logprobs, "{model}");
        let shape = handle.info().routing.clone().expect("the model routes");
        let cells = rows.num_rows() * shape.moe_layers.len();
        assert_eq!(again.stats, Some(ReplayStats { rows: rows.num_rows(), cells, cells_changed: 0 }));
        // With no completion, the last prompt token has a row, too: a free one.
        let row_bytes = rows.layout().row_bytes();
        let returned = again.rows.expect("rows");
        assert_eq!(returned.num_rows(), rows.num_rows() + 1);
        assert_eq!(returned.data()[..rows.data().len()], *rows.data());

        let wrong = shifted(&rows);
        let forced = run(&handle, recompute(&handle, &tokens, &wrong));
        assert_ne!(forced.prompt_logprobs[29..], sampled.logprobs, "{model}: the rows do not matter");
        assert_eq!(forced.rows.expect("rows").data()[..rows.data().len()], *wrong.data());
        let stats = forced.stats.expect("stats");
        assert!(stats.cells_changed > cells / 10 && stats.cells_changed <= cells, "{stats:?}");
        // Dense cells mean nothing.
        let mut odd = wrong.data().to_vec();
        for row in odd.chunks_exact_mut(row_bytes) {
            let width = row_bytes / shape.num_layers;
            let dense = (0..shape.num_layers).filter(|layer| !shape.moe_layers.contains(layer));
            dense.for_each(|layer| row[layer * width..(layer + 1) * width].fill(u8::MAX));
        }
        let odd = ExpertRows::new(0, rows.layout(), odd).expect("whole rows");
        assert_eq!(run(&handle, recompute(&handle, &tokens, &odd)).prompt_logprobs, forced.prompt_logprobs);

        // What was forced is in nobody else's cache, and the other way round.
        let free = run(&handle, request.clone());
        assert_eq!((free.tokens, free.logprobs), (sampled.tokens, sampled.logprobs));
        assert_eq!(run(&handle, recompute(&handle, &tokens, &wrong)).prompt_logprobs, forced.prompt_logprobs);
        engine.shutdown();
    }
}

/// Replayed and free requests at once, on a pool that is too small for them.
#[test]
fn replay_survives_preemption_and_swap() {
    let roomy = start("qwen3_moe-b", EngineConfig { num_blocks: Some(256), ..EngineConfig::default() });
    let mut requests: Vec<GenerateRequest> = Vec::new();
    for length in 20..32 {
        let free = rollout(length);
        let rows = run(&roomy.handle(), free.clone()).rows.expect("rows");
        // A continuation from a prompt that is routed wrongly on purpose, with all or some of its rows given.
        let keep = rows.layout().row_bytes() * (length as usize - length as usize % 3 * 4);
        let rows = ExpertRows::new(0, rows.layout(), shifted(&rows).data()[..keep].to_vec()).expect("whole rows");
        let routed_experts_replay = recompute(&roomy.handle(), &free.prompt, &rows).routed_experts_replay;
        requests.push(GenerateRequest { routed_experts_replay, ..free.clone() });
        requests.push(free);
    }
    let expect: Vec<Seen> = requests.iter().map(|request| run(&roomy.handle(), request.clone())).collect();
    for (swap_space, reprefill_routing) in [
        (0, ReprefillRouting::Recompute),
        (0, ReprefillRouting::Replay),
        (1 << 20, ReprefillRouting::Recompute),
        (1 << 15, ReprefillRouting::Replay),
    ] {
        let config = EngineConfig {
            num_blocks: Some(24),
            block_size: 4,
            max_num_batched_tokens: 24,
            swap_space,
            reprefill_routing,
            verify_reprefill: true,
            ..EngineConfig::default()
        };
        let engine = start("qwen3_moe-b", config);
        let found: Vec<Seen> = std::thread::scope(|scope| {
            let start = |request: &GenerateRequest| {
                let (handle, request) = (engine.handle(), request.clone());
                scope.spawn(move || run(&handle, request))
            };
            let running: Vec<_> = requests.iter().map(start).collect();
            running.into_iter().map(|handle| handle.join().expect("the request ends")).collect()
        });
        assert!(found == expect, "{swap_space} {reprefill_routing:?}");
        let text = engine.handle().stats().encode();
        let value = |name: &str| -> u64 {
            let line = text.lines().find(|line| line.starts_with(name)).expect(name);
            line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number")
        };
        assert!(value("vllm:num_preemptions_total") > 10);
        let stats =
            |pick: fn(&ReplayStats) -> usize| expect.iter().filter_map(|seen| seen.stats.as_ref()).map(pick).sum();
        let (rows, changed): (usize, usize) = (stats(|stats| stats.rows), stats(|stats| stats.cells_changed));
        assert_eq!(value("moetrail_routed_experts_replay_rows_total"), rows as u64);
        assert_eq!(value("moetrail_routed_experts_replay_cells_changed_total"), changed as u64);
        assert_eq!(value("moetrail_routed_experts_reprefill_rows_differing_total"), 0);
        engine.shutdown();
    }
    roomy.shutdown();
}
