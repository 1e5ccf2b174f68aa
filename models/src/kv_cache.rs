use moetrail_kernels::KvPool;
use moetrail_kernels::gpu::DeviceKv;

use crate::error::Result;

/// The paged cache of keys and values, where the decoder computes.
pub enum KvCache {
    /// In host memory.
    Host(KvPool),
    /// In the memory of the decoder's device.
    Device(DeviceKv),
}

impl KvCache {
    /// Blocks of a layer.
    pub fn num_blocks(&self) -> usize {
        match self {
            KvCache::Host(pool) => pool.num_blocks(),
            KvCache::Device(kv) => kv.num_blocks(),
        }
    }

    /// Slots of a block.
    pub fn block_size(&self) -> usize {
        match self {
            KvCache::Host(pool) => pool.block_size(),
            KvCache::Device(kv) => kv.block_size(),
        }
    }

    /// Bytes of the whole cache.
    pub fn bytes(&self) -> usize {
        match self {
            KvCache::Host(pool) => pool.bytes(),
            KvCache::Device(kv) => kv.bytes(),
        }
    }

    /// Copies block `src` to block `dst` in every layer.
    ///
    /// # Errors
    /// What the device refuses.
    ///
    /// # Panics
    /// When a block is outside the cache.
    pub fn copy_block(&mut self, src: u32, dst: u32) -> Result<()> {
        match self {
            KvCache::Host(pool) => pool.copy_block(src, dst),
            KvCache::Device(kv) => kv.copy_block(src, dst)?,
        }
        Ok(())
    }

    /// Copies block `block` to `to`: for each layer its K, then its V.
    ///
    /// # Errors
    /// What the device refuses.
    ///
    /// # Panics
    /// When the block is outside the cache or `to` is not exactly one block.
    pub fn read_block(&self, block: u32, to: &mut [u8]) -> Result<()> {
        match self {
            KvCache::Host(pool) => pool.read_block(block, to),
            KvCache::Device(kv) => kv.read_block(block, to)?,
        }
        Ok(())
    }

    /// Overwrites block `block` with the bytes [`read_block`](Self::read_block) gave.
    ///
    /// # Errors
    /// What the device refuses.
    ///
    /// # Panics
    /// When the block is outside the cache or the bytes are not exactly one block.
    pub fn write_block(&mut self, block: u32, from: &[u8]) -> Result<()> {
        match self {
            KvCache::Host(pool) => pool.write_block(block, from),
            KvCache::Device(kv) => kv.write_block(block, from)?,
        }
        Ok(())
    }
}
