//! Faults planted by tests, to show that the invariance test would notice them.

use moetrail_sched::{BlockMove, BlockPool, BlockRef};

/// What goes wrong.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    #[default]
    None,
    /// Every row is that of the position one further.
    RowShift,
    /// A drain reads its last block through a table that is out of date.
    StaleBlock,
    /// Copy-on-write copies the KV and forgets the rows.
    RowLostOnCopyOnWrite,
    /// A swap moves the KV and forgets the rows.
    RowLostOnSwap,
    /// The pool has given the last block to another owner behind the sequence's back.
    BlockGivenAway,
}

impl Fault {
    /// Whether the row half of a move is forgotten.
    pub(crate) fn loses_rows_of(self, step: BlockMove) -> bool {
        match step {
            BlockMove::Copy { .. } => self == Self::RowLostOnCopyOnWrite,
            BlockMove::SwapOut { .. } | BlockMove::SwapIn { .. } => self == Self::RowLostOnSwap,
        }
    }

    /// The block table as the faulty drain sees it.
    pub(crate) fn blocks(self, blocks: &[BlockRef], pool: &BlockPool) -> Vec<BlockRef> {
        let mut blocks = blocks.to_vec();
        if let (Self::StaleBlock, Some(last)) = (self, blocks.last_mut()) {
            let id = (last.id + 1) % pool.num_blocks() as u32;
            *last = BlockRef { id, generation: pool.generation(id) };
        }
        if let (Self::BlockGivenAway, Some(last)) = (self, blocks.last_mut()) {
            last.generation = last.generation.wrapping_sub(1);
        }
        blocks
    }

    /// What becomes of rows on their way to the client.
    pub(crate) fn damaged(self, mut rows: Vec<u8>, row_bytes: usize) -> Vec<u8> {
        if self == Self::RowShift && !rows.is_empty() {
            rows.rotate_left(row_bytes);
        }
        rows
    }
}
