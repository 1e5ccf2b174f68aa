//! The engine thread: take commands, compute a step, hand out what it led to.

use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::Instant;

use moetrail_models::{Decoder, KvCache};
use moetrail_routes::TokenSpan;
use moetrail_sched::{Batch, NewSequence, RequestKey, Scheduler, SeqId};
use rustc_hash::FxHashMap;
use tokio::sync::mpsc::UnboundedSender;

use crate::capture::Capture;
use crate::choice::Choice;
use crate::config::ReprefillRouting;
use crate::finish::{Closing, Ending};
use crate::flight::Flight;
use crate::handle::{Command, Shared};
use crate::info::EngineInfo;
use crate::lifecycle::Pause;
use crate::request::{Event, FinishReason, GenerateRequest, ReplayStats, RequestError, TokenLogprobs};
use crate::stats::EngineStats;
use crate::swap::SwapSpace;

/// A request that has been accepted and has not ended.
pub(crate) struct Live {
    pub(crate) request: GenerateRequest,
    pub(crate) events: UnboundedSender<Event>,
    pub(crate) seed: u64,
    pub(crate) arrived: Instant,
    /// Its sequences that have not ended; choice 0 alone until the prompt is computed.
    pub(crate) seqs: Vec<SeqId>,
    pub(crate) prompt_sent: bool,
    pub(crate) first_scheduled: bool,
    pub(crate) prompt_logprobs: Vec<Option<TokenLogprobs>>,
    pub(crate) replay_stats: ReplayStats,
}

/// Everything the engine thread owns. Nothing here is shared or locked.
pub(crate) struct EngineThread {
    pub(crate) decoder: Decoder,
    pub(crate) kv: KvCache,
    pub(crate) capture: Capture,
    pub(crate) swap: SwapSpace,
    pub(crate) scheduler: Scheduler,
    /// A step that was issued ahead.
    pub(crate) flight: Option<Flight>,
    /// Batches that are used again.
    pub(crate) batches: Vec<Batch>,
    pub(crate) live: FxHashMap<RequestKey, Live>,
    pub(crate) choices: FxHashMap<SeqId, Choice>,
    /// Choices that have ended and whose rows are still on their way to the host, in order.
    pub(crate) closing: Vec<Closing>,
    pub(crate) settings: StepSettings,
    pub(crate) info: Arc<EngineInfo>,
    pub(crate) stats: Arc<EngineStats>,
    pub(crate) seed: u64,
    pub(crate) receiver: mpsc::Receiver<Command>,
    pub(crate) shared: Arc<Shared>,
    /// Set by a shutdown: the live requests are the last.
    pub(crate) draining: bool,
    pub(crate) pause: Pause,
    /// Weight updates so far.
    pub(crate) num_updates: u64,
}

/// What the command line decides about steps.
pub(crate) struct StepSettings {
    pub(crate) reprefill_routing: ReprefillRouting,
    pub(crate) verify_reprefill: bool,
}

impl EngineThread {
    /// Runs until shutdown, or until the last handle is gone and the last request has ended.
    pub(crate) fn run(mut self) {
        while self.receive().is_continue() {
            self.guard(Self::step);
            self.publish_gauges();
        }
    }

    /// Does what computes. A panic in it is a bug of ours; it must not take the server down with it.
    pub(crate) fn guard(&mut self, compute: impl FnOnce(&mut Self)) {
        if catch_unwind(AssertUnwindSafe(|| compute(self))).is_err() {
            tracing::error!("a step panicked; every live request fails");
            self.fail_all("the engine failed internally");
        }
    }

    /// Takes all commands that have come in; waits for one if there is nothing to compute.
    fn receive(&mut self) -> ControlFlow<()> {
        loop {
            self.finish_pause();
            let command = if (self.scheduler.is_idle() && self.flight.is_none()) || self.is_still() {
                if self.draining {
                    return ControlFlow::Break(());
                }
                match self.receiver.recv() {
                    Ok(command) => command,
                    Err(mpsc::RecvError) => return ControlFlow::Break(()),
                }
            } else {
                match self.receiver.try_recv() {
                    Ok(command) => command,
                    Err(_) => return ControlFlow::Continue(()),
                }
            };
            match command {
                Command::Submit(key, request, events) => self.submit(key, *request, events),
                Command::Abort(key) => self.abort(key),
                Command::Control(order) => self.control(order),
                Command::Shutdown => {
                    // What stands still would never finish.
                    self.resume();
                    self.draining = true;
                }
            }
            self.publish_gauges();
        }
    }

