use crate::gpu::{Gpu, GpuError, PinnedBuffer};

/// Blocks of one size in pinned host memory, where the device puts blocks of its own and takes them back.
///
/// Moves are issued to [`Stream::Compute`](crate::gpu::Stream::Compute) and nobody waits for one. That is enough, as all
/// that meets a block's bytes is on that stream: what wrote the device's block before it moves out, what writes that block
/// next, the moves into a block here, and the moves from it. The host neither reads nor writes the bytes, so this type has
/// no way to do so.
#[derive(Debug)]
pub struct PinnedBlocks {
    memory: PinnedBuffer,
    block_bytes: usize,
}

impl PinnedBlocks {
    /// Room for `num_blocks` blocks, all of it taken at once.
    pub fn new(gpu: &Gpu, num_blocks: usize, block_bytes: usize) -> Result<PinnedBlocks, GpuError> {
        Ok(PinnedBlocks { memory: PinnedBuffer::new(gpu, num_blocks * block_bytes)?, block_bytes })
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// Where a block is.
    pub(crate) fn place(&self, block: u32) -> u64 {
        let first = block as usize * self.block_bytes;
        assert!(first + self.block_bytes <= self.memory.len(), "block {block} of {} bytes", self.memory.len());
        self.memory.address() + first as u64
    }
}
