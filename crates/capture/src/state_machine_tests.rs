//! Scheduler, block pool, prefix cache, swap space, ring and ledgers together, against a model that keeps every row
//! for ever.
//!
//! There is no network: the "router" writes the number of the forward into the row, so that no two forwards of a
//! position have equal rows, and any row that is stale, foreign, shifted or computed twice shows. The model knows
//! nothing of ring or ledger: beside each slot it keeps what its KV is of, moves that as a device would, and notes for
//! each position of each choice the forward that covered it first.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};

use moetrail_kernels::gpu::Gpu;
use moetrail_routes::TokenSpan;
use moetrail_sched::{
    Batch, BlockMove, BlockPool, BlockRef, NewSequence, Release, RequestKey, Scheduler, SchedulerConfig, SeqId,
    Sequence,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestCaseError, TestRunner};

use crate::{CaptureRing, Cells, HostRows, RingLayout, SequenceRows};

/// A row is the number of its forward.
const ROW_BYTES: usize = 8;

/// Something to break, to see that it is noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    RowLostOnCopy,
    RowLostOnSwapOut,
    RowLostOnSwapIn,
    NoDrainBeforeRelease,
    LastWriterWins,
    BlockOfAnother,
    OldGeneration,
    CacheKeptOnUpdate,
    TrimAfterTheCopy,
    ReplayNotInTheHash,
}

#[derive(Debug, Clone)]
struct Job {
    prompt: Vec<u32>,
    choices: usize,
    output: usize,
    priority: i32,
    salt: Option<String>,
    /// First row wanted, as a share of the prompt; `None` wants none.
    start: Option<f64>,
    /// Routing is given for this share of the prompt.
    replayed: f64,
    /// Rows are taken in pieces after the end.
    slowly: bool,
}

#[derive(Debug, Clone)]
enum Op {
    Submit(Job),
    Steps(usize),
    Abort(usize),
    /// Brings what is known of a choice to the host, as a streamed delta does.
    Drain(usize),
    Reset,
    UpdateWeights,
}

fn op() -> impl Strategy<Value = Op> {
    // Few distinct tokens, so that prompts share prefixes.
    let prompt = prop::collection::vec(prop::sample::select(vec![0u32, 0, 0, 1]), 1..28);
    let job = (
        (prompt, prop_oneof![4 => Just(1usize), 1 => 2usize..4], 1usize..10, -1i32..2),
        (
            prop::option::weighted(0.1, "[ab]"),
            prop::option::weighted(0.85, 0.0..=1.0),
            prop_oneof![6 => Just(0.0), 1 => 0.0..=1.0],
            any::<bool>(),
        ),
    );
    let job = job.prop_map(|((prompt, choices, output, priority), (salt, start, replayed, slowly))| {
        Op::Submit(Job { prompt, choices, output, priority, salt, start, replayed, slowly })
    });
    prop_oneof![
        8 => job,
        8 => (1usize..6).prop_map(Op::Steps),
        1 => (0usize..100).prop_map(Op::Abort),
        3 => (0usize..100).prop_map(Op::Drain),
        1 => Just(Op::Reset),
        1 => Just(Op::UpdateWeights),
    ]
}

#[derive(Debug, Clone)]
struct Case {
    ops: Vec<Op>,
    config: SchedulerConfig,
}

fn case() -> impl Strategy<Value = Case> {
    let pool = (1usize..6, 0usize..8, prop_oneof![Just(0usize), 1usize..12, 40usize..60]);
    let limits = (1usize..24, 0usize..5, prop::bool::weighted(0.85), prop::bool::weighted(0.25));
    (prop::collection::vec(op(), 4..28), pool, limits).prop_map(|(ops, pool, limits)| {
        let (block_size, spare_blocks, num_host_blocks) = pool;
        let (max_num_batched_tokens, extra_seqs, enable_prefix_caching, private_recompute) = limits;
        let jobs = || ops.iter().filter_map(|op| if let Op::Submit(job) = op { Some(job) } else { None });
        let longest = jobs().map(|job| (job.prompt.len() + job.output - 1).div_ceil(block_size)).max().unwrap_or(1);
        let widest = jobs().map(|job| job.choices).max().unwrap_or(1);
        let config = SchedulerConfig {
            block_size,
            num_blocks: longest + spare_blocks,
            num_host_blocks,
            private_recompute,
            max_num_seqs: widest + extra_seqs,
            max_num_batched_tokens,
            enable_prefix_caching,
        };
        Case { ops, config }
    })
}

