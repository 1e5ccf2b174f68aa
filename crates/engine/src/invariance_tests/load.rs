//! Random requests, when they come, and what happens beside them.

use proptest::prelude::*;

use super::folder;
use crate::{EngineConfig, EngineHandle, GenerateRequest, PauseMode, ReprefillRouting, SamplingParams};

pub(super) const MODELS: [&str; 4] = ["qwen3_moe-a", "qwen3_moe-b", "olmoe-b", "mixtral-b"];

/// A request and when it comes.
#[derive(Debug, Clone)]
pub(super) struct Arrival {
    pub(super) request: GenerateRequest,
    /// After so many events of the request before it.
    pub(super) after_events: usize,
    /// The next turn of the request before it: that prompt, what its last choice said, then this prompt.
    pub(super) next_turn: bool,
    /// What an operator does just before.
    pub(super) order: Option<Order>,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Order {
    Reset,
    /// To the same weights under another version.
    UpdateWeights,
    /// `keep`, with or without a reset, and resume.
    Pause {
        clear_cache: bool,
    },
}

impl Order {
    pub(super) fn carry_out(self, handle: &EngineHandle, model: &str) {
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
    pub(super) model: &'static str,
    pub(super) arrivals: Vec<Arrival>,
    pub(super) spare_blocks: usize,
    pub(super) config: EngineConfig,
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
