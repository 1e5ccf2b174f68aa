//! `/v1/chat/completions`: writing the answer.

use moetrail_engine::{ChoiceDelta, Event, PromptOutput};
use serde::Serialize;
use serde_json::Value;

use crate::accept::Reply;
use crate::body::{write, write_with};
use crate::head::{FinishName, Head, StopName, StreamCounts};
use crate::logprobs::{ContentLogprobs, PromptLogprobs};
use crate::output::RequestOutput;
use crate::replay::ReplayStatsReply;
use crate::rows_reply::{NvextReply, PayloadRef, Payloads, RowsReply, end};
use crate::usage::Usage;

#[derive(Serialize)]
struct Body<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
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
    #[serde(flatten)]
    said: Said,
    logprobs: Option<ContentLogprobs>,
    finish_reason: Option<FinishName>,
    stop_reason: Option<StopName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(flatten)]
    rows: Option<RowsReply>,
}

/// A whole message, or what it grew by.
#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum Said {
    Message(Message),
    Delta(Message),
}

#[derive(Serialize)]
struct Message {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    content: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    routed_experts: Option<PayloadRef>,
}

/// Writes chat completions.
pub(crate) struct ChatReply {
    head: Head,
    counts: StreamCounts,
    /// Which choices have sent their role.
    begun: Vec<bool>,
    /// What the prompt gave, until the first chunk has sent it.
    prompt: Option<PromptOutput>,
    any_sent: bool,
}

impl ChatReply {
    pub(crate) fn new(mut head: Head) -> Self {
        head.rows.has_message = true;
        let counts = StreamCounts::new(&head);
        let begun = vec![false; head.n];
        Self { head, counts, begun, prompt: None, any_sent: false }
    }

    fn body_with<'a>(&'a self, object: &'static str, choices: Vec<Choice>, usage: Option<Usage>) -> Body<'a> {
        Body {
            id: &self.head.id,
            object,
            created: self.head.created,
            model: &self.head.model,
            nvext: choices.iter().find_map(|choice| choice.rows.as_ref()?.in_nvext(self.head.rows.format)),
            choices,
            usage,
            routed_experts_replay_stats: None,
            prompt_logprobs: None,
            prompt_token_ids: None,
            kv_transfer_params: None,
        }
    }

    fn logprobs(&self, entries: &[moetrail_engine::TokenLogprobs]) -> Option<ContentLogprobs> {
        self.head.with_logprobs.then(|| ContentLogprobs::by_text(&self.head, entries))
    }

    /// One chunk with one choice; the first of all carries what belongs to the prompt.
    fn chunk(&mut self, choice: Choice, payloads: &Payloads) -> Vec<u8> {
        let usage = self.counts.so_far(&self.head, 0, choice.index);
        let prompt = self.prompt.take();
        let mut body = self.body_with("chat.completion.chunk", vec![choice], usage);
        if !self.any_sent {
            let given = prompt.as_ref().and_then(|prompt| prompt.prompt_logprobs.as_ref());
            body.prompt_logprobs = PromptLogprobs::list(&self.head, given);
            body.prompt_token_ids = self.head.prompt_token_ids(0);
            let stats = prompt.as_ref().and_then(|prompt| prompt.replay_stats);
            body.routed_experts_replay_stats = ReplayStatsReply::sum(std::iter::once(stats));
        }
        let bytes = write_with(&body, payloads);
        self.any_sent = true;
        bytes
    }

    fn delta(&mut self, delta: ChoiceDelta) -> Vec<Vec<u8>> {
        let index = delta.index;
        self.counts.add(index, delta.token_ids.len());
        let mut chunks = Vec::new();
        if !std::mem::replace(&mut self.begun[index], true) {
            let said = Message { role: Some("assistant"), content: String::new(), routed_experts: None };
            let choice = Choice {
                index,
                said: Said::Delta(said),
                logprobs: None,
                finish_reason: None,
                stop_reason: None,
                token_ids: None,
                rows: None,
            };
            chunks.push(self.chunk(choice, &Payloads::default()));
        }
        let mut payloads = Payloads::default();
        let (finish, rows) = end(&mut self.head.rows, index, delta.finish, delta.routed_experts, &mut payloads);
        let routed_experts = rows.as_ref().and_then(|rows| rows.in_message(self.head.rows.format));
        let choice = Choice {
            index,
            said: Said::Delta(Message { role: None, content: delta.text, routed_experts }),
            logprobs: self.logprobs(&delta.logprobs),
            finish_reason: finish.as_ref().map(|finish| FinishName(finish.reason)),
            token_ids: self.head.return_token_ids.then_some(delta.token_ids),
            rows,
            stop_reason: finish.and_then(|finish| finish.stop_reason).map(StopName),
        };
        chunks.push(self.chunk(choice, &payloads));
        chunks
    }
}

impl Reply for ChatReply {
    fn body(&mut self, outputs: Vec<RequestOutput>) -> Vec<u8> {
        let Some(output) = outputs.into_iter().next() else { return Vec::new() };
        let usage = self.head.usage(output.completion_tokens(), output.prompt.cached_tokens);
        let mut payloads = Payloads::default();
        let choices = output.choices.into_iter().enumerate().map(|(index, choice)| {
            let (finish, rows) = end(&mut self.head.rows, index, choice.finish, None, &mut payloads);
            let routed_experts = rows.as_ref().and_then(|rows| rows.in_message(self.head.rows.format));
            Choice {
                index,
                said: Said::Message(Message { role: Some("assistant"), content: choice.text, routed_experts }),
                logprobs: self.logprobs(&choice.logprobs),
                finish_reason: finish.as_ref().map(|finish| FinishName(finish.reason)),
                stop_reason: finish.and_then(|finish| finish.stop_reason).map(StopName),
                token_ids: self.head.return_token_ids.then_some(choice.token_ids),
                rows,
            }
        });
        let choices = choices.collect();
        let mut body = self.body_with("chat.completion", choices, Some(usage));
        body.prompt_logprobs = PromptLogprobs::list(&self.head, output.prompt.prompt_logprobs.as_ref());
        body.prompt_token_ids = self.head.prompt_token_ids(0);
        body.kv_transfer_params = self.head.kv_transfer_params.as_ref();
        body.routed_experts_replay_stats = ReplayStatsReply::sum(std::iter::once(output.prompt.replay_stats));
        write_with(&body, &payloads)
    }

    fn chunks(&mut self, _prompt: usize, event: Event) -> Vec<Vec<u8>> {
        match event {
            Event::Prompt(given) => {
                self.counts.add_cached(0, given.cached_tokens);
                self.prompt = Some(given);
                Vec::new()
            }
            Event::Choice(delta) => self.delta(delta),
            Event::Failed(_) => Vec::new(),
        }
    }

    fn closing_chunks(&mut self) -> Vec<Vec<u8>> {
        let usage = self.counts.total(&self.head);
        let last = |usage| write(&self.body_with("chat.completion.chunk", Vec::new(), Some(usage)));
        usage.map(last).into_iter().collect()
    }
}
