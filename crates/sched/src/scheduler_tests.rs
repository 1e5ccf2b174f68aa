//! The scheduler against what must hold after every step, whatever the load.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use std::sync::Arc;

use proptest::prelude::*;

use crate::{Batch, BlockMove, NewSequence, RequestKey, Scheduler, SchedulerConfig, SeqId, Sequence};

/// What a slot holds: the tokens up to and including its position decide its KV.
type Content = Vec<u32>;

/// Executes batches by writing each token's whole prefix to its slot, so that any stale or foreign slot shows.
struct Device {
    slots: HashMap<u32, Content>,
    block_size: u32,
    first_host_block: u32,
}

impl Device {
    fn step(&mut self, batch: &Batch, scheduler: &Scheduler) {
        for step in &batch.moves {
            // Blocks of the swap space are kept behind those of the pool.
            let (from, to) = match *step {
                BlockMove::Copy { from, to } => (from, to),
                BlockMove::SwapOut { block, host } => (block, self.first_host_block + host),
                BlockMove::SwapIn { host, block } => (self.first_host_block + host, block),
            };
            for offset in 0..self.block_size {
                if let Some(content) = self.slots.get(&(from * self.block_size + offset)).cloned() {
                    self.slots.insert(to * self.block_size + offset, content);
                }
            }
        }
        let mut written = BTreeSet::new();
        for (row, slot) in batch.slot_mapping.iter().enumerate() {
            assert!(written.insert(*slot), "slot {slot} is written twice in one step");
            let scheduled = batch.scheduled.iter().find(|s| s.rows.contains(&row)).unwrap();
            // One that ended after the step was planned leaves in its slots what nobody may ever read.
            let position = batch.positions[row] as usize;
            let content = scheduler.get(scheduled.seq).map_or(vec![u32::MAX], |seq| seq.tokens()[..=position].to_vec());
            assert!(scheduled.awaits || content.last() == Some(&batch.token_ids[row]) || content == [u32::MAX]);
            self.slots.insert(*slot, content);
        }
        for scheduled in &batch.scheduled {
            if let Some(seq) = scheduler.get(scheduled.seq) {
                self.check(seq, scheduled.first_position + scheduled.rows.len());
            }
        }
    }

    /// Every position below `upto` must hold this sequence's own prefix.
    fn check(&self, seq: &Sequence, upto: usize) {
        for position in 0..upto {
            let block = seq.blocks()[position / self.block_size as usize].id;
            let slot = block * self.block_size + position as u32 % self.block_size;
            assert_eq!(self.slots.get(&slot), Some(&seq.tokens()[..=position].to_vec()), "position {position}");
        }
    }
}

#[derive(Debug, Clone)]
struct Job {
    arrival: usize,
    prompt: Vec<u32>,
    choices: usize,
    output: usize,
    priority: i32,
    abort_at: Option<usize>,
    /// Whether nobody knows before that its last token is the last.
    surprises: bool,
}