/// What a slot's KV is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Content {
    /// Salt, tokens and given routing up to and including the position.
    chain: u64,
    /// The weights.
    version: usize,
    /// The forward: the content of the row.
    forward: u64,
    request: RequestKey,
}

/// One choice as the model sees it, and its rows as the client would get them.
struct Tracked {
    job: Job,
    rows: Option<SequenceRows>,
    /// The first content of each position.
    first: Vec<Content>,
    /// Where its own rows begin: behind those that its request's first choice had drained before it was split.
    own_from: usize,
    drained: HashSet<usize>,
}

/// How often each kind of step was met.
#[derive(Default, Debug)]
struct Met {
    sequences: AtomicUsize,
    steps: AtomicUsize,
    aborts: AtomicUsize,
    prefix_hits: AtomicUsize,
    copies: AtomicUsize,
    preemptions: AtomicUsize,
    swaps_out: AtomicUsize,
    swaps_in: AtomicUsize,
    resets: AtomicUsize,
    updates: AtomicUsize,
    recomputed_rows: AtomicUsize,
    slow_ends: AtomicUsize,
    replays: AtomicUsize,
}

impl Met {
    fn all(&self) -> [(&'static str, &AtomicUsize); 13] {
        [
            ("sequences", &self.sequences),
            ("steps", &self.steps),
            ("aborts", &self.aborts),
            ("prefix hits", &self.prefix_hits),
            ("copies on write", &self.copies),
            ("preemptions", &self.preemptions),
            ("blocks swapped out", &self.swaps_out),
            ("blocks swapped in", &self.swaps_in),
            ("resets", &self.resets),
            ("weight updates", &self.updates),
            ("rows computed again", &self.recomputed_rows),
            ("ends drained slowly", &self.slow_ends),
            ("replays", &self.replays),
        ]
    }
}

fn bump(counter: &AtomicUsize, by: usize) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// What the real parts counted, and what the model says that they should have.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    d2h_bytes: usize,
    moved_bytes: usize,
    deduplicated: usize,
    prefix_cached: usize,
    returned: usize,
}

struct Rig<'a> {
    fault: Fault,
    met: &'a Met,
    scheduler: Scheduler,
    ring: CaptureRing,
    gpu: Option<Gpu>,
    host_rows: HostRows,
    version: usize,
    forwards: u64,
    live: BTreeMap<SeqId, Tracked>,
    closing: Vec<(SeqId, Tracked, usize)>,
    /// By slot, those of the swap space behind those of the pool.
    kv: HashMap<usize, Content>,
    counted: Counts,
    expected: Counts,
    next_request: u64,
}

/// Salt, tokens and given routing up to a position, as one number.
fn chain(job: &Job, tokens: &[u32], position: usize) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    (&job.salt, &tokens[..=position], replay_end(job).min(position + 1)).hash(&mut hasher);
    hasher.finish()
}

fn replay_end(job: &Job) -> usize {
    (job.replayed * job.prompt.len() as f64) as usize
}

/// Brings a choice's rows up to `upto` to the host.
fn drain(
    (ring, fault, version): (&CaptureRing, Fault, usize),
    sequence: &Sequence,
    pool: &BlockPool,
    tracked: &mut Tracked,
    upto: usize,
    counted: &mut Counts,
) -> Result<(), TestCaseError> {
    let Some(rows) = &mut tracked.rows else { return Ok(()) };
    let mut blocks: Vec<BlockRef> = sequence.blocks().to_vec();
    if let Some(last) = blocks.last_mut() {
        match fault {
            Fault::BlockOfAnother => {
                let id = (last.id + 1) % pool.num_blocks() as u32;
                *last = BlockRef { id, generation: pool.generation(id) };
            }
            Fault::OldGeneration => last.generation = last.generation.wrapping_sub(1),
            _ => {}
        }
    }
    let before = rows.span().end;
    let drained = rows.drain(ring, pool, &blocks, sequence.request(), upto, &version.to_string().into());
    let drained = drained.map_err(|error| TestCaseError::fail(error.to_string()))?;
    counted.d2h_bytes += drained.bytes;
    tracked.drained.extend(before..rows.span().end);
    Ok(())
}

