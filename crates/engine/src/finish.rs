//! The end of a choice: its last rows, then its last event.

use std::sync::atomic::Ordering;

use moetrail_sched::{RequestKey, SeqId};

use crate::capture::weight_versions;
use crate::choice::Choice;
use crate::engine::EngineThread;
use crate::request::{ChoiceDelta, Event, Finish, FinishReason, StopReason, TokenLogprobs};
use crate::stats::FinishedReason;

/// Bytes of rows that one step may bring to the host besides what clients wait for: about a tenth of a millisecond.
///
/// A long reply must not hold up the tokens of others. The tests' replies are short, so their slices are, too.
pub(crate) const DRAIN_SLICE: usize = if cfg!(test) { 48 } else { 512 << 10 };

/// While a sequence runs, fewer rows than this are not worth a drain of their own.
const DRAIN_ROWS: usize = if cfg!(test) { 4 } else { 64 };

/// What a choice says last.
pub(crate) struct Ending {
    pub(crate) token_ids: Vec<u32>,
    pub(crate) text: String,
    pub(crate) logprobs: Vec<TokenLogprobs>,
    pub(crate) reason: FinishReason,
    pub(crate) stop_reason: Option<StopReason>,
}

impl Ending {
    /// An end that no token led to.
    pub(crate) fn without_token(reason: FinishReason) -> Self {
        Self { token_ids: Vec::new(), text: String::new(), logprobs: Vec::new(), reason, stop_reason: None }
    }
}

/// A choice that has ended; its sequence keeps its blocks until its rows are on the host.
pub(crate) struct Closing {
    pub(crate) seq: SeqId,
    pub(crate) choice: Choice,
    key: RequestKey,
    ending: Ending,
    /// Positions that were forwarded or hit.
    forwarded: usize,
    /// One past the last position whose row the client gets.
    upto: usize,
}

impl EngineThread {
    /// Ends a choice. Its last event follows at once, unless many rows are still to be drained.
    pub(crate) fn finish(&mut self, seq: SeqId, mut ending: Ending) {
        let (Some(mut choice), Some(sequence)) = (self.choices.remove(&seq), self.scheduler.get(seq)) else { return };
        let forwarded = sequence.max_computed_tokens();
        // The last sampled token was never forwarded: it has no row.
        let upto = forwarded.min(sequence.prompt_len() + choice.num_output.saturating_sub(1));
        if ending.reason == FinishReason::Abort {
            ending.text.push_str(&choice.flush(&mut None));
        }
        if forwarded == 0 {
            choice.rows = None;
        }
        let key = sequence.request();
        self.scheduler.retire(seq);
        let mut closing = Closing { seq, choice, key, ending, forwarded, upto };
        // While the engine stands still, there is no step to go on in.
        if self.is_still() {
            return self.close(closing);
        }
        if self.bytes_missing(&closing) <= DRAIN_SLICE {
            self.drain_closing(&mut closing, usize::MAX);
            if !self.waits(&closing) {
                return self.close(closing);
            }
        }
        self.closing.push(closing);
    }

    /// Whether the rows of a choice are still on their way while a step is, which need not wait for them.
    fn waits(&self, closing: &Closing) -> bool {
        self.flight.is_some() && closing.choice.rows.as_ref().is_some_and(|rows| !rows.has_landed())
    }

    /// Drains rows that are still missing, while the blocks are there: a row at least, and `budget` bytes at most. Returns
    /// what is left of the budget; `None` if rows are.
    fn drain_closing(&self, closing: &mut Closing, budget: usize) -> Option<usize> {
        // Rows for a client that is gone would be copied for nothing.
        if self.live.get(&closing.key).is_none_or(|live| live.events.is_closed()) {
            closing.choice.rows = None;
        }
        let known = closing.choice.rows.as_mut().zip(self.scheduler.get(closing.seq));
        let Some((rows, sequence)) = known else { return Some(budget) };
        let slice = (budget / rows.row_bytes()).max(1);
        let upto = closing.upto.min(sequence.num_computed_tokens());
        let missing = rows.num_missing(upto);
        let end = rows.span().end.saturating_add(slice);
        self.capture.drain(sequence, self.scheduler.pool(), rows, upto.min(end));
        (missing <= slice).then(|| budget.saturating_sub(missing * rows.row_bytes()))
    }

