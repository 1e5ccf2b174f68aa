//! What the command line decides about the engine.

/// How experts are chosen for positions that are computed again after a preemption.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReprefillRouting {
    /// By the router, as the first time.
    Recompute,
    /// As they were the first time, so that the rebuilt KV follows the routing under which the tokens were sampled.
    Replay,
}

/// Settings of an engine; `Default` gives the command line's defaults.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineConfig {
    /// Names that requests may use; the first is the one reported.
    pub served_model_names: Vec<String>,
    /// Prompt and completion together, at most; `None` takes the model's.
    pub max_model_len: Option<usize>,
    /// Sequences that run at once, at most.
    pub max_num_seqs: usize,
    /// Tokens in a step, at most.
    pub max_num_batched_tokens: usize,
    /// Tokens in a KV block.
    pub block_size: usize,
    /// Blocks in the KV pool; `None` sizes it from free memory.
    pub num_blocks: Option<usize>,
    /// Share of a GPU's memory for weights, KV cache and all else, where `num_blocks` does not decide.
    pub gpu_memory_utilization: f64,
    /// Whether full blocks are kept for later prompts.
    pub enable_prefix_caching: bool,
    /// Bytes of host memory for the KV of preempted sequences and of evicted prefixes; 0 is none. For a GPU it is pinned,
    /// and taken at once.
    pub swap_space: usize,
    /// How experts are chosen for positions that are computed again after a preemption.
    pub reprefill_routing: ReprefillRouting,
    /// Whether rows computed again are compared with the first ones, and counted.
    pub verify_reprefill: bool,
    /// Whether selections are counted by layer and expert.
    pub expert_load_metrics: bool,
    /// Whether routing is captured.
    pub capture: bool,
    /// Whether every request gets rows that does not refuse them.
    pub return_routed_experts: bool,
    /// Requests that may wait beyond those that run; one more gets 503.
    pub max_queued_requests: usize,
    /// Alternatives per token that a request may ask for.
    pub max_logprobs: usize,
    /// Seed of requests that name none; `None` draws one.
    pub seed: Option<u64>,
    /// A planted fault.
    #[cfg(test)]
    pub(crate) fault: crate::fault::Fault,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            served_model_names: Vec::new(),
            max_model_len: None,
            max_num_seqs: 256,
            max_num_batched_tokens: 2048,
            block_size: 16,
            num_blocks: None,
            gpu_memory_utilization: 0.9,
            enable_prefix_caching: true,
            swap_space: 0,
            reprefill_routing: ReprefillRouting::Recompute,
            verify_reprefill: false,
            expert_load_metrics: false,
            capture: true,
            return_routed_experts: false,
            max_queued_requests: 4096,
            max_logprobs: 20,
            seed: None,
            #[cfg(test)]
            fault: crate::fault::Fault::None,
        }
    }
}
