//! What a client sees of a request, bit for bit.

use std::collections::BTreeMap;

use moetrail_routes::ExpertRows;

use crate::{Event, TokenLogprobs};

/// `(id, bits of the log-probability, rank, bits of the alternatives)`.
type LogprobBits = (u32, u32, u32, Vec<(u32, u32)>);

/// What a client sees of one choice, bit for bit.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Seen {
    pub(super) tokens: Vec<u32>,
    logprobs: Vec<LogprobBits>,
    pub(super) rows: Option<Result<(usize, Vec<u8>), String>>,
    finish: Option<&'static str>,
    row_bytes: usize,
}

impl Seen {
    /// Adds the rows of a chunk, which follow those of the chunk before.
    fn add_rows(&mut self, rows: &ExpertRows) {
        self.row_bytes = rows.layout().row_bytes();
        let (start, data) = match self.rows.get_or_insert_with(|| Ok((rows.start(), Vec::new()))) {
            Ok(seen) => seen,
            Err(error) => panic!("rows after {error}"),
        };
        assert_eq!(*start + data.len() / self.row_bytes, rows.start(), "chunks of rows leave no gap");
        data.extend_from_slice(rows.data());
    }
}

#[derive(Debug, Clone, Default)]
pub(super) struct Outcome {
    prompt_logprobs: Vec<(u32, u32)>,
    pub(super) choices: BTreeMap<usize, Seen>,
    failed: Option<String>,
    /// Choices under which computed state was dropped.
    pub(super) recomputed: usize,
}

impl PartialEq for Outcome {
    /// What was dropped on the way does not show.
    fn eq(&self, other: &Self) -> bool {
        (&self.prompt_logprobs, &self.choices, &self.failed) == (&other.prompt_logprobs, &other.choices, &other.failed)
    }
}

fn bits(entry: &TokenLogprobs) -> LogprobBits {
    let top = entry.top.iter().map(|(id, logprob)| (*id, logprob.to_bits())).collect();
    (entry.token_id, entry.logprob.to_bits(), entry.rank, top)
}

impl Outcome {
    pub(super) fn take(&mut self, event: Event) {
        match event {
            Event::Prompt(prompt) => {
                let entries = prompt.prompt_logprobs.unwrap_or_default();
                self.prompt_logprobs = entries.iter().flatten().map(|e| (e.token_id, e.logprob.to_bits())).collect();
            }
            Event::Choice(delta) => {
                let seen = self.choices.entry(delta.index).or_default();
                seen.tokens.extend(delta.token_ids);
                seen.logprobs.extend(delta.logprobs.iter().map(bits));
                if let Some(rows) = delta.routed_experts {
                    seen.add_rows(&rows);
                }
                if let Some(finish) = delta.finish {
                    seen.finish = Some(finish.reason.as_str());
                    match finish.routed_experts {
                        Some(Ok(rows)) => seen.add_rows(&rows),
                        Some(Err(error)) => seen.rows = Some(Err(error.to_string())),
                        None => {}
                    }
                    if let (Some(versions), Some(Ok((start, data)))) = (finish.recomputed, &seen.rows) {
                        // The stretches of the versions follow each other and cover the rows.
                        let end = versions.iter().fold(*start, |end, next| {
                            assert_eq!(next.span.start, end);
                            next.span.end
                        });
                        assert_eq!(end - start, data.len() / seen.row_bytes.max(1));
                        self.recomputed += 1;
                    }
                }
            }
            Event::Failed(error) => self.failed = Some(error.to_string()),
        }
    }
}