    fn submit(&mut self, key: RequestKey, request: GenerateRequest, events: UnboundedSender<Event>) {
        // Requests without a seed still differ from each other, and repeat under `--seed` in the same order.
        let seed =
            request.sampling.seed.unwrap_or_else(|| self.seed.wrapping_add(key.0.wrapping_mul(0x9E37_79B9_7F4A_7C15)));
        let seq = self.scheduler.add(NewSequence {
            request: key,
            prompt: request.prompt.to_vec(),
            num_choices: request.sampling.n,
            priority: request.priority,
            cache_salt: request.cache_salt.clone(),
            replay_digests: replay_digests(&request, self.info.block_size),
            // Cached positions are not forwarded: they have no logits, and no router that would have chosen otherwise.
            read_prefix_cache: request.sampling.prompt_logprobs.is_none() && request.routed_experts_replay.is_none(),
        });
        // The last sampled token has no row.
        let end = request.prompt.len() + request.sampling.max_tokens.saturating_sub(1);
        let rows = request.routed_experts_start.and_then(|start| self.capture.new_rows(start, end));
        self.choices.insert(seq, Choice::new(0, &request, self.info.tokenizer.as_ref(), rows));
        let live = Live {
            request,
            events,
            seed,
            arrived: Instant::now(),
            seqs: vec![seq],
            prompt_sent: false,
            first_scheduled: false,
            prompt_logprobs: Vec::new(),
            replay_stats: ReplayStats::default(),
        };
        self.live.insert(key, live);
    }

    /// Ends what is left of a request; its choices say `abort` and keep the rows forwarded so far.
    pub(crate) fn abort(&mut self, key: RequestKey) {
        let Some(live) = self.live.get(&key) else { return };
        for seq in live.seqs.clone() {
            self.finish(seq, Ending::without_token(FinishReason::Abort));
        }
    }

    /// Fails a request as a whole; others go on.
    pub(crate) fn fail(&mut self, key: RequestKey, error: RequestError) {
        let Some(live) = self.live.remove(&key) else { return };
        for seq in live.seqs {
            self.release(seq);
            self.choices.remove(&seq);
            self.closing.retain(|closing| closing.seq != seq);
        }
        self.shared.live.fetch_sub(1, Ordering::AcqRel);
        // A client that is gone does not need to know.
        let _ = live.events.send(Event::Failed(error));
    }

    /// Ends a sequence. A step on its way may still write its blocks: they are kept until it has landed.
    pub(crate) fn release(&mut self, seq: SeqId) {
        match self.flight.as_mut().filter(|flight| flight.writes(seq)) {
            Some(flight) => {
                self.scheduler.retire(seq);
                flight.leaving.push(seq);
            }
            None => _ = self.scheduler.remove(seq),
        }
    }

    pub(crate) fn fail_all(&mut self, message: &str) {
        for key in self.live.keys().copied().collect::<Vec<_>>() {
            self.fail(key, RequestError::Engine(message.to_owned()));
        }
        // Whatever a broken step left behind is dropped with the old pool: no block of it can be matched again.
        self.scheduler = Scheduler::new(self.scheduler.config().clone());
        self.closing.clear();
        self.flight = None;
    }

    /// Splits a request whose prompt is computed into its choices. The prompt's rows are drained once, before.
    pub(crate) fn fork(&mut self, key: RequestKey, seq: SeqId) -> Vec<SeqId> {
        let mut all = vec![seq];
        let Some(live) = self.live.get_mut(&key).filter(|live| live.request.sampling.n > 1) else { return all };
        let (Some(parent), Some(sequence)) = (self.choices.get_mut(&seq), self.scheduler.get(seq)) else { return all };
        if let Some(rows) = &mut parent.rows {
            self.capture.drain(sequence, self.scheduler.pool(), rows, sequence.prompt_len());
        }
        let rows = parent.rows.clone();
        for (offset, child) in self.scheduler.fork(seq).into_iter().enumerate() {
            let choice = Choice::new(offset + 1, &live.request, self.info.tokenizer.as_ref(), rows.clone());
            self.choices.insert(child, choice);
            live.seqs.push(child);
            all.push(child);
        }
        all
    }

    pub(crate) fn publish_gauges(&self) {
        let pool = self.scheduler.pool();
        self.stats.num_requests_running.set(self.scheduler.num_running() as i64);
        self.stats.num_requests_waiting.set(self.scheduler.num_waiting() as i64);
        let used = pool.num_blocks() - pool.num_free();
        self.stats.kv_cache_usage_perc.set(used as f64 / pool.num_blocks() as f64);
    }
}

/// What a request's given routing adds to the names of its blocks.
fn replay_digests(request: &GenerateRequest, block_size: usize) -> Arc<[Option<u128>]> {
    let Some(replay) = &request.routed_experts_replay else { return Arc::default() };
    let blocks = (0..replay.span().end).step_by(block_size);
    blocks.map(|first| replay.digest(TokenSpan::new(first, first + block_size))).collect()
}

impl Drop for EngineThread {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Release);
    }
}