impl<'a> Rig<'a> {
    fn new(config: SchedulerConfig, fault: Fault, met: &'a Met, gpu: Option<Gpu>) -> Self {
        let layout = RingLayout::new(2, vec![0, 1], ROW_BYTES / 2, 256);
        let ring = match &gpu {
            None => CaptureRing::new(layout.clone(), config.num_blocks, config.block_size),
            // Far too little staging for what is on its way.
            Some(gpu) => CaptureRing::on_device(gpu, layout.clone(), config.num_blocks, config.block_size, 512)
                .expect("the device has room"),
        };
        Self {
            fault,
            met,
            host_rows: HostRows::new(&ring, config.num_host_blocks).expect("the host has room"),
            ring,
            gpu,
            scheduler: Scheduler::new(config),
            version: 0,
            forwards: 0,
            live: BTreeMap::new(),
            closing: Vec::new(),
            kv: HashMap::new(),
            counted: Counts::default(),
            expected: Counts::default(),
            next_request: 0,
        }
    }

    fn submit(&mut self, job: Job) {
        let replay_end = if self.fault == Fault::ReplayNotInTheHash { 0 } else { replay_end(&job) };
        bump(&self.met.sequences, job.choices);
        bump(&self.met.replays, usize::from(replay_end > 0));
        let block_size = self.scheduler.config().block_size;
        self.next_request += 1;
        let id = self.scheduler.add(NewSequence {
            request: RequestKey(self.next_request),
            prompt: job.prompt.clone(),
            num_choices: job.choices,
            priority: job.priority,
            cache_salt: job.salt.clone(),
            replay_digests: (0..replay_end)
                .step_by(block_size)
                .map(|first| Some(replay_end.min(first + block_size) as u128))
                .collect(),
            read_prefix_cache: replay_end == 0,
        });
        let start = job.start.map(|share| (share * job.prompt.len() as f64) as usize);
        let trim = if self.fault == Fault::TrimAfterTheCopy { start.map(|_| 0) } else { start };
        let rows = trim.map(|start| SequenceRows::new(start, job.prompt.len() + job.output - 1, ROW_BYTES));
        let own_from = start.unwrap_or(0);
        self.live.insert(id, Tracked { job, rows, first: Vec::new(), own_from, drained: HashSet::new() });
    }

    /// Where a position's KV and row are.
    fn slot(&self, sequence: &Sequence, position: usize) -> usize {
        let block_size = self.scheduler.config().block_size;
        sequence.blocks()[position / block_size].id as usize * block_size + position % block_size
    }

    fn step(&mut self) -> Result<(), TestCaseError> {
        let mut batch = Batch::default();
        let Self { scheduler, ring, live, counted, fault, version, met, .. } = self;
        let mut lost = Ok(());
        scheduler.schedule(&mut batch, &mut |sequence, pool, release| {
            bump(&met.preemptions, usize::from(release == Release::Recompute));
            if let (Some(tracked), false) = (live.get_mut(&sequence.id()), *fault == Fault::NoDrainBeforeRelease) {
                let computed = sequence.num_computed_tokens();
                let drained = drain((ring, *fault, *version), sequence, pool, tracked, computed, counted);
                lost = std::mem::replace(&mut lost, Ok(())).and(drained);
            }
        });
        lost?;
        bump(&self.met.steps, 1);
        self.execute(&batch.moves);
        self.forward(&batch)?;
        self.scheduler.commit(&batch);
        self.observe(&batch)?;
        self.extend(&batch)?;
        self.close_some()?;
        self.scheduler.check_integrity().map_err(TestCaseError::fail)
    }

