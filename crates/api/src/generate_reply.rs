//! `/inference/v1/generate`: writing the answer.

use moetrail_engine::{ChoiceDelta, Event, Finish, PromptOutput, TokenLogprobs};
use moetrail_routes::ExpertRows;
use serde::Serialize;
use serde_json::Value;

use crate::accept::Reply;
use crate::body::write_with;
use crate::error::ApiError;
use crate::head::{FinishName, Head, StopName, StreamCounts};
use crate::logprobs::{ContentLogprobs, PromptLogprobs};
use crate::output::RequestOutput;
use crate::replay::ReplayStatsReply;
use crate::rows_reply::{NvextReply, Payloads, RowsReply, end};
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
    nvext: Option<NvextReply>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    routed_experts_replay_stats: Option<ReplayStatsReply>,
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
        &mut self,
        index: usize,
        (token_ids, text, logprobs): (Vec<u32>, String, Vec<TokenLogprobs>),
        rows: Option<ExpertRows>,
        finish: Option<Finish>,
        payloads: &mut Payloads,
    ) -> Choice {
        let (finish, rows) = end(&mut self.head.rows, index, finish, rows, payloads);
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
    fn write(&self, choices: Vec<Choice>, payloads: &Payloads, usage: Option<Usage>, with_prompt: bool) -> Vec<u8> {
        let stats = ReplayStatsReply::sum(std::iter::once(self.prompt.replay_stats.filter(|_| with_prompt)));
        let in_nvext = |choice: &Choice| choice.rows.as_ref()?.in_nvext(self.head.rows.format);
        let body = Body {
            request_id: &self.head.id,
            output_mode: self.mode,
            model: &self.head.model,
            created: self.head.created,
            nvext: choices.iter().find_map(in_nvext),
            choices,
            usage,
            routed_experts_replay_stats: stats,
            prompt_logprobs: PromptLogprobs::list(
                &self.head,
                self.prompt.prompt_logprobs.as_ref().filter(|_| with_prompt),
            ),
            prompt_token_ids: if with_prompt { self.head.prompt_token_ids(0) } else { None },
            kv_transfer_params: self.head.kv_transfer_params.as_ref().filter(|_| !self.head.streaming.enabled),
        };
        write_with(&body, payloads)
    }

    fn delta(&mut self, delta: ChoiceDelta) -> Vec<u8> {
        self.counts.add(delta.index, delta.token_ids.len());
        let mut payloads = Payloads::default();
        let content = (delta.token_ids, delta.text, delta.logprobs);
        let choice = self.choice(delta.index, content, delta.routed_experts, delta.finish, &mut payloads);
        let usage = self.counts.so_far(&self.head, 0, delta.index);
        let first = !std::mem::replace(&mut self.any_sent, true);
        self.write(vec![choice], &payloads, usage, first)
    }
}

impl Reply for GenerateReply {
    fn body(&mut self, outputs: Vec<RequestOutput>) -> Vec<u8> {
        let Some(output) = outputs.into_iter().next() else { return Vec::new() };
        let usage = self.head.usage(output.completion_tokens(), output.prompt.cached_tokens);
        self.prompt = output.prompt;
        let mut payloads = Payloads::default();
        let choices = output.choices.into_iter().enumerate().map(|(index, choice)| {
            let content = (choice.token_ids, choice.text, choice.logprobs);
            self.choice(index, content, None, choice.finish, &mut payloads)
        });
        let choices = choices.collect();
        self.write(choices, &payloads, Some(usage), true)
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
        let last = |usage| self.write(Vec::new(), &Payloads::default(), Some(usage), false);
        self.counts.total(&self.head).map(last).into_iter().collect()
    }
}
