//! One choice of one request, as the scheduler sees it.

use std::sync::Arc;

use crate::block_hash::BlockHash;
use crate::block_pool::BlockRef;

/// Names a sequence; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeqId(pub u64);

/// Names a request; its choices share it. Never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestKey(pub u64);

/// A prompt to be scheduled.
#[derive(Debug, Clone)]
pub struct NewSequence {
    /// The request that it belongs to.
    pub request: RequestKey,
    /// Prompt token ids, at least one.
    pub prompt: Vec<u32>,
    /// Choices that will be forked off it: seats are kept for all of them.
    pub num_choices: usize,
    /// Lower runs first.
    pub priority: i32,
    /// Separates its blocks from those of other salts.
    pub cache_salt: Option<String>,
    /// Digests of the given routing of each of the first blocks; `None` where a block's routing is free.
    pub replay_digests: Arc<[Option<u128>]>,
    /// Whether cached blocks may stand in for a forward.
    pub read_prefix_cache: bool,
}

/// Counters are the state; everything else is derived.
///
/// `0 <= num_computed_tokens <= num_tokens`, and KV exists for exactly the first `num_computed_tokens` positions. While
/// steps are on their way, `num_computed_tokens + num_scheduled_tokens <= num_tokens + num_awaited_tokens`.
#[derive(Debug, Clone)]
pub struct Sequence {
    pub(crate) id: SeqId,
    pub(crate) request: RequestKey,
    pub(crate) choice: usize,
    pub(crate) priority: i32,
    pub(crate) tokens: Vec<u32>,
    pub(crate) prompt_len: usize,
    /// Seats among `max_num_seqs`: the choices still to be forked, itself included.
    pub(crate) seats: usize,
    pub(crate) num_computed_tokens: usize,
    /// Positions behind these that steps are computing: `schedule` adds, `commit` takes away.
    pub(crate) num_scheduled_tokens: usize,
    /// Tokens behind `tokens` that steps are sampling: `schedule` adds, `push_token` takes away.
    pub(crate) num_awaited_tokens: usize,
    /// The last plan that it was part of.
    pub(crate) last_plan: u64,
    /// Positions that any forward of this sequence has ever covered, cached ones included.
    pub(crate) max_computed_tokens: usize,
    /// Tokens found in the prefix cache at first admission.
    pub(crate) num_cached_tokens: Option<usize>,
    pub(crate) read_prefix_cache: bool,
    /// Whether its KV is its own affair: it neither reads the prefix cache nor fills it.
    pub(crate) private: bool,
    pub(crate) blocks: Vec<BlockRef>,
    /// What waits for it in the swap space; it holds no block of the pool then.
    pub(crate) swapped: Option<Swapped>,
    pub(crate) cache_salt: Option<String>,
    pub(crate) replay_digests: Arc<[Option<u128>]>,
    /// Chain hashes of the first blocks, as far as they have been needed; the root comes first.
    pub(crate) hashes: Vec<BlockHash>,
    /// Blocks that have been offered to the prefix cache.
    pub(crate) num_published_blocks: usize,
}

/// Blocks of the swap space that hold a sequence's first positions.
#[derive(Debug, Clone)]
pub(crate) struct Swapped {
    pub(crate) blocks: Vec<BlockRef>,
    pub(crate) num_computed_tokens: usize,
}

/// The order of service: priority, then age, then choice.
pub(crate) type ServiceKey = (i32, RequestKey, usize, SeqId);

impl Sequence {
    /// Its name.
    pub fn id(&self) -> SeqId {
        self.id
    }

    /// The request that it belongs to.
    pub fn request(&self) -> RequestKey {
        self.request
    }

    /// Which choice of the request it is.
    pub fn choice(&self) -> usize {
        self.choice
    }

    /// Prompt and output tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Number of prompt tokens.
    pub fn prompt_len(&self) -> usize {
        self.prompt_len
    }

    /// Positions whose KV, and row, the block table holds now.
    pub fn num_computed_tokens(&self) -> usize {
        self.num_computed_tokens
    }

    /// Positions that have been forwarded or hit at any time.
    pub fn max_computed_tokens(&self) -> usize {
        self.max_computed_tokens
    }

    /// Prompt tokens found in the prefix cache at first admission; 0 before it.
    pub fn num_cached_tokens(&self) -> usize {
        self.num_cached_tokens.unwrap_or(0)
    }

    /// Its blocks, by position.
    pub fn blocks(&self) -> &[BlockRef] {
        &self.blocks
    }

    pub(crate) fn key(&self) -> ServiceKey {
        (self.priority, self.request, self.choice, self.id)
    }

    /// Tokens that it will have once the steps on their way have been computed.
    pub fn num_expected_tokens(&self) -> usize {
        self.tokens.len() + self.num_awaited_tokens
    }

    /// The position that the next step begins with.
    pub(crate) fn next_position(&self) -> usize {
        self.num_computed_tokens + self.num_scheduled_tokens
    }

    pub(crate) fn num_pending_tokens(&self) -> usize {
        self.num_expected_tokens() - self.next_position()
    }

    /// The chain hash of block `index`, which must be full.
    pub(crate) fn block_hash(&mut self, index: usize, block_size: usize) -> BlockHash {
        while self.hashes.len() <= index + 1 {
            let block = self.hashes.len() - 1;
            let tokens = &self.tokens[block * block_size..(block + 1) * block_size];
            self.hashes.push(self.hashes[block].child(tokens, self.replay_digests.get(block).copied().flatten()));
        }
        self.hashes[index + 1]
    }
}
