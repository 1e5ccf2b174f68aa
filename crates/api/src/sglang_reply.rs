//! SGLang's `/generate`: writing the answer.

use std::time::Instant;

use moetrail_engine::{ChoiceDelta, Event, Finish, FinishReason, PromptOutput, StopReason, TokenLogprobs};
use moetrail_routes::ExpertRows;
use serde::Serialize;

use crate::accept::Reply;
use crate::body::write_with;
use crate::head::Head;
use crate::output::{ChoiceOutput, RequestOutput};
use crate::replay::ReplayStatsReply;
use crate::rows_reply::{PayloadRef, Payloads, RowsRest, end};

/// Which scores an answer shows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scores {
    /// First position of the prompt that is scored.
    pub(crate) prompt_start: Option<usize>,
    /// Whether tokens are shown as text beside their ids.
    pub(crate) with_text: bool,
    /// Whether alternatives are shown.
    pub(crate) top: bool,
}

/// `[logprob, token id, text]`.
type Scored = (Option<f32>, u32, Option<String>);

#[derive(Serialize)]
struct Body {
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
    text: String,
    output_ids: Vec<u32>,
    meta_info: Meta,
}

#[derive(Serialize)]
struct Meta {
    /// First, so that it is found before anything that a client sent.
    routed_experts: Option<PayloadRef>,
    #[serde(skip_serializing_if = "Option::is_none")]
    routed_experts_start_len: Option<usize>,
    #[serde(flatten)]
    rest: Option<RowsRest>,
    id: String,
    finish_reason: Option<FinishReply>,
    prompt_tokens: usize,
    completion_tokens: usize,
    cached_tokens: usize,
    weight_version: String,
    e2e_latency: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    input_token_logprobs: Option<Vec<Scored>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    output_token_logprobs: Option<Vec<Scored>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    output_top_logprobs: Option<Vec<Vec<Scored>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    routed_experts_replay_stats: Option<ReplayStatsReply>,
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum FinishReply {
    Stop { matched: Matched },
    Length { length: usize },
    Abort { message: &'static str },
}

#[derive(Serialize)]
#[serde(untagged)]
enum Matched {
    Token(u32),
    Text(String),
}

/// Writes SGLang's answers; streamed ones repeat what was said before, as SGLang's do.
pub(crate) struct SglangReply {
    head: Head,
    /// Whether the prompts came as a list, so that the answers do.
    several: bool,
    scores: Scores,
    weight_version: String,
    began: Instant,
    prompts: Vec<PromptOutput>,
    /// What each choice has said so far, prompt by prompt.
    said: Vec<ChoiceOutput>,
}

impl SglangReply {
    pub(crate) fn new(head: Head, several: bool, scores: Scores, weight_version: &str) -> Self {
        let prompts = vec![PromptOutput::default(); head.prompts.len()];
        let said = vec![ChoiceOutput::default(); head.prompts.len() * head.n];
        Self { several, scores, weight_version: weight_version.to_owned(), began: Instant::now(), prompts, said, head }
    }

    fn scored(&self, id: u32, logprob: Option<f32>) -> Scored {
        let logprob = logprob.map(|logprob| if logprob.is_finite() { logprob.max(-9999.0) } else { -9999.0 });
        (logprob, id, self.scores.with_text.then(|| self.head.decoded(id)))
    }

    fn input_scores(&self, prompt: usize) -> Option<Vec<Scored>> {
        let entries = self.prompts[prompt].prompt_logprobs.as_ref()?;
        let from = self.scores.prompt_start?;
        let known = self.head.prompts[prompt].iter().zip(entries).skip(from);
        Some(known.map(|(id, entry)| self.scored(*id, entry.as_ref().map(|entry| entry.logprob))).collect())
    }

    /// The body of choice `number`: everything that it has said.
    fn choice(
        &mut self,
        number: usize,
        finish: Option<Finish>,
        rows: Option<ExpertRows>,
        payloads: &mut Payloads,
    ) -> Body {
        let (finish, rows) = end(&mut self.head.rows, number, finish, rows, payloads);
        let (payload, start, rest) = match rows.map(|rows| rows.into_parts()) {
            Some((payload, start, rest)) => (payload, start, Some(rest)),
            None => (None, None, None),
        };
        let (prompt, said) = (number / self.head.n, &self.said[number]);
        let entry = |entry: &TokenLogprobs| self.scored(entry.token_id, Some(entry.logprob));
        let top = |entry: &TokenLogprobs| {
            entry.top.iter().map(|(id, logprob)| self.scored(*id, Some(*logprob))).collect::<Vec<_>>()
        };
        let scored = self.head.with_logprobs;
        let meta_info = Meta {
            routed_experts: payload,
            routed_experts_start_len: start,
            rest,
            id: if self.said.len() > 1 { format!("{}_{number}", self.head.id) } else { self.head.id.clone() },
            finish_reason: finish.map(|finish| finish_reply(&finish, said)),
            prompt_tokens: self.head.prompts[prompt].len(),
            completion_tokens: said.token_ids.len(),
            cached_tokens: self.prompts[prompt].cached_tokens,
            weight_version: self.weight_version.clone(),
            e2e_latency: self.began.elapsed().as_secs_f64(),
            input_token_logprobs: self.input_scores(prompt).filter(|_| scored),
            output_token_logprobs: scored.then(|| said.logprobs.iter().map(entry).collect()),
            output_top_logprobs: (scored && self.scores.top).then(|| said.logprobs.iter().map(top).collect()),
            routed_experts_replay_stats: ReplayStatsReply::sum(std::iter::once(self.prompts[prompt].replay_stats)),
        };
        let index = (self.said.len() > 1).then_some(number);
        Body { index, text: said.text.clone(), output_ids: said.token_ids.clone(), meta_info }
    }

    fn delta(&mut self, prompt: usize, mut delta: ChoiceDelta) -> Vec<u8> {
        let number = prompt * self.head.n + delta.index;
        let (finish, rows) = (delta.finish.take(), delta.routed_experts.take());
        self.said[number].push(delta);
        let mut payloads = Payloads::default();
        let body = self.choice(number, finish, rows, &mut payloads);
        write_with(&body, &payloads)
    }
}

fn finish_reply(finish: &Finish, said: &ChoiceOutput) -> FinishReply {
    match (finish.reason, &finish.stop_reason) {
        (FinishReason::Abort, _) => FinishReply::Abort { message: "the request was aborted" },
        (FinishReason::Length, _) => FinishReply::Length { length: said.token_ids.len() },
        (FinishReason::Stop, Some(StopReason::Text(text))) => {
            FinishReply::Stop { matched: Matched::Text(text.clone()) }
        }
        (FinishReason::Stop, Some(StopReason::Token(id))) => FinishReply::Stop { matched: Matched::Token(*id) },
        // SGLang names EOS, too.
        (FinishReason::Stop, None) => {
            FinishReply::Stop { matched: Matched::Token(said.token_ids.last().copied().unwrap_or(0)) }
        }
    }
}

impl Reply for SglangReply {
    fn body(&mut self, outputs: Vec<RequestOutput>) -> Vec<u8> {
        let mut payloads = Payloads::default();
        let mut ends = Vec::new();
        for (prompt, output) in outputs.into_iter().enumerate() {
            self.prompts[prompt] = output.prompt;
            for (index, mut choice) in output.choices.into_iter().enumerate() {
                ends.push(choice.finish.take());
                self.said[prompt * self.head.n + index] = choice;
            }
        }
        let bodies: Vec<Body> = ends
            .into_iter()
            .enumerate()
            .map(|(number, finish)| self.choice(number, finish, None, &mut payloads))
            .collect();
        match &bodies[..] {
            [one] if !self.several => write_with(one, &payloads),
            all => write_with(&all, &payloads),
        }
    }

    fn chunks(&mut self, prompt: usize, event: Event) -> Vec<Vec<u8>> {
        match event {
            Event::Prompt(given) => {
                self.prompts[prompt] = given;
                Vec::new()
            }
            Event::Choice(delta) => vec![self.delta(prompt, delta)],
            Event::Failed(_) => Vec::new(),
        }
    }

    fn closing_chunks(&mut self) -> Vec<Vec<u8>> {
        Vec::new()
    }
}
