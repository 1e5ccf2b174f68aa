//! What one step computes: plain arrays, ready for a model.

use std::ops::Range;

use moetrail_routes::TokenSpan;

use crate::sequence::SeqId;

/// One step's work. Rows are tokens; the rows of a sequence are consecutive positions.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// Token ids, `[num_tokens]`; 0 where a row [awaits](Scheduled::awaits) its token.
    pub token_ids: Vec<u32>,
    /// Absolute positions, `[num_tokens]`.
    pub positions: Vec<u32>,
    /// KV slot of each token, `block * block_size + offset`, `[num_tokens]`.
    pub slot_mapping: Vec<u32>,
    /// Block ids of all sequences, one after the other.
    pub block_tables: Vec<u32>,
    /// The sequences, in row order.
    pub scheduled: Vec<Scheduled>,
    /// Blocks to move, in this order, before anything is written.
    pub moves: Vec<BlockMove>,
    /// Sequences that lost their blocks in this step.
    pub num_preempted: usize,
    /// Sequences that were left out for want of blocks.
    pub num_short: usize,
}

/// One sequence's part of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scheduled {
    /// Which sequence.
    pub seq: SeqId,
    /// Its rows in the batch.
    pub rows: Range<usize>,
    /// Absolute position of its first row.
    pub first_position: usize,
    /// Its part of `block_tables`.
    pub blocks: Range<usize>,
    /// Whether its last row is its last known token, so that the next token follows from it.
    pub samples: bool,
    /// Whether its last row's token is what the step before, which is still on its way, samples.
    pub awaits: bool,
    /// How many of its rows had been computed before and were lost.
    pub num_recomputed: usize,
}

/// A move of a whole block, KV and rows together, by block id. The content stays valid where it came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockMove {
    /// Copy-on-write within the pool.
    Copy {
        /// Shared block.
        from: u32,
        /// Fresh block.
        to: u32,
    },
    /// From the pool to the swap space.
    SwapOut {
        /// Block of the pool.
        block: u32,
        /// Block of the swap space.
        host: u32,
    },
    /// From the swap space to the pool.
    SwapIn {
        /// Block of the swap space.
        host: u32,
        /// Block of the pool.
        block: u32,
    },
}

impl Scheduled {
    /// The positions of its rows.
    pub fn span(&self) -> TokenSpan {
        TokenSpan::new(self.first_position, self.first_position + self.rows.len())
    }
}

impl Batch {
    /// Number of rows.
    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// Whether there is nothing to compute.
    pub fn is_empty(&self) -> bool {
        self.scheduled.is_empty()
    }

    /// Empties the batch and keeps its memory.
    pub(crate) fn clear(&mut self) {
        self.token_ids.clear();
        self.positions.clear();
        self.slot_mapping.clear();
        self.block_tables.clear();
        self.scheduled.clear();
        self.moves.clear();
        self.num_preempted = 0;
        self.num_short = 0;
    }
}
