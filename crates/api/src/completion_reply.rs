//! `/v1/completions`: writing the answer.

use moetrail_engine::{ChoiceDelta, Event, PromptOutput, TokenLogprobs};
use serde::Serialize;
use serde_json::Value;

use crate::accept::Reply;
use crate::body::write_with;
use crate::head::{FinishName, Head, StopName, StreamCounts};
use crate::logprobs::{LegacyLogprobs, PromptLogprobs};
use crate::output::{ChoiceOutput, RequestOutput};
use crate::replay::ReplayStatsReply;
use crate::rows_reply::{NvextReply, Payloads, RowsReply, end};
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
    kv_transfer_params: Option<&'a Value>,
}

#[derive(Default, Serialize)]
struct Choice {
    index: usize,
    text: String,
    logprobs: Option<LegacyLogprobs>,
    finish_reason: Option<FinishName>,
    stop_reason: Option<StopName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(flatten)]
    rows: Option<RowsReply>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Vec<PromptLogprobs>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
}

/// Writes completions; choices are numbered prompt by prompt.
pub(crate) struct CompletionReply {
    head: Head,
    /// The prompts' texts, if they are echoed.
    echo: Option<Vec<String>>,
    show_prompt_logprobs: bool,
    counts: StreamCounts,
    /// Where the next token of each choice begins in its text, in characters; `None` before its first chunk.
    offsets: Vec<Option<usize>>,
    /// What each prompt gave, for the first chunk of its choices.
    prompts: Vec<PromptOutput>,
}

impl CompletionReply {
    pub(crate) fn new(head: Head, echo: Option<Vec<String>>, show_prompt_logprobs: bool) -> Self {
        let counts = StreamCounts::new(&head);
        let offsets = vec![None; head.prompts.len() * head.n];
        let prompts = vec![PromptOutput::default(); head.prompts.len()];
        Self { head, echo, show_prompt_logprobs, counts, offsets, prompts }
    }

    /// Text and log-probabilities of new tokens, behind those of the prompt if that is echoed and `first`.
    fn text_and_logprobs(
        &self,
        prompt: usize,
        given: &PromptOutput,
        first: bool,
        (text, token_ids, entries): (&str, &[u32], &[TokenLogprobs]),
        offset: &mut usize,
    ) -> (String, Option<LegacyLogprobs>) {
        let echoed = self.echo.as_ref().filter(|_| first).map(|texts| texts[prompt].as_str());
        let text = [echoed.unwrap_or(""), text].concat();
        if !self.head.with_logprobs {
            return (text, None);
        }
        let mut lists = LegacyLogprobs::default();
        if echoed.is_some() {
            let known = given.prompt_logprobs.iter().flatten().map(Option::as_ref);
            for (id, entry) in self.head.prompts[prompt].iter().zip(known.chain(std::iter::repeat(None))) {
                lists.push(&self.head, *id, entry, offset);
            }
        }
        for (id, entry) in token_ids.iter().zip(entries) {
            lists.push(&self.head, *id, Some(entry), offset);
        }
        (text, Some(lists))
    }

    fn choice(
        &self,
        prompt: usize,
        index: usize,
        given: &PromptOutput,
        choice: ChoiceOutput,
        rows: Option<RowsReply>,
    ) -> Choice {
        let content = (choice.text.as_str(), choice.token_ids.as_slice(), choice.logprobs.as_slice());
        let (text, logprobs) = self.text_and_logprobs(prompt, given, true, content, &mut 0);
        let finish = choice.finish;
        Choice {
            index,
            text,
            logprobs,
            finish_reason: finish.as_ref().map(|finish| FinishName(finish.reason)),
            stop_reason: finish.and_then(|finish| finish.stop_reason).map(StopName),
            token_ids: self.head.return_token_ids.then_some(choice.token_ids),
            rows,
            prompt_logprobs: self.shown_prompt_logprobs(given),
            prompt_token_ids: self.head.prompt_token_ids(prompt),
        }
    }

