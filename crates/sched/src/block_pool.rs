//! Fixed-size blocks of KV slots: reference counts, generations, and the prefix cache over them.

use rustc_hash::FxHashMap;

use crate::block_hash::BlockHash;
use crate::free_list::FreeList;
use crate::sequence::RequestKey;

/// A block as its owner knows it. The pool may since have given it to another owner: then the generations differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockRef {
    /// Index of the block; its slots are `id * block_size ..`.
    pub id: u32,
    /// Counts the owners that the block has had.
    pub generation: u32,
}

#[derive(Debug, Clone, Default)]
struct Block {
    generation: u32,
    refs: u32,
    /// Set while the block is full and can be matched.
    hash: Option<BlockHash>,
    /// The request whose forward filled the block.
    computed_by: Option<RequestKey>,
    /// The epoch in which the block got its owner.
    epoch: u64,
}

/// All blocks of the KV pool. A freed block keeps its hash, generation and content until it is reused, oldest first.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    free: FreeList,
    cached: FxHashMap<BlockHash, u32>,
    /// Counts how often everything cached became stale.
    epoch: u64,
}

impl BlockPool {
    /// `num_blocks` free blocks.
    pub fn new(num_blocks: u32) -> Self {
        Self {
            blocks: vec![Block::default(); num_blocks as usize],
            free: FreeList::full(num_blocks),
            cached: FxHashMap::default(),
            epoch: 0,
        }
    }

    /// Number of blocks.
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that nobody refers to, cached ones included.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// The block's present generation.
    pub fn generation(&self, id: u32) -> u32 {
        self.blocks[id as usize].generation
    }

    /// Whether the block is still the owner's that `block` names.
    pub fn is_current(&self, block: BlockRef) -> bool {
        self.generation(block.id) == block.generation
    }

    /// How many sequences refer to the block.
    pub fn refs(&self, id: u32) -> u32 {
        self.blocks[id as usize].refs
    }

    /// The request whose forward filled the block, if it was filled.
    pub fn computed_by(&self, id: u32) -> Option<RequestKey> {
        self.blocks[id as usize].computed_by
    }

    /// The name under which the block can be matched.
    pub fn hash(&self, id: u32) -> Option<BlockHash> {
        self.blocks[id as usize].hash
    }

    /// The present epoch.
    pub fn current_epoch(&self) -> u64 {
        self.epoch
    }

    /// The block that [`allocate`](Self::allocate) takes next.
    pub fn next_free(&self) -> Option<u32> {
        self.free.front()
    }

    /// Takes the least recently used free block, with a new generation.
    pub fn allocate(&mut self, owner: RequestKey) -> Option<BlockRef> {
        let id = self.free.pop_front()?;
        let block = &mut self.blocks[id as usize];
        if let Some(hash) = block.hash.take() {
            self.cached.remove(&hash);
        }
        block.generation = block.generation.wrapping_add(1);
        block.refs = 1;
        block.computed_by = Some(owner);
        block.epoch = self.epoch;
        Some(BlockRef { id, generation: block.generation })
    }

    /// Adds an owner to a block that has one.
    pub fn share(&mut self, block: BlockRef) {
        debug_assert!(self.is_current(block) && self.refs(block.id) > 0, "only a live block can be shared");
        self.blocks[block.id as usize].refs += 1;
    }

    /// Gives up one reference. Without a hash the block holds nothing worth keeping, and is reused first.
    pub fn release(&mut self, block: BlockRef) {
        debug_assert!(self.is_current(block), "a stale reference is never released");
        let entry = &mut self.blocks[block.id as usize];
        entry.refs -= 1;
        if entry.refs == 0 {
            if entry.hash.is_some() {
                self.free.push_back(block.id);
            } else {
                self.free.push_front(block.id);
            }
        }
    }

