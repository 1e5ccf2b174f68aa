//! Given experts for the rows of a step.

use moetrail_kernels::ReplayRows;

use crate::config::ModelConfig;
use crate::error::Result;
use crate::step::{equal, refused};

/// Experts that some rows of a step take in place of the router's choice, in every MoE layer; the others route freely.
#[derive(Debug, Clone, Copy)]
pub struct Replay<'a> {
    /// For each row of the step, its row in `ids`, or [`Replay::FREE`]; `[rows]`.
    pub row_of: &'a [u32],
    /// Expert ids, distinct in a cell, `[replayed, moe_layers, top_k]`, in the order of
    /// [`ModelConfig::moe_layers`](crate::ModelConfig::moe_layers).
    pub ids: &'a [u16],
}

impl<'a> Replay<'a> {
    /// In `row_of`: this row routes freely.
    pub const FREE: u32 = ReplayRows::FREE;

    /// What the router of one of the MoE layers takes from it.
    pub(crate) fn of_layer(self, moe_layer: usize, moe_layers: usize) -> ReplayRows<'a> {
        ReplayRows { row_of: self.row_of, ids: self.ids, moe_layers, moe_layer }
    }

    /// Refuses what does not fit a step of `rows`: no layer has run then, where a router would refuse in the middle.
    pub(crate) fn check(self, rows: usize, config: &ModelConfig) -> Result<()> {
        equal("replay.row_of", rows, self.row_of.len())?;
        let (moe_layers, top_k) = (config.moe_layers.len(), config.num_experts_per_tok);
        let width = moe_layers * top_k;
        let replayed = self.ids.len().checked_div(width).unwrap_or(0);
        if self.ids.len() != replayed * width {
            let expected = format!("rows of {moe_layers} MoE layers with {top_k} ids each");
            return Err(refused("replay.ids", expected, format!("{} ids", self.ids.len())));
        }
        if let Some(at) = self.row_of.iter().find(|&&at| at != Self::FREE && at as usize >= replayed) {
            return Err(refused("replay.row_of", format!("values below {replayed}, or none"), at.to_string()));
        }
        if let Some(id) = self.ids.iter().find(|&&id| usize::from(id) >= config.num_experts) {
            return Err(refused("replay.ids", format!("values below {}", config.num_experts), id.to_string()));
        }
        let repeats = |cell: &[u16]| (1..cell.len()).any(|place| cell[..place].contains(&cell[place]));
        match self.ids.chunks_exact(top_k.max(1)).find(|cell| repeats(cell)) {
            None => Ok(()),
            Some(cell) => Err(refused("replay.ids", "distinct experts in a cell".to_owned(), format!("{cell:?}"))),
        }
    }
}
