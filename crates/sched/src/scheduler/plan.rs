//! What the next step computes, and the blocks for it.

use crate::batch::{Batch, BlockMove, Scheduled};
use crate::scheduler::{BeforeRelease, Scheduler};
use crate::sequence::{SeqId, Sequence, ServiceKey};
use crate::tiers::{Held, KvTiers};

impl Scheduler {
    /// Plans one step into `batch`. No other may be on its way.
    ///
    /// Nothing of this step has been written, and no block moved, when `before_release` is called.
    pub fn schedule(&mut self, batch: &mut Batch, before_release: &mut BeforeRelease<'_>) {
        let order: Vec<ServiceKey> = self.running.iter().copied().collect();
        self.plan(batch, &order, Some(before_release));
    }

    /// Plans the step behind one that is still on its way. A token that it samples counts as there, if its sequence
    /// `may_follow`; one that is about to split into choices waits.
    ///
    /// No sequence loses its blocks: one that lacks some is left out, and `num_short` of the batch counts it. Then the next
    /// step should be planned by [`schedule`](Self::schedule).
    pub fn schedule_ahead(&mut self, batch: &mut Batch, may_follow: &mut dyn FnMut(&Sequence) -> bool) {
        let mut follows = |seq: &Sequence| seq.num_awaited_tokens == 0 || (seq.seats == 1 && may_follow(seq));
        let order: Vec<ServiceKey> = self.running.iter().filter(|key| follows(&self.seqs[&key.3])).copied().collect();
        self.plan(batch, &order, None);
    }

    fn plan(&mut self, batch: &mut Batch, order: &[ServiceKey], mut before_release: Option<&mut BeforeRelease<'_>>) {
        batch.clear();
        self.plans += 1;
        let mut budget = self.config.max_num_batched_tokens;
        let is_decode =
            |this: &Self, key: &ServiceKey| this.seqs.get(&key.3).is_some_and(|seq| seq.num_pending_tokens() == 1);
        for decode in [true, false] {
            for key in order {
                // A sequence may have been preempted, or served by the first pass.
                if budget > 0 && self.is_unserved(key) && is_decode(self, key) == decode {
                    budget -= self.schedule_running(*key, budget, batch, before_release.as_deref_mut());
                }
            }
        }
        // Where blocks are short, admitting would only preempt again.
        if batch.num_preempted + batch.num_short == 0 {
            self.admit(budget, batch);
        }
    }

    /// Whether a sequence runs and has no part in the present plan.
    fn is_unserved(&self, key: &ServiceKey) -> bool {
        self.running.contains(key) && self.seqs[&key.3].last_plan < self.plans
    }

    /// Gives a running sequence its tokens; preempts later, unserved ones for blocks, if that is allowed. Returns the
    /// tokens spent.
    fn schedule_running(
        &mut self,
        key: ServiceKey,
        budget: usize,
        batch: &mut Batch,
        mut before_release: Option<&mut BeforeRelease<'_>>,
    ) -> usize {
        let tokens = self.seqs[&key.3].num_pending_tokens().min(budget);
        while !self.reserve(key.3, tokens, &mut batch.moves) {
            let Some(before_release) = before_release.as_deref_mut() else {
                batch.num_short += 1;
                return 0;
            };
            let victim = self.running.iter().rev().find(|key| self.is_unserved(key));
            let victim = *victim.expect("the sequence itself is running and unserved");
            if victim < key {
                // Only older sequences are left; they keep their blocks, and this one waits for its turn.
                return 0;
            }
            self.preempt(victim, Some(&mut batch.moves), before_release);
            batch.num_preempted += 1;
            if victim == key {
                return 0;
            }
        }
        self.emit(key.3, tokens, batch);
        tokens
    }

    /// Seats waiting sequences while there is room, in service order.
    fn admit(&mut self, mut budget: usize, batch: &mut Batch) {
        while budget > 0 {
            let Some(key) = self.waiting.first().copied() else { break };
            let seats: usize = self.running.iter().map(|key| self.seqs[&key.3].seats).sum();
            if seats + self.seqs[&key.3].seats > self.config.max_num_seqs {
                break;
            }
            let Some(tokens) = self.seat(key.3, budget, &mut batch.moves) else { break };
            self.waiting.remove(&key);
            self.running.insert(key);
            self.emit(key.3, tokens, batch);
            budget -= tokens;
        }
    }