    /// Makes a full block matchable. Of identical blocks, the first stays the one that is found.
    pub fn publish(&mut self, block: BlockRef, hash: BlockHash) {
        debug_assert!(self.is_current(block), "only an owner publishes its block");
        if !self.cached.contains_key(&hash) && self.blocks[block.id as usize].hash.is_none() {
            self.cached.insert(hash, block.id);
            self.blocks[block.id as usize].hash = Some(hash);
        }
    }

    /// Begins a new epoch: no block of an earlier one can be matched.
    pub fn forget_cached(&mut self) {
        self.epoch += 1;
        for (_, id) in self.cached.drain() {
            self.blocks[id as usize].hash = None;
        }
    }

    /// Finds a cached block and refers to it.
    pub fn acquire(&mut self, hash: BlockHash) -> Option<BlockRef> {
        let id = *self.cached.get(&hash)?;
        let block = &mut self.blocks[id as usize];
        if block.refs == 0 {
            self.free.remove(id);
        }
        block.refs += 1;
        Some(BlockRef { id, generation: block.generation })
    }

    /// Checks that references, free list and cache agree; `owned` lists every reference that sequences hold.
    ///
    /// # Errors
    /// A sentence saying what disagrees.
    pub fn check_integrity(&self, owned: impl Iterator<Item = BlockRef>) -> Result<(), String> {
        let mut refs = vec![0u32; self.blocks.len()];
        for block in owned {
            if !self.is_current(block) {
                return Err(format!("{block:?} is held, but its generation is {}", self.generation(block.id)));
            }
            refs[block.id as usize] += 1;
        }
        for (id, block) in self.blocks.iter().enumerate() {
            if block.refs != refs[id] {
                return Err(format!("block {id} counts {} references, sequences hold {}", block.refs, refs[id]));
            }
        }
        let free = self.blocks.iter().filter(|block| block.refs == 0).count();
        if free != self.free.len() {
            return Err(format!("{free} blocks are unreferenced, the free list has {}", self.free.len()));
        }
        for (hash, id) in &self.cached {
            let block = &self.blocks[*id as usize];
            if block.hash != Some(*hash) {
                return Err(format!("block {id} is cached under a hash that it does not carry"));
            }
            if block.epoch != self.epoch {
                return Err(format!("block {id} of epoch {} can be matched in epoch {}", block.epoch, self.epoch));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block_hash::CacheScope;

    const OWNER: RequestKey = RequestKey(1);

    fn hash(n: u32) -> BlockHash {
        BlockHash::root(&CacheScope::default()).child(&[n], None)
    }

    #[test]
    fn a_freed_block_is_found_until_it_is_reused() {
        let mut pool = BlockPool::new(2);
        let block = pool.allocate(OWNER).unwrap();
        pool.publish(block, hash(1));
        pool.release(block);
        assert_eq!(pool.num_free(), 2);
        assert_eq!(pool.acquire(hash(1)), Some(block));
        pool.release(block);
        // The other block has no content and goes first, then the cached one.
        assert_ne!(pool.allocate(OWNER).unwrap().id, block.id);
        let reused = pool.allocate(OWNER).unwrap();
        assert_eq!((reused.id, reused.generation), (block.id, block.generation + 1));
        assert!(!pool.is_current(block));
        assert_eq!(pool.acquire(hash(1)), None);
        assert_eq!(pool.allocate(OWNER), None);
    }

    #[test]
    fn the_first_of_identical_blocks_stays_matchable() {
        let mut pool = BlockPool::new(2);
        let (first, second) = (pool.allocate(OWNER).unwrap(), pool.allocate(OWNER).unwrap());
        pool.publish(first, hash(1));
        pool.publish(second, hash(1));
        pool.release(second);
        assert_eq!(pool.acquire(hash(1)), Some(first));
        assert_eq!(pool.check_integrity([first, first].into_iter()), Ok(()));
    }

    #[test]
    fn integrity_notices_a_lost_reference() {
        let mut pool = BlockPool::new(2);
        pool.allocate(OWNER).unwrap();
        let error = pool.check_integrity(std::iter::empty()).unwrap_err();
        assert_eq!(error, "block 0 counts 1 references, sequences hold 0");
    }
}
