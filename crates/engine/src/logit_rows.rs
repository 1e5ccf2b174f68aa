//! Which rows' logits a step needs, and for what.

use moetrail_kernels::gpu::SampleParams;
use moetrail_sched::{Batch, RequestKey, SeqId};
use rustc_hash::FxHashMap;

use crate::engine::EngineThread;

/// Which rows' logits a step needs, and for what. A row serves one purpose: the last token of a prompt predicts the
/// first of the output.
#[derive(Default)]
pub(crate) struct LogitRows {
    /// Batch rows that score the prompt, on the host.
    pub(crate) prompt_rows: Vec<u32>,
    /// For each of them: the request, and the position whose token is predicted.
    pub(crate) prompt: Vec<(RequestKey, usize)>,
    /// Batch rows that the next tokens follow from, on the host.
    pub(crate) next_rows: Vec<u32>,
    /// Index into `next_rows` by sequence.
    pub(crate) next: FxHashMap<SeqId, usize>,
    /// All others.
    pub(crate) device: DeviceTokens,
}

/// Rows whose logits stay on the device, and the tokens that it samples or scores.
#[derive(Default)]
pub(crate) struct DeviceTokens {
    /// Batch rows.
    rows: Vec<u32>,
    /// Hidden row and parameters of each token, ascending by row.
    pub(crate) tokens: Vec<(u32, SampleParams)>,
    /// Index of each token that scores a prompt, the request, and its position.
    pub(crate) prompt: Vec<(usize, RequestKey, usize)>,
    /// Index of the next token by sequence. If the sequence is about to split into choices, theirs follow.
    pub(crate) next: FxHashMap<SeqId, usize>,
}

impl LogitRows {
    /// The batch row of each hidden row.
    pub(crate) fn batch_rows(&self) -> Vec<u32> {
        [&self.prompt_rows[..], &self.next_rows, &self.device.rows].concat()
    }

    /// Whether nothing of the step is scored or sampled on the host.
    pub(crate) fn is_on_device(&self) -> bool {
        self.prompt_rows.is_empty() && self.next_rows.is_empty()
    }

    /// Adds a row that scores a position of a prompt, on the device if it is said how.
    fn score(&mut self, row: usize, request: RequestKey, position: usize, on_device: Option<SampleParams>) {
        match on_device {
            Some(token) => {
                let at = self.device.push(row, [token]);
                self.device.prompt.push((at, request, position));
            }
            None => {
                self.prompt.push((request, position));
                self.prompt_rows.push(row as u32);
            }
        }
    }

    /// Adds a row that the next token of a sequence follows from, and its choices' if it is about to split.
    fn sample(&mut self, row: usize, seq: SeqId, on_device: Option<Vec<SampleParams>>) {
        match on_device {
            Some(tokens) => {
                let at = self.device.push(row, tokens);
                self.device.next.insert(seq, at);
            }
            None => {
                self.next.insert(seq, self.next_rows.len());
                self.next_rows.push(row as u32);
            }
        }
    }
}

impl DeviceTokens {
    /// Adds a row; returns the index of its first token.
    fn push(&mut self, batch_row: usize, tokens: impl IntoIterator<Item = SampleParams>) -> usize {
        let (row, first) = (self.rows.len() as u32, self.tokens.len());
        self.rows.push(batch_row as u32);
        self.tokens.extend(tokens.into_iter().map(|params| (row, params)));
        first
    }
}

impl EngineThread {
    pub(crate) fn logit_rows(&self, batch: &Batch) -> LogitRows {
        let mut wanted = LogitRows::default();
        for scheduled in &batch.scheduled {
            let Some(sequence) = self.scheduler.get(scheduled.seq) else { continue };
            let Some(live) = self.live.get(&sequence.request()) else { continue };
            let params = &live.request.sampling;
            for (offset, row) in scheduled.rows.clone().enumerate() {
                let predicted = scheduled.first_position + offset + 1;
                let of_prompt = params.prompt_logprobs.is_some()
                    && sequence.choice() == 0
                    && !live.prompt_sent
                    && predicted < sequence.prompt_len()
                    // After a preemption, positions come by again.
                    && predicted >= live.prompt_logprobs.len();
                let of_next = scheduled.samples && row + 1 == scheduled.rows.end && params.max_tokens > 0;
                if of_prompt {
                    wanted.score(row, sequence.request(), predicted, self.device_score(live, predicted));
                }
                if of_next {
                    let num_output = predicted - sequence.prompt_len();
                    wanted.sample(row, scheduled.seq, self.device_tokens(live, scheduled.seq, num_output));
                }
            }
        }
        // The hidden rows of the device come last.
        let on_host = (wanted.prompt_rows.len() + wanted.next_rows.len()) as u32;
        wanted.device.tokens.iter_mut().for_each(|(row, _)| *row += on_host);
        wanted
    }
}