    /// Moves blocks: KV as the model sees it, rows as the engine does it.
    fn execute(&mut self, moves: &[BlockMove]) {
        let (block_size, num_blocks) = (self.scheduler.config().block_size, self.scheduler.config().num_blocks);
        for step in moves {
            let (from, to) = match *step {
                BlockMove::Copy { from, to } => (from as usize, to as usize),
                BlockMove::SwapOut { block, host } => (block as usize, num_blocks + host as usize),
                BlockMove::SwapIn { host, block } => (num_blocks + host as usize, block as usize),
            };
            for offset in 0..block_size {
                match self.kv.get(&(from * block_size + offset)).copied() {
                    Some(content) => self.kv.insert(to * block_size + offset, content),
                    None => self.kv.remove(&(to * block_size + offset)),
                };
            }
            let bytes = match *step {
                BlockMove::Copy { from, to } => {
                    bump(&self.met.copies, 1);
                    if self.fault != Fault::RowLostOnCopy {
                        self.ring.copy_block(from, to).expect("the device works");
                    }
                    0
                }
                BlockMove::SwapOut { block, host } => {
                    bump(&self.met.swaps_out, 1);
                    let lost = self.fault == Fault::RowLostOnSwapOut;
                    if lost { 0 } else { self.host_rows.move_out(&self.ring, block, host).expect("the device works") }
                }
                BlockMove::SwapIn { host, block } => {
                    bump(&self.met.swaps_in, 1);
                    let lost = self.fault == Fault::RowLostOnSwapIn;
                    if lost {
                        0
                    } else {
                        self.host_rows.move_in(&mut self.ring, host, block).expect("the device works")
                    }
                }
            };
            self.counted.moved_bytes += bytes;
            let crosses = !matches!(step, BlockMove::Copy { .. });
            self.expected.moved_bytes += if crosses { block_size * ROW_BYTES } else { 0 };
        }
    }

    /// "Forwards" each row of the batch: its KV, and its row in the ring.
    fn forward(&mut self, batch: &Batch) -> Result<(), TestCaseError> {
        let mut written = HashSet::new();
        for scheduled in &batch.scheduled {
            let sequence = self.scheduler.get(scheduled.seq).expect("scheduled sequences are live");
            let job = &self.live[&scheduled.seq].job;
            for (row, position) in scheduled.rows.clone().zip(scheduled.span().iter()) {
                let slot = batch.slot_mapping[row] as usize;
                prop_assert!(written.insert(slot), "slot {slot} is written twice in one step");
                self.forwards += 1;
                let content = Content {
                    chain: chain(job, sequence.tokens(), position),
                    version: self.version,
                    forward: self.forwards,
                    request: sequence.request(),
                };
                self.kv.insert(slot, content);
                let row = self.forwards.to_le_bytes();
                match (self.ring.cells_mut(), &self.gpu) {
                    (Cells::U8(cells), _) => cells[slot * ROW_BYTES..(slot + 1) * ROW_BYTES].copy_from_slice(&row),
                    (Cells::Device(cells), Some(gpu)) => {
                        gpu.upload(cells.ring().address().at(slot * ROW_BYTES), &row).expect("the device works");
                    }
                    _ => unreachable!("ids of a byte, in host memory or a device's"),
                }
            }
            // Attention reads every position so far: each must be of this sequence's tokens, by the present weights.
            for position in 0..scheduled.span().end {
                let Some(content) = self.kv.get(&self.slot(sequence, position)) else {
                    return Err(TestCaseError::fail(format!(
                        "position {position} reads a slot that was never written"
                    )));
                };
                prop_assert_eq!(content.chain, chain(job, sequence.tokens(), position), "foreign KV at {}", position);
                prop_assert_eq!(content.version, self.version, "KV of old weights at {}", position);
            }
        }
        Ok(())
    }

