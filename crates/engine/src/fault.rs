//! Faults planted by tests, to show that the invariance test would notice them.

use moetrail_routes::RowLedger;
use moetrail_sched::{BlockPool, BlockRef};

/// What goes wrong.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    #[default]
    None,
    /// Every drain delivers the rows of the positions one further.
    RowShift,
    /// A drain reads its last block through a table that is out of date.
    StaleBlock,
    /// Copy-on-write copies the KV and forgets the rows.
    RowLostOnCopyOnWrite,
    /// The pool has given the last block to another owner behind the sequence's back.
    BlockGivenAway,
}

impl Fault {
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

    /// What the faulty drain does to rows that arrived from `old_end` on.
    pub(crate) fn damage(self, ledger: &mut RowLedger, old_end: usize) {
        if self == Self::RowShift && ledger.end() > old_end {
            let (start, row_bytes) = (ledger.start(), ledger.row_bytes());
            let mut rows = ledger.data()[(old_end - start) * row_bytes..].to_vec();
            rows.rotate_left(row_bytes);
            ledger.truncate(old_end);
            ledger.append(old_end, &rows).expect("the rows follow the ledger's end");
        }
    }
}
