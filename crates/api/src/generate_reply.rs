//! `/inference/v1/generate`: writing the answer.

use moetrail_engine::{ChoiceDelta, Event, Finish, PromptOutput, TokenLogprobs};
use serde::Serialize;
use serde_json::Value;

use crate::accept::Reply;
use crate::body::write;
use crate::error::ApiError;
use crate::head::{FinishName, Head, StopName, StreamCounts};
use crate::logprobs::{ContentLogprobs, PromptLogprobs};
use crate::output::RequestOutput;
use crate::rows::RowsReply;
use crate::usage::Usage;

/// `output_mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum OutputMode {
    /// Token ids alone.
    Tokens,
    /// Token ids and text.
    Text,
}

impl OutputMode {
    pub(crate) fn parse(name: &str) -> Result<Self, ApiError> {
        match name {
            "tokens" => Ok(Self::Tokens),
            "text" => Ok(Self::Text),
            other => {
                let message = format!("output_mode {other:?} is not supported; use \"tokens\" or \"text\"");
                Err(ApiError::invalid("output_mode", message))
            }
        }
    }
}

/// `choices` comes before everything that repeats what the client sent: the first `"routed_experts":{"data":"` of the
/// body must be that of `choices[0]`.
#[derive(Serialize)]
struct Body<'a> {
    request_id: &'a str,
    output_mode: OutputMode,
    model: &'a str,
    created: u64,
    choices: Vec<Choice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Vec<PromptLogprobs>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_transfer_params: Option<&'a Value>,
}

#[derive(Serialize)]
struct Choice {
    index: usize,
    finish_reason: Option<FinishName>,
    stop_reason: Option<StopName>,
    token_ids: Vec<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    logprobs: Option<ContentLogprobs>,
    #[serde(flatten)]
    rows: Option<RowsReply>,
}

/// Writes tokens.
pub(crate) struct GenerateReply {
    head: Head,
    mode: OutputMode,
    counts: StreamCounts,
    prompt: PromptOutput,
    any_sent: bool,
}

impl GenerateReply {
    pub(crate) fn new(head: Head, mode: OutputMode) -> Self {
        let counts = StreamCounts::new(&head);
        Self { head, mode, counts, prompt: PromptOutput::default(), any_sent: false }
    }

    fn choice(
        &self,
        index: usize,
        (token_ids, text, logprobs): (Vec<u32>, String, Vec<TokenLogprobs>),
        finish: Option<Finish>,
        rows: Option<RowsReply>,
    ) -> Choice {
        Choice {
            index,
            finish_reason: finish.as_ref().map(|finish| FinishName(finish.reason)),
            stop_reason: finish.and_then(|finish| finish.stop_reason).map(StopName),
            token_ids,
            text: (self.mode == OutputMode::Text).then_some(text),
            logprobs: self.head.with_logprobs.then(|| ContentLogprobs::by_id(&logprobs)),
            rows,
        }
    }

    /// A body or a chunk; `with_prompt` adds what belongs to the prompt.
    fn write(&self, choices: Vec<Choice>, usage: Option<Usage>, with_prompt: bool) -> Vec<u8> {
        let body = Body {
            request_id: &self.head.id,
            output_mode: self.mode,
            model: &self.head.model,
            created: self.head.created,
            choices,
            usage,
            prompt_logprobs: PromptLogprobs::list(
                &self.head,
                self.prompt.prompt_logprobs.as_ref().filter(|_| with_prompt),
            ),
            prompt_token_ids: if with_prompt { self.head.prompt_token_ids(0) } else { None },
            kv_transfer_params: self.head.kv_transfer_params.as_ref().filter(|_| !self.head.streaming.enabled),
        };
        write(&body)
    }

    fn delta(&mut self, delta: ChoiceDelta) -> Vec<u8> {
        self.counts.add(delta.index, delta.token_ids.len());
        let finish = delta.finish;
        let rows = finish.as_ref().map(|finish| RowsReply::new(finish.routed_experts.as_ref(), self.head.rows_format));
        let choice = self.choice(delta.index, (delta.token_ids, delta.text, delta.logprobs), finish, rows);
        let usage = self.counts.so_far(&self.head, 0, delta.index);
        let first = !std::mem::replace(&mut self.any_sent, true);
        self.write(vec![choice], usage, first)
    }
}

impl Reply for GenerateReply {
    fn body(&mut self, outputs: Vec<RequestOutput>) -> Vec<u8> {
        let Some(output) = outputs.into_iter().next() else { return Vec::new() };
        let usage = self.head.usage(output.completion_tokens(), output.prompt.cached_tokens);
        let rows = output.choices.iter().map(|choice| choice.finish.as_ref()?.routed_experts.as_ref());
        let rows = RowsReply::all(rows, self.head.rows_format);
        self.prompt = output.prompt;
        let choices = output.choices.into_iter().zip(rows).enumerate().map(|(index, (choice, rows))| {
            self.choice(index, (choice.token_ids, choice.text, choice.logprobs), choice.finish, Some(rows))
        });
        self.write(choices.collect(), Some(usage), true)
    }

    fn chunks(&mut self, _prompt: usize, event: Event) -> Vec<Vec<u8>> {
        match event {
            Event::Prompt(given) => {
                self.counts.add_cached(0, given.cached_tokens);
                self.prompt = given;
                Vec::new()
            }
            Event::Choice(delta) => vec![self.delta(delta)],
            Event::Failed(_) => Vec::new(),
        }
    }

    fn closing_chunks(&mut self) -> Vec<Vec<u8>> {
        self.counts.total(&self.head).map(|usage| self.write(Vec::new(), Some(usage), false)).into_iter().collect()
    }
}