    /// The model notes what covered each position first; the engine's way of counting runs beside it.
    fn observe(&mut self, batch: &Batch) -> Result<(), TestCaseError> {
        for scheduled in &batch.scheduled {
            let sequence = self.scheduler.get(scheduled.seq).expect("scheduled sequences are live");
            let contents: Vec<Content> =
                (0..sequence.num_computed_tokens()).map(|position| self.kv[&self.slot(sequence, position)]).collect();
            let tracked = self.live.get_mut(&scheduled.seq).expect("scheduled sequences are live");
            if tracked.first.is_empty() {
                bump(&self.met.prefix_hits, usize::from(sequence.num_cached_tokens() > 0));
            }
            bump(&self.met.recomputed_rows, scheduled.num_recomputed);
            let known = tracked.first.len();
            tracked.first.extend(contents.iter().skip(known));
            if let Some(rows) = &mut tracked.rows {
                self.counted.deduplicated += scheduled.span().intersection(rows.span()).len();
                self.expected.deduplicated += scheduled.span().iter().filter(|p| tracked.drained.contains(p)).count();
                if self.fault == Fault::LastWriterWins && scheduled.num_recomputed > 0 {
                    let (start, end) = (rows.span().start, tracked.job.prompt.len() + tracked.job.output);
                    *rows = SequenceRows::new(start, end, ROW_BYTES);
                }
            }
        }
        Ok(())
    }

    /// Samples: splits prompts that are complete, appends tokens, ends what is long enough.
    fn extend(&mut self, batch: &Batch) -> Result<(), TestCaseError> {
        for scheduled in batch.scheduled.iter().filter(|scheduled| scheduled.samples) {
            let mut choices = vec![scheduled.seq];
            let parent = self.live.get_mut(&scheduled.seq).expect("scheduled sequences are live");
            if parent.job.choices > 1 {
                let sequence = self.scheduler.get(scheduled.seq).expect("scheduled sequences are live");
                if sequence.tokens().len() == sequence.prompt_len() {
                    let at = (&self.ring, self.fault, self.version);
                    let upto = sequence.prompt_len();
                    drain(at, sequence, self.scheduler.pool(), parent, upto, &mut self.counted)?;
                    let (job, rows, first) = (parent.job.clone(), parent.rows.clone(), parent.first.clone());
                    let drained = parent.drained.clone();
                    for child in self.scheduler.fork(scheduled.seq) {
                        let own_from = upto;
                        let (job, rows, first, drained) = (job.clone(), rows.clone(), first.clone(), drained.clone());
                        self.live.insert(child, Tracked { job, rows, first, own_from, drained });
                        choices.push(child);
                    }
                }
            }
            for id in choices {
                let sequence = self.scheduler.get(id).expect("choices are live");
                let made = sequence.tokens().len() - sequence.prompt_len();
                if made + 1 == self.live[&id].job.output {
                    self.end(id)?;
                } else {
                    // Choices diverge at once, and alike between requests, so that prefixes are found again.
                    self.scheduler.push_token(id, (made + sequence.choice()) as u32 % 3);
                }
            }
        }
        Ok(())
    }

    /// A choice has ended: its rows are drained, at once or in pieces while others run.
    fn end(&mut self, id: SeqId) -> Result<(), TestCaseError> {
        let Some(tracked) = self.live.remove(&id) else { return Ok(()) };
        let sequence = self.scheduler.get(id).expect("a tracked sequence is live");
        // The last sampled token was never forwarded; here none has been appended.
        let upto = sequence.max_computed_tokens().min(sequence.tokens().len());
        self.scheduler.retire(id);
        let slowly = tracked.job.slowly && tracked.rows.is_some();
        bump(&self.met.slow_ends, usize::from(slowly));
        self.closing.push((id, tracked, upto));
        if slowly { Ok(()) } else { self.close(self.closing.len() - 1, usize::MAX) }
    }

    fn close_some(&mut self) -> Result<(), TestCaseError> {
        match self.closing.is_empty() {
            true => Ok(()),
            false => self.close(0, 3),
        }
    }

