//! The door from the ring to a ledger.

use moetrail_kernels::gpu::{GpuError, StagedRows};
use moetrail_routes::RowLedger;
use moetrail_sched::{BlockPool, BlockRef, RequestKey};

use crate::plan::{GatherPlan, SlotRun};
use crate::ring::{CaptureRing, Cells};

/// What a drain copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Drained {
    /// Rows copied to the host.
    pub rows: usize,
    /// Bytes copied to the host: `rows * moe_layers * top_k * itemsize`.
    pub bytes: usize,
    /// Of these rows, those whose block another request computed.
    pub rows_of_others: usize,
}

/// Rows whose place in a ledger is taken and whose bytes are still on their way from a device.
#[derive(Debug)]
pub struct Coming {
    /// Position of the first of them.
    pub(crate) start: usize,
    pub(crate) rows: StagedRows,
}

/// Why rows were not drained. The ledger is as it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DrainError {
    /// A block has a new owner: its rows are no longer this sequence's.
    #[error("block {} was of generation {}, it is of generation {found} now: its rows are gone", block.id, block.generation)]
    GenerationMismatch {
        /// The block, as the sequence knows it.
        block: BlockRef,
        /// Its present generation.
        found: u32,
    },
    /// The block table is too short for the rows asked for.
    #[error("rows up to {upto} were asked for, the block table holds {blocks} blocks")]
    OutOfBlocks {
        /// One past the last position asked for.
        upto: usize,
        /// Length of the block table.
        blocks: usize,
    },
    /// The device refused a copy.
    #[error(transparent)]
    Device(#[from] GpuError),
}

/// Brings a ledger up to position `upto` from the ring.
///
/// The plan covers `[ledger.end, upto)` and nothing else: rows below the honoured start and rows that the host has
/// already are left out before the copy, not after it. `request` tells own blocks from those found in the cache.
///
/// Rows of host memory are in the ledger when the call returns. Those of a device are only sent: the ledger has zeros in
/// their places until what is returned has landed. The blocks may be given away at once in either case.
///
/// # Errors
/// [`DrainError`]; the ledger is then unchanged.
pub fn drain(
    ring: &CaptureRing,
    pool: &BlockPool,
    blocks: &[BlockRef],
    request: RequestKey,
    ledger: &mut RowLedger,
    upto: usize,
) -> Result<(Drained, Option<Coming>), DrainError> {
    let plan = GatherPlan::new(ledger.missing(upto), blocks, ring.block_size())
        .ok_or(DrainError::OutOfBlocks { upto, blocks: blocks.len() })?;
    for run in plan.runs() {
        if !pool.is_current(run.block) {
            return Err(DrainError::GenerationMismatch { block: run.block, found: pool.generation(run.block.id) });
        }
    }
    let row_bytes = ring.layout().row_bytes();
    let first_slot = |run: &SlotRun| run.block.id as usize * ring.block_size() + run.offset;
    let coming = match ring.cells() {
        Cells::Device(cells) if !plan.span().is_empty() => {
            let slots = plan.runs().iter().flat_map(|run| (0..run.len).map(move |i| first_slot(run) + i));
            Some(Coming { start: plan.span().start, rows: cells.send(slots)? })
        }
        _ => None,
    };
    ledger.fill(upto, |rows| match &coming {
        Some(_) => rows.resize(rows.len() + plan.span().len() * row_bytes, 0),
        None => plan.runs().iter().for_each(|run| ring.read(first_slot(run), run.len, rows)),
    });
    let foreign = |block: BlockRef| pool.computed_by(block.id).is_some_and(|owner| owner != request);
    let drained = Drained {
        rows: plan.span().len(),
        bytes: plan.span().len() * row_bytes,
        rows_of_others: plan.runs().iter().filter(|run| foreign(run.block)).map(|run| run.len).sum(),
    };
    Ok((drained, coming))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::RingLayout;

    const OWNER: RequestKey = RequestKey(1);

    /// A pool of four blocks of two slots; slot `i` holds the id `i`.
    fn ring_and_pool() -> (CaptureRing, BlockPool) {
        let mut ring = CaptureRing::new(RingLayout::new(1, vec![0], 1, 8), 4, 2);
        if let Cells::U8(cells) = ring.cells_mut() {
            cells.iter_mut().enumerate().for_each(|(i, cell)| *cell = i as u8);
        }
        (ring, BlockPool::new(4))
    }

    #[test]
    fn copies_only_what_is_missing() {
        let (ring, mut pool) = ring_and_pool();
        let blocks: Vec<BlockRef> = (0..3).map(|_| pool.allocate(OWNER).unwrap()).collect();
        let mut ledger = RowLedger::new(1, 1);
        let drained = drain(&ring, &pool, &blocks, OWNER, &mut ledger, 3).unwrap().0;
        assert_eq!(drained, Drained { rows: 2, bytes: 2, rows_of_others: 0 });
        let drained = drain(&ring, &pool, &blocks, RequestKey(2), &mut ledger, 6).unwrap().0;
        assert_eq!(drained, Drained { rows: 3, bytes: 3, rows_of_others: 3 });
        assert_eq!(ledger.data(), [1, 2, 3, 4, 5]);
        assert_eq!(drain(&ring, &pool, &blocks, OWNER, &mut ledger, 2).unwrap().0, Drained::default());
    }

    #[test]
    fn a_reused_block_is_refused() {
        let (ring, mut pool) = ring_and_pool();
        let block = pool.allocate(OWNER).unwrap();
        pool.release(block);
        while pool.allocate(OWNER).is_some_and(|next| next.id != block.id) {}
        let mut ledger = RowLedger::new(0, 1);
        let error = drain(&ring, &pool, &[block], OWNER, &mut ledger, 1).unwrap_err();
        assert_eq!(error.to_string(), "block 0 was of generation 1, it is of generation 2 now: its rows are gone");
        assert_eq!(ledger.end(), 0);
        let error = drain(&ring, &pool, &[], OWNER, &mut ledger, 1).unwrap_err();
        assert_eq!(error.to_string(), "rows up to 1 were asked for, the block table holds 0 blocks");
    }

    #[test]
    fn copy_on_write_takes_the_rows_along() {
        let (mut ring, mut pool) = ring_and_pool();
        let blocks: Vec<BlockRef> = (0..2).map(|_| pool.allocate(OWNER).unwrap()).collect();
        ring.copy_block(blocks[1].id, blocks[0].id).unwrap();
        let mut ledger = RowLedger::new(0, 1);
        drain(&ring, &pool, &blocks, OWNER, &mut ledger, 4).unwrap();
        assert_eq!(ledger.data(), [2, 3, 2, 3]);
    }
}
