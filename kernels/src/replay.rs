//! Given experts in place of chosen ones.

use crate::error::{KernelError, check_index, check_shape};

const OP: &str = "replay";

/// In [`RouterReplay::row_of`]: the router chooses.
pub const FREE: u32 = u32::MAX;

/// Given experts for some rows of a batch, over all MoE layers. Megatron-Core calls this by the same name.
#[derive(Clone, Copy, Debug)]
pub struct RouterReplay<'a> {
    /// For each row of the batch: its row in `ids`, or [`FREE`].
    pub row_of: &'a [u32],
    /// `[replayed rows, moe_layers, top_k]`; the order is that in which the experts are added up.
    pub ids: &'a [u16],
    /// MoE layers of `ids`.
    pub moe_layers: usize,
}

impl RouterReplay<'_> {
    /// Refuses anything that would index outside of a table, or have an expert twice in a cell.
    pub fn check(&self, rows: usize, top_k: usize, num_experts: usize) -> Result<(), KernelError> {
        let stride = self.moe_layers * top_k;
        let given = self.ids.len().checked_div(stride).unwrap_or(0);
        check_shape(OP, "ids", &[self.ids.len()], &[given * stride])?;
        check_shape(OP, "row_of", &[self.row_of.len()], &[rows])?;
        for &row in self.row_of.iter().filter(|row| **row != FREE) {
            check_index(OP, "row of ids", row as usize, given)?;
        }
        for cell in self.ids.chunks_exact(top_k.max(1)) {
            for (k, &id) in cell.iter().enumerate() {
                check_index(OP, "expert", id.into(), num_experts)?;
                if cell[..k].contains(&id) {
                    return Err(KernelError::RepeatedExpert { op: OP, expert: id });
                }
            }
        }
        Ok(())
    }

    /// The given experts of a row in a layer.
    pub(crate) fn cell(&self, row: usize, moe_layer: usize, top_k: usize) -> Option<&[u16]> {
        let given = self.row_of[row];
        let first = (given as usize * self.moe_layers + moe_layer) * top_k;
        (given != FREE).then(|| &self.ids[first..first + top_k])
    }
}

/// Whether two lists of distinct experts are different sets.
pub(crate) fn sets_differ(chosen: &[u32], given: &[u16]) -> bool {
    given.iter().any(|id| !chosen.contains(&u32::from(*id)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_router_chooses_is_refused() {
        let check = |row_of: &[u32], ids: &[u16]| {
            let replay = RouterReplay { row_of, ids, moe_layers: 2 };
            replay.check(2, 2, 4).map_err(|error| error.to_string())
        };
        assert_eq!(check(&[0, FREE], &[0, 1, 3, 2]), Ok(()));
        assert_eq!(check(&[FREE, FREE], &[]), Ok(()));
        let refused = |row_of: &[u32], ids: &[u16], part: &str| {
            let error = check(row_of, ids).unwrap_err();
            assert!(error.contains(part), "{error}");
        };
        refused(&[0], &[0, 1, 3, 2], "row_of is [1], expected [2]");
        refused(&[0, 1], &[0, 1, 3, 2], "row of ids 1 is not below 1");
        refused(&[0, 0], &[0, 1, 3], "ids is [3], expected [0]");
        refused(&[0, 0], &[0, 1, 4, 2], "expert 4 is not below 4");
        refused(&[0, 0], &[0, 1, 2, 2], "expert 2 occurs twice");
    }

    #[test]
    fn order_makes_no_other_set() {
        assert!(!sets_differ(&[3, 1, 2], &[1, 2, 3]));
        assert!(sets_differ(&[3, 1, 2], &[1, 2, 0]));
    }
}