    /// Gives a waiting sequence the blocks that have its KV already, and those for its next tokens; all or nothing.
    /// Returns the number of those tokens.
    fn seat(&mut self, id: SeqId, budget: usize, moves: &mut Vec<BlockMove>) -> Option<usize> {
        let block_size = self.config.block_size;
        let seq = self.seqs.get_mut(&id).expect("a waiting sequence is live");
        debug_assert!(seq.blocks.is_empty(), "a sequence without a seat holds no block of the pool");
        let held = match &seq.swapped {
            Some(swapped) => swapped.blocks.iter().map(|block| self.tiers.nearest(*block)).collect(),
            None => cached(seq, &mut self.tiers, block_size),
        };
        let computed = seq.swapped.as_ref().map_or(held.len() * block_size, |swapped| swapped.num_computed_tokens);
        let tokens = (seq.tokens.len() - computed).min(budget);
        let to_bring = held.iter().filter(|held| matches!(held, Held::Host(_))).count();
        let fresh = (computed + tokens).div_ceil(block_size) - held.len();
        if to_bring + fresh > self.tiers.pool.num_free() {
            // What the sequence holds in the swap space stays its own.
            let is_own = |held: &Held| seq.swapped.is_some() && matches!(held, Held::Host(_));
            held.into_iter().rev().filter(|held| !is_own(held)).for_each(|held| self.tiers.release(held));
            return None;
        }
        match seq.swapped.take() {
            Some(swapped) => {
                for (host, held) in swapped.blocks.into_iter().zip(&held) {
                    if matches!(held, Held::Pool(_)) {
                        self.tiers.host.release(host);
                    }
                }
            }
            None => {
                seq.num_published_blocks = held.len();
                seq.num_cached_tokens.get_or_insert(computed);
            }
        }
        seq.blocks = held.into_iter().map(|held| self.tiers.bring_in(held, moves)).collect();
        seq.num_computed_tokens = computed;
        assert!(self.reserve(id, tokens, moves), "the free blocks were counted");
        Some(tokens)
    }

    /// Makes every slot of the next `tokens` positions writable by this sequence alone; all or nothing.
    fn reserve(&mut self, id: SeqId, tokens: usize, moves: &mut Vec<BlockMove>) -> bool {
        let block_size = self.config.block_size;
        let seq = self.seqs.get_mut(&id).expect("only live sequences are scheduled");
        let needed = (seq.next_position() + tokens).div_ceil(block_size);
        let fresh = needed.saturating_sub(seq.blocks.len());
        // A partly filled last block may be shared with other choices of the request: it must not be written.
        let tail = seq.next_position() / block_size;
        let shared = seq.blocks.get(tail).copied().filter(|block| self.tiers.pool.refs(block.id) > 1);
        if fresh + usize::from(shared.is_some()) > self.tiers.pool.num_free() {
            return false;
        }
        let mut take = || self.tiers.take(seq.request, moves).expect("the free blocks were counted");
        let copy = shared.map(|from| (from, take()));
        seq.blocks.extend((0..fresh).map(|_| take()));
        if let Some((from, to)) = copy {
            seq.blocks[tail] = to;
            self.tiers.pool.release(from);
            moves.push(BlockMove::Copy { from: from.id, to: to.id });
        }
        true
    }

    /// Writes a sequence's rows into the batch.
    fn emit(&mut self, id: SeqId, tokens: usize, batch: &mut Batch) {
        let block_size = self.config.block_size;
        let seq = self.seqs.get_mut(&id).expect("only live sequences are scheduled");
        let (start, first_row, first_block) = (seq.next_position(), batch.token_ids.len(), batch.block_tables.len());
        let end = start + tokens;
        let known = end.min(seq.tokens.len());
        batch.token_ids.extend_from_slice(&seq.tokens[start..known]);
        batch.token_ids.resize(first_row + tokens, 0);
        for position in start..end {
            let block = seq.blocks[position / block_size].id;
            batch.positions.push(position as u32);
            batch.slot_mapping.push(block * block_size as u32 + (position % block_size) as u32);
        }
        batch.block_tables.extend(seq.blocks.iter().map(|block| block.id));
        batch.scheduled.push(Scheduled {
            seq: id,
            rows: first_row..batch.token_ids.len(),
            first_position: start,
            blocks: first_block..batch.block_tables.len(),
            samples: end == seq.num_expected_tokens(),
            awaits: known < end,
            num_recomputed: seq.max_computed_tokens.min(end).saturating_sub(start),
        });
        seq.num_awaited_tokens += usize::from(end == seq.num_expected_tokens());
        seq.num_scheduled_tokens += tokens;
        seq.last_plan = self.plans;
    }
}

/// Refers to cached blocks that hold the sequence's first tokens; at least one token is left to compute.
fn cached(seq: &mut Sequence, tiers: &mut KvTiers, block_size: usize) -> Vec<Held> {
    let last = if seq.read_prefix_cache && !seq.private { (seq.tokens.len() - 1) / block_size } else { 0 };
    (0..last).map_while(|index| tiers.acquire(seq.block_hash(index, block_size))).collect()
}
