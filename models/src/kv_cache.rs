use moetrail_kernels::KvPool;
use moetrail_kernels::gpu::{DeviceKv, PinnedBlocks};

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

    /// Host memory for `num_blocks` blocks that leave the cache.
    ///
    /// # Errors
    /// A device's host has not as much pinned memory.
    pub fn swap_space(&self, num_blocks: usize) -> Result<SwappedKv> {
        Ok(match self {
            KvCache::Host(pool) => {
                let block_bytes = pool.bytes() / pool.num_blocks().max(1);
                SwappedKv::Host { bytes: vec![0; num_blocks * block_bytes], block_bytes }
            }
            KvCache::Device(kv) => SwappedKv::Device(kv.pinned_blocks(num_blocks)?),
        })
    }

    /// Copies block `block` to block `host` of the swap space. On a device the copy is issued behind all steps before, and
    /// nothing waits for it.
    ///
    /// # Errors
    /// What the device refuses.
    ///
    /// # Panics
    /// When a block is outside, or the swap space is another cache's.
    pub fn swap_out(&self, block: u32, to: &mut SwappedKv, host: u32) -> Result<()> {
        match (self, to) {
            (KvCache::Host(pool), SwappedKv::Host { bytes, block_bytes }) => {
                pool.read_block(block, &mut bytes[host as usize * *block_bytes..][..*block_bytes]);
            }
            (KvCache::Device(kv), SwappedKv::Device(blocks)) => kv.move_out(block, blocks, host)?,
            _ => panic!("{ELSEWHERE}"),
        }
        Ok(())
    }

    /// Copies block `host` of the swap space over block `block`, as [`swap_out`](Self::swap_out) does.
    ///
    /// # Errors
    /// What the device refuses.
    ///
    /// # Panics
    /// As [`swap_out`](Self::swap_out).
    pub fn swap_in(&mut self, from: &SwappedKv, host: u32, block: u32) -> Result<()> {
        match (self, from) {
            (KvCache::Host(pool), SwappedKv::Host { bytes, block_bytes }) => {
                pool.write_block(block, &bytes[host as usize * block_bytes..][..*block_bytes]);
            }
            (KvCache::Device(kv), SwappedKv::Device(blocks)) => kv.move_in(blocks, host, block)?,
            _ => panic!("{ELSEWHERE}"),
        }
        Ok(())
    }
}

const ELSEWHERE: &str = "a swap space is that of its cache";

/// Blocks of a cache that wait in host memory.
pub enum SwappedKv {
    /// Of a cache in host memory; memory is taken as blocks come.
    Host {
        /// One block after another, each as [`KvPool::read_block`] gives it.
        bytes: Vec<u8>,
        /// Bytes of one.
        block_bytes: usize,
    },
    /// Of a cache in device memory.
    Device(PinnedBlocks),
}
