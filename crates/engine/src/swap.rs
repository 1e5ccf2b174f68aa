//! The swap space: host memory where the KV of preempted sequences and of evicted prefixes waits.

use moetrail_models::{KvCache, ModelError, Result};
use moetrail_sched::BlockMove;

use crate::capture::Capture;

/// KV of the blocks in the swap space; their rows are with the ring's owner.
pub(crate) struct SwapSpace {
    kv: Vec<u8>,
    block_bytes: usize,
}

impl SwapSpace {
    /// Room for `num_blocks` blocks of `block_bytes`; memory is taken as blocks come.
    pub(crate) fn new(num_blocks: usize, block_bytes: usize) -> Self {
        Self { kv: vec![0; num_blocks * block_bytes], block_bytes }
    }

    /// Moves a block, KV and rows together.
    pub(crate) fn execute(&mut self, step: BlockMove, kv: &mut KvCache, capture: &mut Capture) -> Result<()> {
        let stretch = |host: u32| host as usize * self.block_bytes..(host as usize + 1) * self.block_bytes;
        match step {
            BlockMove::Copy { from, to } => kv.copy_block(from, to)?,
            BlockMove::SwapOut { block, host } => kv.read_block(block, &mut self.kv[stretch(host)])?,
            BlockMove::SwapIn { host, block } => kv.write_block(block, &self.kv[stretch(host)])?,
        }
        capture.move_block(step).map_err(ModelError::from)
    }
}