    /// Brings a slice of the rows that are still missing to the host: first of choices that have ended, then of those
    /// that run.
    pub(crate) fn drain_slice(&mut self, running: &[SeqId]) {
        let mut budget = Some(DRAIN_SLICE);
        for mut closing in std::mem::take(&mut self.closing) {
            budget = budget.and_then(|budget| self.drain_closing(&mut closing, budget));
            match budget.is_none() || self.waits(&closing) {
                true => self.closing.push(closing),
                false => self.close(closing),
            }
        }
        let Some(mut budget) = budget else { return };
        for seq in running {
            let Some(sequence) = self.scheduler.get(*seq) else { continue };
            let Some(rows) = self.choices.get_mut(seq).and_then(|choice| choice.rows.as_mut()) else { continue };
            let missing = rows.num_missing(sequence.num_computed_tokens());
            let slice = (budget / rows.row_bytes()).min(missing);
            if missing >= DRAIN_ROWS && slice > 0 {
                self.capture.drain(sequence, self.scheduler.pool(), rows, rows.span().end + slice);
                budget -= slice * rows.row_bytes();
            }
        }
    }

    /// Ends what is still being drained, in one go.
    pub(crate) fn close_all(&mut self) {
        for closing in std::mem::take(&mut self.closing) {
            self.close(closing);
        }
    }

    fn bytes_missing(&self, closing: &Closing) -> usize {
        let (Some(rows), Some(sequence)) = (&closing.choice.rows, self.scheduler.get(closing.seq)) else { return 0 };
        rows.num_missing(closing.upto.min(sequence.num_computed_tokens())) * rows.row_bytes()
    }

    /// Drains the last rows while the blocks are there, releases them, and tells the client.
    fn close(&mut self, mut closing: Closing) {
        self.drain_closing(&mut closing, usize::MAX);
        let Closing { seq, choice: Choice { rows, index, recomputed, .. }, key, ending, forwarded, upto } = closing;
        self.release(seq);
        let Some(live) = self.live.get_mut(&key) else { return };
        let recomputed = rows.as_ref().filter(|_| recomputed).map(|rows| weight_versions(rows, upto));
        // What deltas carried before is counted now: a client that goes away in between has not got its rows.
        let num_rows = rows.as_ref().map_or(0, |rows| upto.saturating_sub(rows.span().start));
        let rows_of_others = rows.as_ref().map_or(0, |rows| rows.rows_of_others());
        let routed_experts = rows.and_then(|rows| self.capture.deliver(rows, upto));
        // Until the prompt is computed, one sequence stands for all choices: they end as it does.
        let indices = if live.prompt_sent { index..index + 1 } else { 0..live.request.sampling.n };
        let num_choices = indices.len() as u64;
        // Everything is counted before the client learns of the end, and may look.
        if let (Some(Ok(_)), Some(start)) = (&routed_experts, live.request.routed_experts_start) {
            self.stats.rows_returned.inc_by(num_choices * num_rows as u64);
            self.stats.rows_trimmed.inc_by(num_choices * start.min(forwarded) as u64);
            self.stats.rows_prefix_cached.inc_by(num_choices * rows_of_others as u64);
        }
        let Ending { token_ids, text, logprobs, reason, stop_reason } = ending;
        let finished_reason = FinishedReason { finished_reason: reason.as_str() };
        self.stats.request_success.get_or_create(&finished_reason).inc_by(num_choices);
        let finish = Some(Finish { reason, stop_reason, routed_experts, recomputed });
        let delta = ChoiceDelta { index, token_ids, text, logprobs, routed_experts: None, finish };
        let events = live.events.clone();
        live.seqs.retain(|other| *other != seq);
        if live.seqs.is_empty() {
            self.stats.e2e_request_latency.observe(live.arrived.elapsed().as_secs_f64());
            self.live.remove(&key);
            self.shared.live.fetch_sub(1, Ordering::AcqRel);
        }
        self.publish_gauges();
        let others: Vec<ChoiceDelta> = indices.skip(1).map(|index| ChoiceDelta { index, ..delta.clone() }).collect();
        for delta in std::iter::once(delta).chain(others) {
            // A client that is gone is noticed when its stream is dropped.
            let _ = events.send(Event::Choice(delta));
        }
    }
}