    /// Drains up to `slice` rows of an ended choice; when all are there, compares them with the model's.
    fn close(&mut self, index: usize, slice: usize) -> Result<(), TestCaseError> {
        let (id, tracked, upto) = &mut self.closing[index];
        let sequence = self.scheduler.get(*id).expect("a retired sequence is there until it is removed");
        if let Some(end) = tracked.rows.as_ref().map(|rows| rows.span().end) {
            let to = (*upto).min(sequence.num_computed_tokens()).min(end.saturating_add(slice));
            let at = (&self.ring, self.fault, self.version);
            drain(at, sequence, self.scheduler.pool(), tracked, to, &mut self.counted)?;
            if tracked
                .rows
                .as_ref()
                .is_some_and(|rows| rows.num_missing((*upto).min(sequence.num_computed_tokens())) > 0)
            {
                return Ok(());
            }
        }
        let (id, tracked, upto) = self.closing.remove(index);
        let sequence = self.scheduler.remove(id).expect("a retired sequence is there until it is removed");
        let Some(rows) = tracked.rows else { return Ok(()) };
        let start = tracked.job.start.map_or(0, |share| (share * tracked.job.prompt.len() as f64) as usize);
        let span = TokenSpan::new(start, upto);
        let first = &tracked.first[start.min(upto)..upto];
        let versions: Vec<(String, TokenSpan)> =
            rows.versions(upto).into_iter().map(|(version, span)| (version.to_string(), span)).collect();
        let tiled: usize = versions.iter().map(|(_, span)| span.len()).sum();
        prop_assert_eq!(tiled, span.len(), "versions cover the rows");
        for (version, span) in &versions {
            for position in span.iter() {
                prop_assert_eq!(&tracked.first[position].version.to_string(), version, "version at {}", position);
            }
        }
        self.counted.prefix_cached += rows.rows_of_others();
        self.expected.prefix_cached += first.iter().filter(|content| content.request != sequence.request()).count();
        self.expected.d2h_bytes += span.intersection(TokenSpan::new(tracked.own_from, upto)).len() * ROW_BYTES;
        let mut rows = rows;
        rows.settle();
        let (found, data) = rows.into_rest(upto);
        self.counted.returned += data.len() / ROW_BYTES;
        self.expected.returned += span.len();
        prop_assert_eq!(found, start);
        let found: Vec<u64> = data
            .chunks_exact(ROW_BYTES)
            .map(|row| u64::from_le_bytes(row.try_into().expect("a row has eight bytes")))
            .collect();
        let expect: Vec<u64> = first.iter().map(|content| content.forward).collect();
        prop_assert_eq!(found, expect, "rows [{}, {}) of {:?}", start, upto, id);
        Ok(())
    }

    fn abort(&mut self, index: usize) -> Result<(), TestCaseError> {
        let request = self.live.keys().nth(index % self.live.len().max(1)).and_then(|id| self.scheduler.get(*id));
        let Some(request) = request.map(|sequence| sequence.request()) else { return Ok(()) };
        bump(&self.met.aborts, 1);
        let of_request = |id: &&SeqId| self.scheduler.get(**id).is_some_and(|sequence| sequence.request() == request);
        let ids: Vec<SeqId> = self.live.keys().filter(of_request).copied().collect();
        // The prompt's rows were drained once for all choices; before the split there is one.
        ids.into_iter().try_for_each(|id| self.end(id))
    }

    fn drain_one(&mut self, index: usize) -> Result<(), TestCaseError> {
        let Some(id) = self.live.keys().nth(index % self.live.len().max(1)).copied() else { return Ok(()) };
        let sequence = self.scheduler.get(id).expect("a tracked sequence is live");
        let tracked = self.live.get_mut(&id).expect("found above");
        let at = (&self.ring, self.fault, self.version);
        drain(at, sequence, self.scheduler.pool(), tracked, sequence.num_computed_tokens(), &mut self.counted)
    }

    fn reset(&mut self) -> Result<(), TestCaseError> {
        while !self.closing.is_empty() {
            self.close(0, usize::MAX)?;
        }
        let Self { scheduler, ring, live, counted, fault, version, .. } = self;
        let mut lost = Ok(());
        scheduler.reset_cache(&mut |sequence, pool, release| {
            assert_eq!(release, Release::Recompute);
            if let Some(tracked) = live.get_mut(&sequence.id()) {
                let computed = sequence.num_computed_tokens();
                let drained = drain((ring, *fault, *version), sequence, pool, tracked, computed, counted);
                lost = std::mem::replace(&mut lost, Ok(())).and(drained);
            }
        });
        lost
    }

