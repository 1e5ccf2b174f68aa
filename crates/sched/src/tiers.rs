//! The two places where a block's KV and rows can be: the pool that forwards read, and the swap space on the host.

use crate::batch::BlockMove;
use crate::block_hash::BlockHash;
use crate::block_pool::{BlockPool, BlockRef};
use crate::sequence::RequestKey;

/// A referenced block, and where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Held {
    /// In the pool: ready to be read.
    Pool(BlockRef),
    /// In the swap space: to be brought in first.
    Host(BlockRef),
}

/// Pool and swap space. Content moves between them by the [`BlockMove`]s that a step executes in their order, so a
/// block may be given away in the same step that moves its content out.
#[derive(Debug)]
pub(crate) struct KvTiers {
    pub(crate) pool: BlockPool,
    /// Without a swap space it has no blocks.
    pub(crate) host: BlockPool,
}

impl KvTiers {
    pub(crate) fn new(num_blocks: u32, num_host_blocks: u32) -> Self {
        Self { pool: BlockPool::new(num_blocks), host: BlockPool::new(num_host_blocks) }
    }

    /// Takes a free block of the pool. What was cached in it moves to the swap space, if there is room.
    pub(crate) fn take(&mut self, owner: RequestKey, moves: &mut Vec<BlockMove>) -> Option<BlockRef> {
        let next = self.pool.next_free()?;
        if let Some(hash) = self.pool.hash(next) {
            let computed_by = self.pool.computed_by(next).unwrap_or(owner);
            if let Some(host) = self.host.acquire(hash).or_else(|| self.spill(next, hash, computed_by, moves)) {
                // Released anew, so that it counts as used just now.
                self.host.release(host);
            }
        }
        self.pool.allocate(owner)
    }

    fn spill(
        &mut self,
        block: u32,
        hash: BlockHash,
        computed_by: RequestKey,
        moves: &mut Vec<BlockMove>,
    ) -> Option<BlockRef> {
        let host = self.host.allocate(computed_by)?;
        self.host.publish(host, hash);
        moves.push(BlockMove::SwapOut { block, host: host.id });
        Some(host)
    }

    /// Moves the content of a sequence's blocks to the swap space, in order; all or nothing. The blocks of the pool
    /// stay referenced.
    pub(crate) fn swap_out(&mut self, blocks: &[BlockRef], moves: &mut Vec<BlockMove>) -> Option<Vec<BlockRef>> {
        if blocks.len() > self.host.num_free() {
            return None;
        }
        let mut taken = Vec::with_capacity(blocks.len());
        for block in blocks {
            let hash = self.pool.hash(block.id);
            let host = hash.and_then(|hash| self.host.acquire(hash)).or_else(|| {
                let host = self.host.allocate(self.pool.computed_by(block.id)?)?;
                moves.push(BlockMove::SwapOut { block: block.id, host: host.id });
                if let Some(hash) = hash {
                    self.host.publish(host, hash);
                }
                Some(host)
            });
            taken.push(host.expect("the free blocks were counted, and an owned block was computed by somebody"));
        }
        Some(taken)
    }

    /// Refers to a cached block, wherever it is.
    pub(crate) fn acquire(&mut self, hash: BlockHash) -> Option<Held> {
        let pool = self.pool.acquire(hash).map(Held::Pool);
        pool.or_else(|| self.host.acquire(hash).map(Held::Host))
    }

    /// Refers to the pool's copy of a block of the swap space, if it has one.
    pub(crate) fn nearest(&mut self, host: BlockRef) -> Held {
        let copy = self.host.hash(host.id).and_then(|hash| self.pool.acquire(hash));
        copy.map_or(Held::Host(host), Held::Pool)
    }

    /// Gives up one reference.
    pub(crate) fn release(&mut self, held: Held) {
        match held {
            Held::Pool(block) => self.pool.release(block),
            Held::Host(block) => self.host.release(block),
        }
    }

    /// Brings a block into the pool, which must have a free one; the reference then is to that.
    pub(crate) fn bring_in(&mut self, held: Held, moves: &mut Vec<BlockMove>) -> BlockRef {
        let host = match held {
            Held::Pool(block) => return block,
            Held::Host(host) => host,
        };
        let computed_by = self.host.computed_by(host.id).expect("a held block was computed by somebody");
        let block = self.take(computed_by, moves).expect("the free blocks were counted");
        moves.push(BlockMove::SwapIn { host: host.id, block: block.id });
        if let Some(hash) = self.host.hash(host.id) {
            self.pool.publish(block, hash);
        }
        self.host.release(host);
        block
    }

    /// Begins a new epoch in both places.
    pub(crate) fn forget_cached(&mut self) {
        self.pool.forget_cached();
        self.host.forget_cached();
    }
}
