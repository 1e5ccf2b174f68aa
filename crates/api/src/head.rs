//! What every answer to a request repeats.

use std::sync::Arc;

use moetrail_engine::{FinishReason, StopReason};
use moetrail_text::Tokenizer;
use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::logprobs::id_name;
use crate::rows_reply::RowsWriter;
use crate::stream_options::Streaming;
use crate::usage::Usage;

/// What is known about an answer before anything is generated.
pub(crate) struct Head {
    pub(crate) id: String,
    /// Unix time in seconds.
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) tokenizer: Option<Arc<Tokenizer>>,
    pub(crate) streaming: Streaming,
    pub(crate) rows: RowsWriter,
    pub(crate) prompts: Vec<Arc<[u32]>>,
    /// Choices of each prompt.
    pub(crate) n: usize,
    pub(crate) with_logprobs: bool,
    pub(crate) return_token_ids: bool,
    pub(crate) tokens_as_ids: bool,
    pub(crate) kv_transfer_params: Option<Value>,
}

impl Head {
    /// The text of a token, or its id where that is asked for or there is no tokenizer.
    pub(crate) fn token_name(&self, id: u32) -> String {
        match &self.tokenizer {
            Some(tokenizer) if !self.tokens_as_ids => tokenizer.decode_one(id),
            _ => id_name(id),
        }
    }

    /// The text of a token, empty without a tokenizer.
    pub(crate) fn decoded(&self, id: u32) -> String {
        self.tokenizer.as_ref().map(|tokenizer| tokenizer.decode_one(id)).unwrap_or_default()
    }

    /// Token ids of a prompt, if they are asked for.
    pub(crate) fn prompt_token_ids(&self, prompt: usize) -> Option<Vec<u32>> {
        self.prompts.get(prompt).filter(|_| self.return_token_ids).map(|ids| ids.to_vec())
    }

    pub(crate) fn usage(&self, completion_tokens: usize, cached_tokens: usize) -> Usage {
        Usage::new(self.prompts.iter().map(|prompt| prompt.len()).sum(), completion_tokens, cached_tokens)
    }
}

/// `finish_reason`, which `serde` writes by its name on the wire.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FinishName(pub(crate) FinishReason);

impl Serialize for FinishName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.0.as_str())
    }
}

/// `stop_reason`: the id of a stop token, or a stop string.
#[derive(Debug, Clone)]
pub(crate) struct StopName(pub(crate) StopReason);

impl Serialize for StopName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.0 {
            StopReason::Token(id) => serializer.serialize_u32(*id),
            StopReason::Text(text) => serializer.serialize_str(text),
        }
    }
}

/// Counts the tokens of a streamed answer.
#[derive(Debug, Default)]
pub(crate) struct StreamCounts {
    /// By prompt-major choice number.
    completion: Vec<usize>,
    cached: Vec<usize>,
}

impl StreamCounts {
    pub(crate) fn new(head: &Head) -> Self {
        Self { completion: vec![0; head.prompts.len() * head.n], cached: vec![0; head.prompts.len()] }
    }

    pub(crate) fn add_cached(&mut self, prompt: usize, cached_tokens: usize) {
        self.cached[prompt] = cached_tokens;
    }

    /// Adds tokens of a choice.
    pub(crate) fn add(&mut self, choice: usize, tokens: usize) {
        self.completion[choice] += tokens;
    }

    /// Usage of one choice so far, for chunks that carry it.
    pub(crate) fn so_far(&self, head: &Head, prompt: usize, choice: usize) -> Option<Usage> {
        let counts = Usage::new(head.prompts[prompt].len(), self.completion[choice], self.cached[prompt]);
        head.streaming.continuous_usage.then_some(counts)
    }

    /// Usage of the whole answer, for the last chunk.
    pub(crate) fn total(&self, head: &Head) -> Option<Usage> {
        let counts = head.usage(self.completion.iter().sum(), self.cached.iter().sum());
        head.streaming.include_usage.then_some(counts)
    }
}