    fn run(&mut self, op: Op) -> Result<(), TestCaseError> {
        match op {
            Op::Submit(job) => {
                self.submit(job);
                Ok(())
            }
            Op::Steps(count) => (0..count).try_for_each(|_| self.step()),
            Op::Abort(index) => self.abort(index),
            Op::Drain(index) => self.drain_one(index),
            Op::Reset => {
                bump(&self.met.resets, usize::from(!self.live.is_empty()));
                self.reset()
            }
            Op::UpdateWeights => {
                bump(&self.met.updates, usize::from(!self.live.is_empty()));
                if self.fault != Fault::CacheKeptOnUpdate {
                    self.reset()?;
                }
                self.version += 1;
                Ok(())
            }
        }
    }
}

fn check(case: Case, fault: Fault, met: &Met, gpu: Option<Gpu>) -> Result<(), TestCaseError> {
    let (num_blocks, num_host_blocks) = (case.config.num_blocks, case.config.num_host_blocks);
    let mut rig = Rig::new(case.config, fault, met, gpu);
    for op in case.ops {
        rig.run(op)?;
    }
    let mut steps = 0;
    while !rig.live.is_empty() || !rig.closing.is_empty() {
        rig.step()?;
        steps += 1;
        prop_assert!(steps < 20_000, "{} choices never end", rig.live.len());
    }
    prop_assert_eq!(&rig.counted, &rig.expected);
    prop_assert_eq!(rig.scheduler.pool().num_free(), num_blocks, "a block leaked");
    prop_assert_eq!(rig.scheduler.host().num_free(), num_host_blocks, "a block of the swap space leaked");
    prop_assert!(rig.scheduler.is_idle());
    Ok(())
}

/// As [`run_on`], with the ring in host memory.
fn run(cases: u32, fault: Fault, met: &Met) -> Result<(), String> {
    run_on(cases, fault, met, || None)
}

fn run_on(cases: u32, fault: Fault, met: &Met, gpu: impl Fn() -> Option<Gpu>) -> Result<(), String> {
    let seed = std::env::var("MOETRAIL_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20_261_121);
    println!("{fault:?}: {cases} cases of seed {seed} (MOETRAIL_TEST_SEED draws others)");
    let config = Config { cases, rng_seed: RngSeed::Fixed(seed), failure_persistence: None, ..Config::default() };
    let result = TestRunner::new(config).run(&case(), |case| check(case, fault, met, gpu()));
    result.map_err(|error| error.to_string())
}

#[test]
fn no_row_differs_from_a_model_that_keeps_every_row() {
    let met = Met::default();
    run(10_000, Fault::None, &met).unwrap_or_else(|error| panic!("{error}"));
    for (kind, count) in met.all() {
        let count = count.load(Ordering::Relaxed);
        println!("{count} {kind}");
        assert!(count >= 2_000, "only {count} {kind} were met");
    }
}

/// The ring in the memory of a device whose streams advance late or by chance, under another seed each time.
#[test]
fn no_row_of_a_device_differs_either() {
    if moetrail_emulation::gpu(0, 0).is_none() {
        return;
    }
    let seeds = AtomicUsize::new(0);
    let gpu = || moetrail_emulation::gpu(seeds.fetch_add(1, Ordering::Relaxed) as u64, 1 << 24);
    run_on(300, Fault::None, &Met::default(), gpu).unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn planted_faults_are_caught() {
    for fault in [
        Fault::RowLostOnCopy,
        Fault::RowLostOnSwapOut,
        Fault::RowLostOnSwapIn,
        Fault::NoDrainBeforeRelease,
        Fault::LastWriterWins,
        Fault::BlockOfAnother,
        Fault::OldGeneration,
        Fault::CacheKeptOnUpdate,
        Fault::TrimAfterTheCopy,
        Fault::ReplayNotInTheHash,
    ] {
        let error = run(2_000, fault, &Met::default()).expect_err("the fault went unnoticed");
        // A panic of the test's own would prove nothing.
        assert!(!error.contains("panicked"), "{fault:?}: {error}");
    }
}
