//! What goes into a forward pass and what comes out.

use candle_core::Tensor;
use moetrail_kernels::SeqSpan;

use crate::awaited::Awaited;
use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::hidden::Hidden;
use crate::pending::PendingMarks;
use crate::replay::Replay;

/// The rows of one forward pass, as plain slices.
#[derive(Debug, Clone, Copy)]
pub struct StepInput<'a> {
    /// Token of each row, `[rows]`; any, where it is awaited.
    pub token_ids: &'a [u32],
    /// Absolute position of each row in its sequence, `[rows]`.
    pub positions: &'a [u32],
    /// Slot of the KV cache, and of the ring, that each row writes, `[rows]`.
    pub slot_mapping: &'a [u32],
    /// The sequences that the rows belong to, in row order.
    pub seqs: &'a [SeqSpan<'a>],
    /// Rows whose logits are wanted, in the order wanted.
    pub logit_rows: &'a [u32],
    /// Experts given for some of the rows.
    pub replay: Option<Replay<'a>>,
    /// Tokens of some of the rows that are still being sampled; on a device only.
    pub awaited: Option<Awaited<'a>>,
}

/// What the layers give.
#[derive(Debug)]
pub struct HiddenOutput {
    /// `[logit_rows, hidden]`, after the final norm.
    pub hidden: Hidden,
    /// Of the rows of the batch.
    pub marks: PendingMarks,
}

/// What a forward pass gives.
#[derive(Debug, Clone)]
pub struct StepOutput {
    /// F32 `[logit_rows, vocab]`.
    pub logits: Tensor,
    /// As [`Marks::nan_rows`].
    pub nan_rows: Vec<u32>,
    /// As [`Marks::changed_cells`].
    pub changed_cells: Vec<u32>,
}

/// What the routers tell of a step's rows.
#[derive(Debug, Clone, Default)]
pub struct Marks {
    /// Rows of the batch whose router saw NaN in any layer, ascending.
    pub nan_rows: Vec<u32>,
    /// MoE layers in which the free router would have chosen another set than the replay gives, `[rows]`, 0 for rows that
    /// it leaves free; empty without a replay.
    pub changed_cells: Vec<u32>,
}

/// What the rows have to stay below.
pub(crate) struct Limits<'a> {
    pub(crate) config: &'a ModelConfig,
    pub(crate) max_positions: usize,
    pub(crate) num_slots: usize,
}

impl StepInput<'_> {
    /// Refuses an input that would index outside of a table, before any kernel runs.
    pub(crate) fn check(&self, limits: &Limits<'_>) -> Result<()> {
        let rows = self.token_ids.len();
        equal("positions", rows, self.positions.len())?;
        equal("slot_mapping", rows, self.slot_mapping.len())?;
        below("token_ids", self.token_ids, limits.config.vocab_size)?;
        below("positions", self.positions, limits.max_positions)?;
        below("slot_mapping", self.slot_mapping, limits.num_slots)?;
        below("logit_rows", self.logit_rows, rows)?;
        let mut next = 0;
        for seq in self.seqs {
            if seq.rows.start != next || seq.rows.end < next {
                let expected = format!("row ranges that follow each other from row {next}");
                return Err(refused("seqs", expected, format!("{:?}", seq.rows)));
            }
            next = seq.rows.end;
        }
        equal("rows of seqs", rows, next)?;
        if let Some(awaited) = self.awaited {
            awaited.check(rows)?;
        }
        match self.replay {
            None => Ok(()),
            Some(replay) => replay.check(rows, limits.config),
        }
    }
}

pub(crate) fn equal(what: &'static str, expected: usize, found: usize) -> Result<()> {
    match expected == found {
        true => Ok(()),
        false => Err(refused(what, format!("{expected} (one for each token)"), found.to_string())),
    }
}

fn below(what: &'static str, values: &[u32], limit: usize) -> Result<()> {
    match values.iter().find(|&&value| value as usize >= limit) {
        None => Ok(()),
        Some(value) => Err(refused(what, format!("values below {limit}"), value.to_string())),
    }
}

pub(crate) fn refused(what: &'static str, expected: String, found: String) -> ModelError {
    ModelError::Input { what, expected, found }
}
