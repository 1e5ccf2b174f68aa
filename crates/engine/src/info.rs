//! What is being served: the facts that validation and the server need.

use std::sync::Arc;

use moetrail_routes::RowLayout;
use moetrail_text::Tokenizer;

use crate::replay::RoutingShape;
use crate::request::{GenerateRequest, SubmitError};

/// Facts about the loaded model and the engine's limits, fixed at start.
pub struct EngineInfo {
    /// The first name under `--served-model-name`, else the checkpoint as given.
    pub model_name: String,
    /// Further names that are answered to.
    pub model_aliases: Vec<String>,
    /// Prompt and completion tokens together, at most.
    pub max_model_len: usize,
    /// Sequences that run at once, at most; bounds `n` of a request.
    pub max_num_seqs: usize,
    /// Requests accepted and not finished, at most; one more is refused with 503.
    pub max_live_requests: usize,
    /// Alternatives per token that a request may ask for (`--max-logprobs`).
    pub max_logprobs: usize,
    /// Size of the logits.
    pub vocab_size: usize,
    /// The model's EOS tokens (config and generation config together).
    pub eos_token_ids: Vec<u32>,
    /// How the model routes; `None` if it is dense.
    pub routing: Option<RoutingShape>,
    /// Axis sizes and dtype of the rows; `None` if capture is off or the model is dense.
    pub row_layout: Option<RowLayout>,
    /// Whether every request gets rows that does not refuse them (`--enable-return-routed-experts`).
    pub return_routed_experts: bool,
    /// Number of blocks in the KV pool.
    pub num_blocks: usize,
    /// Tokens in a block.
    pub block_size: usize,
    /// The checkpoint's tokenizer; `None` if it has none, and only token ids are served.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// Unix time at which the model was loaded, in seconds.
    pub created: u64,
}

fn invalid(param: &'static str, message: String) -> SubmitError {
    SubmitError::Invalid { param, message }
}

impl EngineInfo {
    /// Checks everything about a request that depends on the model and the limits.
    ///
    /// # Errors
    /// [`SubmitError::Invalid`] naming the parameter and the offending value.
    pub fn check(&self, request: &GenerateRequest) -> Result<(), SubmitError> {
        let (prompt_len, sampling) = (request.prompt.len(), &request.sampling);
        if prompt_len == 0 {
            return Err(invalid("prompt", "the prompt has no tokens; give at least one".into()));
        }
        if let Some(id) = request.prompt.iter().find(|id| **id as usize >= self.vocab_size) {
            return Err(invalid(
                "prompt",
                format!("token id {id} is not below the vocabulary size {}", self.vocab_size),
            ));
        }
        if prompt_len > self.max_model_len {
            return Err(invalid(
                "prompt",
                format!("the prompt has {prompt_len} tokens, max_model_len is {}", self.max_model_len),
            ));
        }
        if prompt_len + sampling.max_tokens > self.max_model_len {
            return Err(invalid(
                "max_tokens",
                format!(
                    "max_tokens is {} and the prompt has {prompt_len} tokens: together over max_model_len {}",
                    sampling.max_tokens, self.max_model_len
                ),
            ));
        }
        // The last sampled token is never forwarded, so it needs no slot.
        let slots = prompt_len + sampling.max_tokens.saturating_sub(1);
        if slots.div_ceil(self.block_size) > self.num_blocks {
            return Err(invalid(
                "max_tokens",
                format!("{slots} KV slots are needed at most, the pool has {}", self.num_blocks * self.block_size),
            ));
        }
        if sampling.n > self.max_num_seqs {
            return Err(invalid("n", format!("n is {}, max_num_seqs is {}", sampling.n, self.max_num_seqs)));
        }
        for (param, asked) in [("logprobs", sampling.logprobs), ("prompt_logprobs", sampling.prompt_logprobs)] {
            if let Some(k) = asked.filter(|k| *k > self.max_logprobs) {
                return Err(invalid(param, format!("{param} is {k}, at most {} are given", self.max_logprobs)));
            }
        }
        self.check_token_ids(request)?;
        if let Some(start) = request.routed_experts_start {
            if self.row_layout.is_none() {
                return Err(invalid(
                    "return_routed_experts",
                    "routed experts were asked for, but this server does not capture them".into(),
                ));
            }
            if start > prompt_len {
                return Err(invalid(
                    "routed_experts_prompt_start",
                    format!(
                        "routed_experts_prompt_start must be between 0 and the prompt length ({prompt_len}), inclusive; it is {start}"
                    ),
                ));
            }
        }
        if let Some(replay) = &request.routed_experts_replay {
            let span = replay.span();
            if span.end > prompt_len {
                return Err(invalid(
                    "routed_experts_replay",
                    format!(
                        "routed_experts_replay has rows [{}, {}), the prompt has {prompt_len} tokens",
                        span.start, span.end
                    ),
                ));
            }
        }
        if self.tokenizer.is_none() && !sampling.stop.is_empty() {
            return Err(invalid("stop", "stop strings need a tokenizer, and the checkpoint has none".into()));
        }
        Ok(())
    }

    /// Checks the token ids named by sampling settings against the vocabulary.
    fn check_token_ids(&self, request: &GenerateRequest) -> Result<(), SubmitError> {
        let sampling = &request.sampling;
        let beyond = |id: &u32| *id as usize >= self.vocab_size;
        let refuse = |param, id: u32| {
            Err(invalid(param, format!("{param} names token id {id}, the vocabulary size is {}", self.vocab_size)))
        };
        if let Some((id, _)) = sampling.logit_bias.iter().find(|(id, _)| beyond(id)) {
            return refuse("logit_bias", *id);
        }
        if let Some(id) = sampling.stop_token_ids.iter().find(|id| beyond(id)) {
            return refuse("stop_token_ids", *id);
        }
        match &sampling.allowed_token_ids {
            Some(ids) if ids.is_empty() => {
                Err(invalid("allowed_token_ids", "allowed_token_ids is empty: nothing could be sampled".into()))
            }
            Some(ids) => ids.iter().find(|id| beyond(id)).map_or(Ok(()), |id| refuse("allowed_token_ids", *id)),
            None => Ok(()),
        }
    }
}
