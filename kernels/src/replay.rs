//! Given experts in place of the router's own choice.

use crate::error::{KernelError, check_index, check_shape};
use crate::router::RouterConfig;

/// Experts given for some rows of a call; the other rows route freely.
#[derive(Clone, Copy, Debug)]
pub struct ReplayRows<'a> {
    /// For each row of the call: its row in `ids`, or [`ReplayRows::FREE`].
    pub row_of: &'a [u32],
    /// Expert ids `[replayed, moe_layers, top_k]`, 16 bits wide whatever the ring's cells are.
    pub ids: &'a [u16],
    /// MoE layers of `ids`.
    pub moe_layers: usize,
    /// The layer that is routing.
    pub moe_layer: usize,
}

impl ReplayRows<'_> {
    /// In `row_of`: this row routes freely.
    pub const FREE: u32 = u32::MAX;

    /// Refuses what does not fit a call of `n` rows; looks at the cells of this layer alone.
    pub(crate) fn check(&self, op: &'static str, n: usize, cfg: &RouterConfig) -> Result<(), KernelError> {
        check_shape(op, "rows of the replay", &[self.row_of.len()], &[n])?;
        check_index(op, "replayed MoE layer", self.moe_layer, self.moe_layers)?;
        let stride = self.moe_layers.saturating_mul(cfg.top_k);
        let replayed = self.ids.len() / stride;
        check_shape(op, "replayed ids", &[self.ids.len()], &[replayed * stride])?;
        for (row, &at) in self.row_of.iter().enumerate() {
            if at != Self::FREE {
                check_index(op, "replayed row", at as usize, replayed)?;
            }
            let cell = self.cell(row, cfg.top_k).unwrap_or_default();
            for (place, &id) in cell.iter().enumerate() {
                check_index(op, "replayed expert id", id.into(), cfg.num_experts)?;
                if cell[..place].contains(&id) {
                    return Err(KernelError::RepeatedExpert { op, row, id });
                }
            }
        }
        Ok(())
    }

    /// Overwrites the router's own `ids` of a row with those given for it, if any; whether the set became another.
    // Inlined, it slows the free rows of the loop around it by 6 %.
    #[inline(never)]
    pub(crate) fn put(&self, row: usize, ids: &mut [u32]) -> bool {
        let Some(given) = self.cell(row, ids.len()) else {
            return false;
        };
        // Both are distinct and of one length, so a subset is the set.
        let changed = given.iter().any(|&id| !ids.contains(&id.into()));
        for (id, &given) in ids.iter_mut().zip(given) {
            *id = given.into();
        }
        changed
    }

    fn cell(&self, row: usize, top_k: usize) -> Option<&[u16]> {
        let at = self.row_of[row];
        let first = || (at as usize * self.moe_layers + self.moe_layer) * top_k;
        (at != Self::FREE).then(|| &self.ids[first()..][..top_k])
    }
}