fn job() -> impl Strategy<Value = Job> {
    // Few distinct tokens, so that prompts share prefixes.
    (
        0usize..30,
        prop::collection::vec(0u32..2, 1..24),
        1usize..4,
        1usize..12,
        -1i32..2,
        prop::option::of(0usize..40),
        any::<bool>(),
    )
        .prop_map(|(arrival, prompt, choices, output, priority, abort_at, surprises)| Job {
            arrival,
            prompt,
            choices,
            output,
            priority,
            abort_at,
            surprises,
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn every_slot_read_holds_its_own_prefix(
        jobs in prop::collection::vec(job(), 1..10),
        block_size in 1usize..6,
        spare_blocks in 0usize..12,
        max_num_batched_tokens in 1usize..20,
        extra_seqs in 0usize..4,
        enable_prefix_caching: bool,
        num_host_blocks in prop_oneof![Just(0usize), 1usize..40],
        private_recompute: bool,
        ahead: bool,
    ) {
        let longest = jobs.iter().map(|j| (j.prompt.len() + j.output - 1).div_ceil(block_size)).max().unwrap();
        let widest = jobs.iter().map(|j| j.choices).max().unwrap();
        let config = SchedulerConfig {
            block_size, num_blocks: longest + spare_blocks, max_num_seqs: widest + extra_seqs,
            max_num_batched_tokens, enable_prefix_caching,
            num_host_blocks, private_recompute,
        };
        let mut scheduler = Scheduler::new(config.clone());
        let mut device = Device { slots: HashMap::new(), block_size: block_size as u32, first_host_block: config.num_blocks as u32 };
        let (mut batch, mut next) = (Batch::default(), Batch::default());
        let mut live: BTreeMap<SeqId, usize> = BTreeMap::new();
        let mut finished = 0;
        for step in 0..5000 {
            for (i, job) in jobs.iter().enumerate().filter(|(_, job)| job.arrival == step) {
                let id = scheduler.add(NewSequence {
                    request: RequestKey(i as u64), prompt: job.prompt.clone(), num_choices: job.choices,
                    priority: job.priority, cache_salt: None, replay_digests: Arc::default(), read_prefix_cache: true,
                });
                live.insert(id, i);
            }
            let aborted: Vec<SeqId> =
                live.iter().filter(|(_, i)| jobs[**i].abort_at == Some(step)).map(|(id, _)| *id).collect();
            for id in aborted {
                live.remove(&id);
                prop_assert!(scheduler.remove(id).is_some());
                finished += 1;
            }
            let device_ref = &device;
            std::mem::swap(&mut batch, &mut next);
            next = Batch::default();
            if batch.is_empty() {
                scheduler.schedule(&mut batch, &mut |seq, pool, _| {
                    assert!(seq.blocks().iter().all(|block| pool.is_current(*block)));
                    device_ref.check(seq, seq.num_computed_tokens());
                });
            }
            if ahead && !batch.is_empty() && batch.num_short == 0 {
                scheduler.schedule_ahead(&mut next, &mut |seq| {
                    let job = &jobs[live[&seq.id()]];
                    job.surprises || seq.num_expected_tokens() - seq.prompt_len() < job.output
                });
                prop_assert!(next.num_tokens() <= max_num_batched_tokens);
            }
            prop_assert!(batch.num_tokens() <= max_num_batched_tokens);
            prop_assert!(scheduler.num_running() <= config.max_num_seqs);
            prop_assert!(!batch.is_empty() || batch.num_preempted > 0 || live.is_empty(), "no progress with work waiting");
            device.step(&batch, &scheduler);
            scheduler.commit(&batch);
            for scheduled in batch.scheduled.iter().filter(|s| s.samples) {
                // It may have ended while the step was on its way.
                let Some(job) = live.get(&scheduled.seq).copied() else { continue };
                let mut choices = vec![scheduled.seq];
                choices.extend(scheduler.fork(scheduled.seq));
                for id in choices {
                    live.insert(id, job);
                    let seq = scheduler.get(id).unwrap();
                    let made = seq.tokens().len() - seq.prompt_len();
                    if made + 1 == jobs[job].output {
                        scheduler.remove(id);
                        live.remove(&id);
                        finished += 1;
                    } else {
                        // Choices diverge at once, and alike between requests, so that prefixes are found again.
                        scheduler.push_token(id, (made + seq.choice()) as u32 % 3);
                    }
                }
            }
            prop_assert_eq!(scheduler.check_integrity(), Ok(()));
            if live.is_empty() && step > 30 { break }
        }
        prop_assert!(live.is_empty(), "{} sequences never finished", live.len());
        prop_assert!(finished >= jobs.len());
        prop_assert_eq!(scheduler.pool().num_free(), config.num_blocks);
    }
}

fn run_one(scheduler: &mut Scheduler, prompt: &[u32], request: u64) -> (usize, SeqId) {
    let id = scheduler.add(NewSequence {
        request: RequestKey(request),
        prompt: prompt.to_vec(),
        num_choices: 1,
        priority: 0,
        cache_salt: None,
        replay_digests: Arc::default(),
        read_prefix_cache: true,
    });
    let mut batch = Batch::default();
    scheduler.schedule(&mut batch, &mut |_, _, _| {});
    scheduler.commit(&batch);
    (scheduler.get(id).unwrap().num_cached_tokens(), id)
}

#[test]
fn a_hit_leaves_at_least_one_token_to_compute() {
    for (prompt_len, expect) in [(4, 0), (5, 4), (8, 4), (9, 8)] {
        let mut scheduler = Scheduler::new(SchedulerConfig {
            block_size: 4,
            num_blocks: 16,
            max_num_seqs: 4,
            max_num_batched_tokens: 64,
            num_host_blocks: 0,
            private_recompute: false,
            enable_prefix_caching: true,
        });
        let prompt: Vec<u32> = (0..prompt_len).collect();
        assert_eq!(run_one(&mut scheduler, &prompt, 1).0, 0);
        assert_eq!(run_one(&mut scheduler, &prompt, 2).0, expect, "prompt of {prompt_len}");
    }
}
