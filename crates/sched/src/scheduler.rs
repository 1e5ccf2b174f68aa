//! Continuous batching under one token budget: decode first, chunked prefill, preemption by swap or recompute.

mod plan;

use std::collections::BTreeSet;

use rustc_hash::FxHashMap;

use crate::batch::{Batch, BlockMove};
use crate::block_hash::{BlockHash, CacheScope};
use crate::block_pool::BlockPool;
use crate::sequence::{NewSequence, SeqId, Sequence, ServiceKey, Swapped};
use crate::tiers::KvTiers;

/// What becomes of a sequence that loses its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// Their content waits for it in the swap space.
    Swap,
    /// It is computed again.
    Recompute,
}

/// Called for every sequence about to lose its blocks, while it still has them: that is when its rows are drained.
pub type BeforeRelease<'a> = dyn FnMut(&Sequence, &BlockPool, Release) + 'a;

/// Limits, fixed at start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Tokens in a block.
    pub block_size: usize,
    /// Blocks in the pool.
    pub num_blocks: usize,
    /// Blocks in the swap space on the host; 0 is none.
    pub num_host_blocks: usize,
    /// Whether a sequence that is computed again keeps away from the prefix cache from then on: its routing is given,
    /// so its KV need not be what others would compute.
    pub private_recompute: bool,
    /// Sequences that run at once, at most.
    pub max_num_seqs: usize,
    /// Tokens in a step, at most.
    pub max_num_batched_tokens: usize,
    /// Whether full blocks are kept for later prompts.
    pub enable_prefix_caching: bool,
}

/// Decides what each step computes, and owns the block pool.
///
/// The step path is: [`schedule`](Self::schedule), forward, [`commit`](Self::commit), then for each sequence that
/// samples [`push_token`](Self::push_token), [`fork`](Self::fork) or [`remove`](Self::remove). Where a device computes,
/// [`schedule_ahead`](Self::schedule_ahead) plans the step after it before its commit.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    tiers: KvTiers,
    seqs: FxHashMap<SeqId, Sequence>,
    /// In service order; the last is the first to be preempted.
    running: BTreeSet<ServiceKey>,
    /// In service order. Preempted sequences come back here, and their key puts them before later arrivals.
    waiting: BTreeSet<ServiceKey>,
    next_id: u64,
    /// Plans made so far.
    plans: u64,
}

impl Scheduler {
    /// An idle scheduler over an empty pool.
    pub fn new(config: SchedulerConfig) -> Self {
        let number = |blocks: usize| u32::try_from(blocks).expect("slots are numbered by u32, so blocks are, too");
        let (num_blocks, num_host_blocks) = (number(config.num_blocks), number(config.num_host_blocks));
        Self {
            config,
            tiers: KvTiers::new(num_blocks, num_host_blocks),
            seqs: FxHashMap::default(),
            running: BTreeSet::new(),
            waiting: BTreeSet::new(),
            next_id: 0,
            plans: 0,
        }
    }

    /// The limits.
    pub fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    /// The swap space.
    pub fn host(&self) -> &BlockPool {
        &self.tiers.host
    }

    /// The block pool.
    pub fn pool(&self) -> &BlockPool {
        &self.tiers.pool
    }

    /// Sequences with a seat.
    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    /// Sequences without a seat.
    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether any sequence is left.
    pub fn is_idle(&self) -> bool {
        self.seqs.is_empty()
    }

    /// A live sequence.
    pub fn get(&self, seq: SeqId) -> Option<&Sequence> {
        self.seqs.get(&seq)
    }

    /// Queues a prompt.
    pub fn add(&mut self, new: NewSequence) -> SeqId {
        let id = self.fresh_id();
        let seq = Sequence {
            id,
            request: new.request,
            choice: 0,
            priority: new.priority,
            prompt_len: new.prompt.len(),
            tokens: new.prompt,
            seats: new.num_choices.max(1),
            num_computed_tokens: 0,
            num_scheduled_tokens: 0,
            num_awaited_tokens: 0,
            last_plan: 0,
            max_computed_tokens: 0,
            num_cached_tokens: None,
            private: false,
            read_prefix_cache: new.read_prefix_cache && self.config.enable_prefix_caching,
            blocks: Vec::new(),
            swapped: None,
            hashes: vec![root(new.cache_salt.as_deref(), self.tiers.pool.current_epoch())],
            cache_salt: new.cache_salt,
            replay_digests: new.replay_digests,
            num_published_blocks: 0,
        };
        self.waiting.insert(seq.key());
        self.seqs.insert(id, seq);
        id
    }

    /// Takes a sequence's blocks away. Their content moves to the swap space if it may and there is room; else the
    /// sequence starts over when it is seated again.
    fn preempt(&mut self, key: ServiceKey, swap: Option<&mut Vec<BlockMove>>, before_release: &mut BeforeRelease<'_>) {
        let seq = self.seqs.get_mut(&key.3).expect("only live sequences are preempted");
        if let Some(moves) = swap.filter(|_| seq.num_computed_tokens > 0) {
            let blocks = self.tiers.swap_out(&seq.blocks, moves);
            seq.swapped = blocks.map(|blocks| Swapped { blocks, num_computed_tokens: seq.num_computed_tokens });
        }
        let release = if seq.swapped.is_some() { Release::Swap } else { Release::Recompute };
        before_release(seq, &self.tiers.pool, release);
        if release == Release::Recompute && self.config.private_recompute && seq.num_computed_tokens > 0 {
            seq.private = true;
        }
        self.running.remove(&key);
        self.release_blocks(key.3);
        self.waiting.insert(key);
    }

