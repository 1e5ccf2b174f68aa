//! The events of one request, put together for an answer in one piece.

use moetrail_engine::{ChoiceDelta, Event, Finish, PromptOutput, TokenLogprobs};

use crate::error::ApiError;

/// Everything one request gave.
#[derive(Debug, Clone, Default)]
pub struct RequestOutput {
    /// What the prompt gave.
    pub prompt: PromptOutput,
    /// The choices, by index.
    pub choices: Vec<ChoiceOutput>,
}

/// Everything one choice gave.
#[derive(Debug, Clone, Default)]
pub struct ChoiceOutput {
    /// The completion.
    pub token_ids: Vec<u32>,
    /// Its text, stop strings cut.
    pub text: String,
    /// One entry per token, if asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// How it ended; `None` while it runs.
    pub finish: Option<Finish>,
}

impl RequestOutput {
    /// Waits for `n` choices.
    pub fn new(n: usize) -> Self {
        Self { prompt: PromptOutput::default(), choices: vec![ChoiceOutput::default(); n] }
    }

    /// Adds an event.
    ///
    /// # Errors
    /// The failure of the whole request, if the event tells one.
    pub fn push(&mut self, event: Event) -> Result<(), ApiError> {
        match event {
            Event::Prompt(prompt) => self.prompt = prompt,
            Event::Choice(delta) => {
                if let Some(choice) = self.choices.get_mut(delta.index) {
                    choice.push(delta);
                }
            }
            Event::Failed(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Whether every choice has ended.
    pub fn is_finished(&self) -> bool {
        self.choices.iter().all(|choice| choice.finish.is_some())
    }

    /// Roughly how many bytes the answer will have to format: rows and log-probabilities.
    pub fn weight(&self) -> usize {
        prompt_weight(&self.prompt) + self.choices.iter().map(ChoiceOutput::weight).sum::<usize>()
    }

    pub(crate) fn completion_tokens(&self) -> usize {
        self.choices.iter().map(|choice| choice.token_ids.len()).sum()
    }
}

impl ChoiceOutput {
    pub(crate) fn push(&mut self, delta: ChoiceDelta) {
        self.token_ids.extend(delta.token_ids);
        self.text.push_str(&delta.text);
        self.logprobs.extend(delta.logprobs);
        self.finish = delta.finish.or(self.finish.take());
    }

    fn weight(&self) -> usize {
        self.finish.as_ref().map_or(0, finish_weight) + self.logprobs.iter().map(entry_weight).sum::<usize>()
    }
}

/// As [`RequestOutput::weight`], of one event of a stream.
pub fn event_weight(event: &Event) -> usize {
    match event {
        Event::Prompt(prompt) => prompt_weight(prompt),
        Event::Choice(delta) => {
            let rows = delta.routed_experts.as_ref().map_or(0, |rows| rows.data().len());
            rows + delta.finish.as_ref().map_or(0, finish_weight)
        }
        Event::Failed(_) => 0,
    }
}

fn finish_weight(finish: &Finish) -> usize {
    match &finish.routed_experts {
        Some(Ok(rows)) => rows.data().len(),
        _ => 0,
    }
}

fn prompt_weight(prompt: &PromptOutput) -> usize {
    prompt.prompt_logprobs.iter().flatten().flatten().map(entry_weight).sum()
}

fn entry_weight(entry: &TokenLogprobs) -> usize {
    40 * (1 + entry.top.len())
}
