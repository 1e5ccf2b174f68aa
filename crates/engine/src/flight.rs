//! A step that has been issued and whose outcome has not been handed out.

use moetrail_kernels::SeqSpan;
use moetrail_kernels::gpu::SampledToken;
use moetrail_models::{
    Awaited, Hidden, HiddenOutput, Marks, ModelError, PendingReport, PendingTokens, Replay, StepInput,
};
use moetrail_sched::{Batch, Scheduled, SeqId};

use crate::engine::EngineThread;
use crate::finish::DRAIN_SLICE;
use crate::logit_rows::LogitRows;

/// A step on its way: at most two are, on a device, and the second takes the tokens of the first from there.
pub(crate) struct Flight {
    pub(crate) batch: Batch,
    pub(crate) wanted: LogitRows,
    pub(crate) issued: Result<Issued, String>,
    /// Sequences that have ended since it was issued.
    pub(crate) leaving: Vec<SeqId>,
}

/// What was issued.
pub(crate) struct Issued {
    hidden: Hidden,
    /// Those of `LogitRows::device`.
    tokens: PendingTokens,
    report: PendingReport,
}

/// What a step computed.
pub(crate) struct Output {
    pub(crate) hidden: Hidden,
    pub(crate) marks: Marks,
    /// Those of `LogitRows::device`.
    pub(crate) tokens: Vec<SampledToken>,
}

impl Flight {
    /// Whether a step may be issued behind it on a device that samples: nobody lacked blocks, and nothing on the host will
    /// ask for its hidden rows, whose memory the next one may take.
    pub(crate) fn can_be_followed(&self) -> bool {
        self.wanted.is_on_device() && self.batch.num_short == 0 && self.issued.is_ok()
    }

    /// Whether it has rows of a sequence.
    pub(crate) fn writes(&self, seq: SeqId) -> bool {
        self.batch.scheduled.iter().any(|scheduled| scheduled.seq == seq)
    }
}

impl Issued {
    /// Waits for it.
    pub(crate) fn land(self) -> Result<Output, String> {
        let Self { hidden, tokens, report } = self;
        let (marks, tokens) = report.finish(&tokens).map_err(|error| error.to_string())?;
        Ok(Output { hidden, marks, tokens })
    }
}

impl EngineThread {
    /// Issues a planned step; `before` is the one on its way that its awaited tokens come from.
    pub(crate) fn issue(&mut self, batch: Batch, before: Option<&Flight>) -> Flight {
        let wanted = self.logit_rows(&batch);
        let issued = self.forward(&batch, &wanted, before);
        Flight { batch, wanted, issued, leaving: Vec::new() }
    }

    /// Issues the layers, and what the device samples.
    fn forward(&mut self, batch: &Batch, wanted: &LogitRows, before: Option<&Flight>) -> Result<Issued, String> {
        let given = self.given_routing(batch);
        let sources = sources(batch, before)?;
        let samples = before.and_then(|before| before.issued.as_ref().ok()).map(|issued| &issued.tokens);
        let span = |scheduled: &Scheduled| SeqSpan {
            rows: scheduled.rows.clone(),
            first_position: scheduled.first_position as u32,
            block_table: &batch.block_tables[scheduled.blocks.clone()],
        };
        let seqs: Vec<SeqSpan<'_>> = batch.scheduled.iter().map(span).collect();
        let input = StepInput {
            token_ids: &batch.token_ids,
            positions: &batch.positions,
            slot_mapping: &batch.slot_mapping,
            seqs: &seqs,
            logit_rows: &wanted.batch_rows(),
            replay: given.as_ref().map(|(row_of, ids)| Replay { row_of, ids }),
            awaited: samples.zip(sources.as_deref()).map(|(samples, sources)| Awaited { samples, sources }),
        };
        let mut run = || {
            let HiddenOutput { hidden, marks } = self.decoder.hidden(&input, &mut self.kv, self.capture.cells())?;
            let tokens = self.decoder.sample(&hidden, &wanted.device.tokens)?;
            let report = marks.send(&tokens)?;
            Ok::<_, ModelError>(Issued { hidden, tokens, report })
        };
        run().map_err(|error| error.to_string())
    }

    /// Sends rows that clients get as soon as this step lands on their way now: behind the next step, they would be waited
    /// for longer. The step before has landed, so nobody's rows are sent who ended with it.
    pub(crate) fn send_rows(&mut self, batch: &Batch) {
        if self.decoder.gpu().is_none() {
            return;
        }
        for scheduled in batch.scheduled.iter().filter(|scheduled| scheduled.samples) {
            let known = self.scheduler.get(scheduled.seq).zip(self.choices.get_mut(&scheduled.seq));
            let Some((sequence, choice)) = known else { continue };
            let (Some(rows), Some(live)) = (&mut choice.rows, self.live.get(&sequence.request())) else { continue };
            let params = &live.request.sampling;
            // With this step's token, which `num_expected_tokens` counts already.
            let ends = sequence.num_expected_tokens() - sequence.prompt_len() >= params.max_tokens;
            let splits = params.n > 1 && !live.prompt_sent;
            // Many rows of one that ends are drained in slices.
            let few = rows.num_missing(scheduled.span().end) * rows.row_bytes() <= DRAIN_SLICE;
            if live.request.routed_experts_delta || splits || (ends && few) {
                self.capture.drain(sequence, self.scheduler.pool(), rows, scheduled.span().end);
            }
        }
    }

    /// The given routing of a batch: for each row its row in the ids, and the ids; `None` if all rows are free.
    fn given_routing(&self, batch: &Batch) -> Option<(Vec<u32>, Vec<u16>)> {
        let (mut row_of, mut ids, mut num_rows) = (Vec::new(), Vec::new(), 0);
        for scheduled in &batch.scheduled {
            let saved = self.choices.get(&scheduled.seq).and_then(|choice| choice.saved.as_ref());
            let sequence = self.scheduler.get(scheduled.seq)?;
            let live = self.live.get(&sequence.request());
            let given = live.and_then(|live| live.request.routed_experts_replay.as_deref());
            for position in scheduled.span().iter().filter(|_| saved.is_some() || given.is_some()) {
                // What was used the first time is used again, whoever gave it.
                let row = saved.and_then(|rows| rows.row(position)).or_else(|| given?.row(position));
                let Some(row) = row else { continue };
                row_of.resize(batch.num_tokens(), Replay::FREE);
                row_of[scheduled.rows.start + position - scheduled.first_position] = num_rows;
                num_rows += 1;
                ids.extend_from_slice(row);
            }
        }
        (num_rows > 0).then_some((row_of, ids))
    }
}

/// For each row the index of its token among those that the step before samples; `None` if no row awaits one.
fn sources(batch: &Batch, before: Option<&Flight>) -> Result<Option<Vec<u32>>, String> {
    let mut sources = None;
    for scheduled in batch.scheduled.iter().filter(|scheduled| scheduled.awaits) {
        let source = before.and_then(|before| before.wanted.device.next.get(&scheduled.seq));
        let source = source.ok_or_else(|| format!("nobody samples the token of {:?}", scheduled.seq))?;
        let sources = sources.get_or_insert_with(|| vec![Awaited::KNOWN; batch.num_tokens()]);
        sources[scheduled.rows.end - 1] = *source as u32;
    }
    Ok(sources)
}
