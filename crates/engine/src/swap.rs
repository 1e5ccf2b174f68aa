//! The swap space: host memory where the KV of preempted sequences and of evicted prefixes waits.

use moetrail_models::{KvCache, ModelError, Result, SwappedKv};
use moetrail_sched::BlockMove;

use crate::capture::Capture;

/// KV of the blocks in the swap space; their rows are with the ring's owner.
pub(crate) struct SwapSpace(SwappedKv);

impl SwapSpace {
    /// Room for `num_blocks` blocks of the cache.
    pub(crate) fn new(kv: &KvCache, num_blocks: usize) -> Result<Self> {
        kv.swap_space(num_blocks).map(Self)
    }

    /// Moves a block, KV and rows together. On a device the moves are issued in their order, with the steps around them.
    pub(crate) fn execute(&mut self, step: BlockMove, kv: &mut KvCache, capture: &mut Capture) -> Result<()> {
        match step {
            BlockMove::Copy { from, to } => kv.copy_block(from, to)?,
            BlockMove::SwapOut { block, host } => kv.swap_out(block, &mut self.0, host)?,
            BlockMove::SwapIn { host, block } => kv.swap_in(&self.0, host, block)?,
        }
        capture.move_block(step).map_err(ModelError::from)
    }
}