    /// Releases the sequence's blocks of the pool; those of the swap space stay.
    fn release_blocks(&mut self, id: SeqId) {
        let seq = self.seqs.get_mut(&id).expect("only live sequences hold blocks");
        // The last block first: what many prompts share is then reused last.
        for block in seq.blocks.drain(..).rev() {
            self.tiers.pool.release(block);
        }
        seq.num_computed_tokens = 0;
        seq.num_published_blocks = 0;
    }

    /// Drops what waits for the sequence in the swap space.
    fn release_swapped(&mut self, id: SeqId) {
        let seq = self.seqs.get_mut(&id).expect("only live sequences hold blocks");
        for block in seq.swapped.take().into_iter().flat_map(|swapped| swapped.blocks).rev() {
            self.tiers.host.release(block);
        }
    }

    /// Takes the blocks of all sequences and forgets what is cached: everything is computed again.
    ///
    /// `before_release` is called as in [`schedule`](Self::schedule). Nothing may be scheduled and not committed.
    pub fn reset_cache(&mut self, before_release: &mut BeforeRelease<'_>) {
        let mut all: Vec<(SeqId, ServiceKey)> = self.seqs.values().map(|seq| (seq.id, seq.key())).collect();
        all.sort_unstable();
        for (id, key) in all {
            self.release_swapped(id);
            if self.running.contains(&key) {
                self.preempt(key, None, before_release);
            } else if !self.seqs[&id].blocks.is_empty() {
                // Retired.
                before_release(&self.seqs[&id], &self.tiers.pool, Release::Recompute);
                self.release_blocks(id);
            }
        }
        self.tiers.forget_cached();
        let epoch = self.tiers.pool.current_epoch();
        for seq in self.seqs.values_mut() {
            seq.hashes = vec![root(seq.cache_salt.as_deref(), epoch)];
        }
    }

    /// The step has been computed: counters move on, and full blocks become matchable.
    ///
    /// A sequence that ended while the step was on its way stays as it was.
    pub fn commit(&mut self, batch: &Batch) {
        let block_size = self.config.block_size;
        for scheduled in &batch.scheduled {
            let Some(seq) = self.seqs.get_mut(&scheduled.seq) else { continue };
            if !self.running.contains(&seq.key()) {
                continue;
            }
            seq.num_computed_tokens += scheduled.rows.len();
            seq.num_scheduled_tokens -= scheduled.rows.len();
            seq.max_computed_tokens = seq.max_computed_tokens.max(seq.num_computed_tokens);
            if !self.config.enable_prefix_caching || seq.private {
                continue;
            }
            for index in seq.num_published_blocks..seq.num_computed_tokens / block_size {
                let hash = seq.block_hash(index, block_size);
                self.tiers.pool.publish(seq.blocks[index], hash);
                seq.num_published_blocks = index + 1;
            }
        }
    }

    /// Appends a sampled token; its KV follows in the next step.
    pub fn push_token(&mut self, id: SeqId, token: u32) {
        if let Some(seq) = self.seqs.get_mut(&id) {
            seq.tokens.push(token);
            seq.num_awaited_tokens = seq.num_awaited_tokens.saturating_sub(1);
        }
    }

    /// Splits a running sequence whose prompt is computed into its choices. They share its blocks until they write.
    ///
    /// Returns the new sequences, choice 1 first.
    pub fn fork(&mut self, id: SeqId) -> Vec<SeqId> {
        let Some(parent) = self.seqs.get_mut(&id) else { return Vec::new() };
        let choices = std::mem::replace(&mut parent.seats, 1);
        let parent = parent.clone();
        (1..choices)
            .map(|choice| {
                let child = Sequence { id: self.fresh_id(), choice, ..parent.clone() };
                for block in &child.blocks {
                    self.tiers.pool.share(*block);
                }
                let id = child.id;
                self.running.insert(child.key());
                self.seqs.insert(id, child);
                id
            })
            .collect()
    }

    /// Takes a sequence out of service. It keeps its blocks, so that its rows can be drained, until it is removed.
    pub fn retire(&mut self, id: SeqId) {
        if let Some(key) = self.seqs.get(&id).map(Sequence::key) {
            self.running.remove(&key);
            self.waiting.remove(&key);
        }
    }

    /// Ends a sequence and releases its blocks. Returns it as it was, with its blocks for the record.
    pub fn remove(&mut self, id: SeqId) -> Option<Sequence> {
        let snapshot = self.seqs.get(&id)?.clone();
        self.release_blocks(id);
        self.release_swapped(id);
        self.running.remove(&snapshot.key());
        self.waiting.remove(&snapshot.key());
        self.seqs.remove(&id);
        Some(snapshot)
    }

    /// Checks the pool against what the sequences hold.
    ///
    /// # Errors
    /// A sentence saying what disagrees.
    pub fn check_integrity(&self) -> Result<(), String> {
        self.tiers.pool.check_integrity(self.seqs.values().flat_map(|seq| seq.blocks.iter().copied()))?;
        let swapped =
            self.seqs.values().flat_map(|seq| &seq.swapped).flat_map(|swapped| swapped.blocks.iter().copied());
        self.tiers.host.check_integrity(swapped).map_err(|error| format!("swap space: {error}"))
    }

    fn fresh_id(&mut self) -> SeqId {
        self.next_id += 1;
        SeqId(self.next_id)
    }
}

/// The parent hash of a sequence's first block.
fn root(salt: Option<&str>, epoch: u64) -> BlockHash {
    BlockHash::root(&CacheScope { salt, epoch })
}
