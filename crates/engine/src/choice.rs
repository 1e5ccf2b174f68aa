//! One choice of a live request: what it has said, and the rows it has on the host.

use std::sync::Arc;
use std::time::Instant;

use moetrail_capture::SequenceRows;
use moetrail_sched::{BlockPool, Release, Sequence};
use moetrail_text::{Detokenizer, StopStrings, Tokenizer};

use crate::capture::Capture;
use crate::config::ReprefillRouting;
use crate::replay::ReplayRows;
use crate::request::{FinishReason, GenerateRequest, StopReason};
use crate::token_counts::TokenCounts;

/// Text of a choice; absent if the client wants none.
struct ChoiceText {
    detokenizer: Detokenizer,
    stops: StopStrings,
}

/// One choice. Its tokens are the scheduler's; this is what is derived from them.
pub(crate) struct Choice {
    pub(crate) index: usize,
    pub(crate) num_output: usize,
    pub(crate) counts: TokenCounts,
    pub(crate) rows: Option<SequenceRows>,
    /// Routing to be used again for positions that are computed again.
    pub(crate) saved: Option<ReplayRows>,
    pub(crate) last_token_at: Option<Instant>,
    /// Whether state that it had computed was dropped by an operator's order.
    pub(crate) recomputed: bool,
    text: Option<ChoiceText>,
}

/// What one more token means for a choice.
pub(crate) struct Advance {
    /// Text that became final.
    pub(crate) text: String,
    /// Whether the choice has ended, why, and what stopped it.
    pub(crate) end: Option<(FinishReason, Option<StopReason>)>,
}

impl Choice {
    pub(crate) fn new(
        index: usize,
        request: &GenerateRequest,
        tokenizer: Option<&Arc<Tokenizer>>,
        rows: Option<SequenceRows>,
    ) -> Self {
        let params = &request.sampling;
        let text = tokenizer.filter(|_| params.detokenize || !params.stop.is_empty()).map(|tokenizer| ChoiceText {
            detokenizer: Detokenizer::new(tokenizer.clone(), &request.prompt, params.skip_special_tokens),
            stops: StopStrings::new(params.stop.clone(), params.include_stop_str_in_output),
        });
        let counts = TokenCounts::new(params, &request.prompt);
        Self { index, num_output: 0, counts, rows, saved: None, last_token_at: None, recomputed: false, text }
    }

    /// Its sequence is about to lose its blocks: what they hold of its rows comes to the host.
    pub(crate) fn lose_blocks(
        &mut self,
        sequence: &Sequence,
        pool: &BlockPool,
        release: Release,
        capture: &Capture,
        routing: ReprefillRouting,
    ) {
        let computed = sequence.num_computed_tokens();
        if let Some(rows) = &mut self.rows {
            capture.drain(sequence, pool, rows, computed);
        }
        let recomputes = release == Release::Recompute && routing == ReprefillRouting::Replay;
        // While saved rows are being computed again, the ring holds no more than they do.
        if recomputes && self.saved.as_ref().is_none_or(|saved| saved.span().end < computed) {
            self.saved = capture.save(sequence);
        }
    }

    /// Takes a sampled token and decides whether it is the last.
    pub(crate) fn advance(&mut self, token: u32, request: &GenerateRequest, eos: &[u32]) -> Advance {
        let params = &request.sampling;
        self.num_output += 1;
        self.counts.push(token);
        let may_stop = self.num_output > params.min_tokens;
        let is_eos = !params.ignore_eos && eos.contains(&token);
        let is_stop = params.stop_token_ids.contains(&token);
        let ends_by_token = may_stop && (is_eos || is_stop);

        let mut text = String::new();
        let mut end = None;
        if let Some(state) = &mut self.text {
            // As in vLLM, the token that ends a choice has no text of its own, unless asked for.
            let shown = !ends_by_token || params.include_stop_str_in_output;
            let piece = if shown { state.detokenizer.push(token) } else { String::new() };
            if may_stop {
                let outcome = state.stops.push(&piece);
                text = outcome.emit;
                if let Some(stop) = outcome.stopped.and_then(|index| state.stops.get(index)) {
                    end = Some((FinishReason::Stop, Some(StopReason::Text(stop.to_owned()))));
                }
            } else {
                text = piece;
            }
        }
        if end.is_none() {
            if ends_by_token {
                // EOS is no stop reason, a stop token is; a token that is both counts as EOS.
                let reason = (!is_eos).then_some(StopReason::Token(token));
                end = Some((FinishReason::Stop, reason));
            } else if self.num_output >= params.max_tokens {
                end = Some((FinishReason::Length, None));
            }
            if end.is_some() {
                text.push_str(&self.flush(&mut end));
            }
        }
        Advance { text: if params.detokenize { text } else { String::new() }, end }
    }

    /// Gives out what was held back, once no token follows; it can still complete a stop string.
    pub(crate) fn flush(&mut self, end: &mut Option<(FinishReason, Option<StopReason>)>) -> String {
        let Some(state) = &mut self.text else { return String::new() };
        let rest = state.detokenizer.finish();
        let outcome = state.stops.push(&rest);
        let mut text = outcome.emit;
        match outcome.stopped.and_then(|index| state.stops.get(index)) {
            Some(stop) => *end = Some((FinishReason::Stop, Some(StopReason::Text(stop.to_owned())))),
            None => text.push_str(&state.stops.finish()),
        }
        text
    }
}
