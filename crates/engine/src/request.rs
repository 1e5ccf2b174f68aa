//! What the server asks of the engine, and what comes back.

use std::sync::Arc;

use moetrail_routes::{ExpertRows, TokenSpan};

use crate::replay::ReplayRows;
use crate::sampling::SamplingParams;

/// One prompt to continue, validated and tokenized.
#[derive(Debug, Clone, Default)]
pub struct GenerateRequest {
    /// What clients may call it by to abort it; two requests may share a name.
    pub names: Vec<String>,
    /// Prompt token ids, at least one, each below the vocabulary size.
    pub prompt: Arc<[u32]>,
    /// How to continue it.
    pub sampling: SamplingParams,
    /// Lower runs first, as in vLLM.
    pub priority: i32,
    /// Separates the prefix cache of this request from that of others.
    pub cache_salt: Option<String>,
    /// First absolute position whose row is returned; `None` returns no rows and drains no byte.
    pub routed_experts_start: Option<usize>,
    /// Whether each delta carries the rows that it adds, instead of the end carrying all of them.
    pub routed_experts_delta: bool,
    /// Experts that are used in place of the router's choice.
    pub routed_experts_replay: Option<Arc<ReplayRows>>,
}

/// Something that happened to a request, in the order in which it happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// The prompt has been computed; sent once, before any choice.
    Prompt(PromptOutput),
    /// One choice advanced (one token, or its end).
    Choice(ChoiceDelta),
    /// The whole request failed; nothing follows.
    Failed(RequestError),
}

/// What is known once the prompt has been forwarded.
#[derive(Debug, Clone, Default)]
pub struct PromptOutput {
    /// Prompt tokens whose KV came from the prefix cache at first admission.
    pub cached_tokens: usize,
    /// One entry per prompt position, the first `None`; only if asked for.
    pub prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
    /// What the free router would have changed; only if routing was replayed.
    pub replay_stats: Option<ReplayStats>,
}

/// Given routing against the router's own choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReplayStats {
    /// Positions replayed.
    pub rows: usize,
    /// `rows * moe_layers`: the (layer, token) cells replayed.
    pub cells: usize,
    /// Cells for which the free router would have chosen another set of experts.
    pub cells_changed: usize,
}

/// News of one choice.
#[derive(Debug, Clone)]
pub struct ChoiceDelta {
    /// Which choice, `0..n`.
    pub index: usize,
    /// New token ids (empty on an end without a token).
    pub token_ids: Vec<u32>,
    /// Text that became final; stop strings already cut. Empty if `detokenize` is off.
    pub text: String,
    /// One entry per new token, if asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// The rows that became known since the delta before, where the request asks for rows in deltas; those of the
    /// last delta are in `finish`.
    pub routed_experts: Option<ExpertRows>,
    /// Set on the last delta of the choice.
    pub finish: Option<Finish>,
}

/// The log-probabilities at one position, f32 log-softmax of the raw logits.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// The token at this position (sampled, or of the prompt).
    pub token_id: u32,
    /// Its log-probability.
    pub logprob: f32,
    /// Its rank among all tokens, 1 for the most likely.
    pub rank: u32,
    /// The most likely tokens, best first, as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

/// How a choice ended.
#[derive(Debug, Clone)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// Which stop token or string, where one did; `None` for EOS, as in vLLM.
    pub stop_reason: Option<StopReason>,
    /// The rows, if they were asked for: all of them, or those since the delta before.
    pub routed_experts: Option<Result<ExpertRows, RowsError>>,
    /// Where computed state was dropped under the choice (weights updated, cache reset): which weights computed which
    /// rows. The positions after the last span, and those before the first, have no row in the reply.
    pub recomputed: Option<Vec<WeightVersionSpan>>,
}

/// Rows that were computed under one version of the weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightVersionSpan {
    /// The version.
    pub version: Arc<str>,
    /// Absolute positions.
    pub span: TokenSpan,
}

/// Why a choice ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// EOS, a stop token or a stop string.
    Stop,
    /// `max_tokens` reached.
    Length,
    /// Cancelled by the client or the server.
    Abort,
}

impl FinishReason {
    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
        }
    }
}

/// What stopped a choice, where it was not EOS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopReason {
    /// A token of `stop_token_ids`.
    Token(u32),
    /// A string of `stop`.
    Text(String),
}

/// Why a choice lost its rows; its tokens are still returned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RowsError {
    /// A short stable name, such as `generation_mismatch`.
    pub code: &'static str,
    /// What happened, with the offending values.
    pub message: String,
}

/// Why a request failed after it was accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The model produced NaN for this request's tokens.
    #[error("the model produced NaN {place} at position {position}")]
    NotANumber {
        /// Where: "router logits" or "logits".
        place: &'static str,
        /// Absolute position of the token.
        position: usize,
    },
    /// The engine could not go on with this request.
    #[error("{0}")]
    Engine(String),
}

/// Why the engine did not take a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// A value is out of range; `param` names it as vLLM spells it.
    #[error("{message}")]
    Invalid {
        /// Name of the offending parameter.
        param: &'static str,
        /// What is wrong, with the value.
        message: String,
    },
    /// The waiting queue is full; try again later.
    #[error("the server is at its limit of {limit} waiting requests; try again later")]
    Full {
        /// The limit that was reached.
        limit: usize,
    },
    /// The engine is paused and takes no request until it is resumed.
    #[error("the engine is paused; try again after it was resumed")]
    Paused,
    /// The engine is shutting down or has stopped.
    #[error("the engine is shutting down")]
    Closed,
}