    fn shown_prompt_logprobs(&self, given: &PromptOutput) -> Option<Vec<PromptLogprobs>> {
        PromptLogprobs::list(&self.head, given.prompt_logprobs.as_ref().filter(|_| self.show_prompt_logprobs))
    }

    fn write(
        &self,
        choices: Vec<Choice>,
        payloads: &Payloads,
        usage: Option<Usage>,
        stats: Option<ReplayStatsReply>,
    ) -> Vec<u8> {
        let body = Body {
            id: &self.head.id,
            object: "text_completion",
            created: self.head.created,
            model: &self.head.model,
            nvext: choices.iter().find_map(|choice| choice.rows.as_ref()?.in_nvext(self.head.rows.format)),
            choices,
            usage,
            routed_experts_replay_stats: stats,
            kv_transfer_params: self.head.kv_transfer_params.as_ref().filter(|_| !self.head.streaming.enabled),
        };
        write_with(&body, payloads)
    }

    fn delta(&mut self, prompt: usize, delta: ChoiceDelta) -> Vec<u8> {
        let number = prompt * self.head.n + delta.index;
        self.counts.add(number, delta.token_ids.len());
        let first = self.offsets[number].is_none();
        let mut offset = self.offsets[number].unwrap_or(0);
        let given = &self.prompts[prompt];
        let content = (delta.text.as_str(), delta.token_ids.as_slice(), delta.logprobs.as_slice());
        let (text, logprobs) = self.text_and_logprobs(prompt, given, first, content, &mut offset);
        let (shown, ids) = match first {
            true => (self.shown_prompt_logprobs(given), self.head.prompt_token_ids(prompt)),
            false => (None, None),
        };
        let stats = ReplayStatsReply::sum(std::iter::once(given.replay_stats.filter(|_| first && delta.index == 0)));
        let mut payloads = Payloads::default();
        let (finish, rows) = end(&mut self.head.rows, number, delta.finish, delta.routed_experts, &mut payloads);
        let choice = Choice {
            index: number,
            text,
            logprobs,
            finish_reason: finish.as_ref().map(|finish| FinishName(finish.reason)),
            token_ids: self.head.return_token_ids.then_some(delta.token_ids),
            rows,
            stop_reason: finish.and_then(|finish| finish.stop_reason).map(StopName),
            prompt_logprobs: shown,
            prompt_token_ids: ids,
        };
        self.offsets[number] = Some(offset);
        self.write(vec![choice], &payloads, self.counts.so_far(&self.head, prompt, number), stats)
    }
}

impl Reply for CompletionReply {
    fn body(&mut self, outputs: Vec<RequestOutput>) -> Vec<u8> {
        let mut payloads = Payloads::default();
        // Those of all prompts together, as the usage is.
        let stats = ReplayStatsReply::sum(outputs.iter().map(|output| output.prompt.replay_stats));
        let completion_tokens = outputs.iter().map(RequestOutput::completion_tokens).sum();
        let cached_tokens = outputs.iter().map(|output| output.prompt.cached_tokens).sum();
        let mut choices = Vec::new();
        for (prompt, output) in outputs.into_iter().enumerate() {
            for mut choice in output.choices {
                let rows;
                (choice.finish, rows) = end(&mut self.head.rows, choices.len(), choice.finish, None, &mut payloads);
                choices.push(self.choice(prompt, choices.len(), &output.prompt, choice, rows));
            }
        }
        self.write(choices, &payloads, Some(self.head.usage(completion_tokens, cached_tokens)), stats)
    }

    fn chunks(&mut self, prompt: usize, event: Event) -> Vec<Vec<u8>> {
        match event {
            Event::Prompt(given) => {
                self.counts.add_cached(prompt, given.cached_tokens);
                self.prompts[prompt] = given;
                Vec::new()
            }
            Event::Choice(delta) => vec![self.delta(prompt, delta)],
            Event::Failed(_) => Vec::new(),
        }
    }

    fn closing_chunks(&mut self) -> Vec<Vec<u8>> {
        let last = |usage| self.write(Vec::new(), &Payloads::default(), Some(usage), None);
        self.counts.total(&self.head).map(last).into_iter().collect()
    }
}
