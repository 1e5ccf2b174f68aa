//! One step: schedule, issue, and once it has run count and hand out.

use moetrail_models::Marks;
use moetrail_routes::TokenSpan;
use moetrail_sched::{Batch, RequestKey, SeqId, Sequence};

use crate::device_sampling::device_params;
use crate::engine::EngineThread;
use crate::flight::Flight;
use crate::request::RequestError;

impl EngineThread {
    /// Computes one step, if there is anything to compute. Where a device computes, the step after it is issued before this
    /// one is waited for.
    pub(crate) fn step(&mut self) {
        let flight = self.flight.take().or_else(|| self.launch());
        let Some(flight) = flight else { return self.drain_slice(&[]) };
        self.send_rows(&flight.batch);
        self.flight = self.launch_ahead(&flight);
        let scheduled: Vec<SeqId> = flight.batch.scheduled.iter().map(|scheduled| scheduled.seq).collect();
        self.land(flight);
        self.drain_slice(&scheduled);
    }

    /// Lands the step on its way, so that none is.
    pub(crate) fn settle(&mut self) {
        if let Some(flight) = self.flight.take() {
            self.guard(|engine| engine.land(flight));
        }
    }

    /// Plans and issues a step behind all that has landed.
    fn launch(&mut self) -> Option<Flight> {
        let batch = self.planned(Self::schedule)?;
        Some(self.issue(batch, None))
    }

    /// Plans and issues the step behind one that is on its way, if what that samples can stay on the device till then.
    ///
    /// Whatever a sequence that ends meanwhile computes in it is dropped.
    fn launch_ahead(&mut self, before: &Flight) -> Option<Flight> {
        let most_logprobs = self.decoder.max_sampled_logprobs()?;
        // What counts selections reads the rows of every step as it lands.
        if !before.can_be_followed() || self.capture.counts_load() {
            return None;
        }
        let batch = self.planned(|engine, batch| engine.schedule_ahead(batch, most_logprobs))?;
        self.stats.steps_ahead.inc();
        Some(self.issue(batch, Some(before)))
    }

    /// A planned step whose blocks have been moved; `None` if there is nothing to compute.
    fn planned(&mut self, plan: impl FnOnce(&mut Self, &mut Batch)) -> Option<Batch> {
        let mut batch = self.batches.pop().unwrap_or_default();
        plan(self, &mut batch);
        let mut moves = batch.moves.iter();
        if let Err(error) = moves.try_for_each(|step| self.swap.execute(*step, &mut self.kv, &mut self.capture)) {
            tracing::error!(%error, "blocks could not be moved; every live request fails");
            self.fail_all(&format!("blocks could not be moved: {error}"));
            return None;
        }
        if batch.is_empty() {
            self.batches.push(batch);
            return None;
        }
        Some(batch)
    }

    /// Plans the step; sequences that lose their blocks have their rows drained first.
    fn schedule(&mut self, batch: &mut Batch) {
        let (capture, choices, settings) = (&self.capture, &mut self.choices, &self.settings);
        self.scheduler.schedule(batch, &mut |sequence, pool, release| {
            if let Some(choice) = choices.get_mut(&sequence.id()) {
                choice.lose_blocks(sequence, pool, release, capture, settings.reprefill_routing);
            }
        });
        self.stats.num_preemptions.inc_by(batch.num_preempted as u64);
    }

    /// Plans the step behind the one on its way. A sequence whose next token is its last for sure, or whose token after
    /// that a device that lists up to `most_logprobs` alternatives cannot sample, waits.
    fn schedule_ahead(&mut self, batch: &mut Batch, most_logprobs: usize) {
        let (live, eos) = (&self.live, &self.info.eos_token_ids);
        self.scheduler.schedule_ahead(batch, &mut |sequence: &Sequence| {
            let params = live.get(&sequence.request()).map(|live| &live.request.sampling);
            let num_output = sequence.num_expected_tokens() - sequence.prompt_len();
            let can_sample = |params| device_params(params, num_output, eos, most_logprobs, || 0.0).is_some();
            params.is_some_and(|params| num_output < params.max_tokens && can_sample(params))
        });
    }

    /// Waits for a step and hands out what it led to.
    fn land(&mut self, flight: Flight) {
        let Flight { batch, wanted, issued, leaving } = flight;
        let landed = issued.and_then(|issued| issued.land());
        for seq in leaving {
            self.scheduler.remove(seq);
        }
        match landed {
            Ok(output) => {
                self.scheduler.commit(&batch);
                self.count(&batch, &output.marks.changed_cells);
                self.fail_nan_rows(&batch, &output.marks);
                self.hand_out(&batch, &wanted, &output);
            }
            Err(message) => self.fail_batch(&batch, &message),
        }
        self.batches.push(batch);
    }

    /// The request of a sequence whose choice has not ended.
    pub(crate) fn live_key(&self, seq: SeqId) -> Option<RequestKey> {
        self.choices.get(&seq)?;
        self.scheduler.get(seq).map(|sequence| sequence.request())
    }

    /// Counts what the step computed, and notes first admissions.
    fn count(&mut self, batch: &Batch, changed_cells: &[u32]) {
        self.stats.iterations.inc();
        if self.capture.is_on() {
            // Rows of a choice that ended while the step was on its way are nobody's.
            let rows = batch.scheduled.iter().filter(|scheduled| self.choices.contains_key(&scheduled.seq));
            self.stats.rows_captured.inc_by(rows.map(|scheduled| scheduled.rows.len() as u64).sum());
            self.capture.count_selections(&batch.slot_mapping);
        }
        let moe_layers = self.info.routing.as_ref().map_or(0, |routing| routing.moe_layers.len());
        for scheduled in &batch.scheduled {
            let known = self.scheduler.get(scheduled.seq).zip(self.choices.get_mut(&scheduled.seq));
            let Some((sequence, choice)) = known else { continue };
            if let Some(rows) = &mut choice.rows {
                // Rows of positions just computed are on the host only if they were drained at a preemption.
                let span = scheduled.span();
                self.stats.rows_deduplicated.inc_by(span.intersection(rows.span()).len() as u64);
                if self.settings.verify_reprefill {
                    self.capture.verify(sequence, rows, span);
                }
            }
            let computed = sequence.num_computed_tokens();
            choice.saved = choice.saved.take().filter(|saved| saved.span().end > computed);
            let Some(live) = self.live.get_mut(&sequence.request()) else { continue };
            if let Some(replay) = &live.request.routed_experts_replay {
                // Positions computed again were counted the first time.
                let first = scheduled.first_position + scheduled.num_recomputed;
                let replayed = TokenSpan::new(first, scheduled.span().end).intersection(replay.span());
                let rows = replayed.iter().map(|position| scheduled.rows.start + position - scheduled.first_position);
                let changed: u32 = rows.map(|row| changed_cells.get(row).copied().unwrap_or(0)).sum();
                live.replay_stats.rows += replayed.len();
                live.replay_stats.cells += replayed.len() * moe_layers;
                live.replay_stats.cells_changed += changed as usize;
                self.stats.replay_rows.inc_by(replayed.len() as u64);
                self.stats.replay_cells_changed.inc_by(changed.into());
            }
            if !live.first_scheduled {
                live.first_scheduled = true;
                self.stats.request_queue_time.observe(live.arrived.elapsed().as_secs_f64());
                self.stats.prefix_cache_queries.inc_by(sequence.prompt_len() as u64);
                self.stats.prefix_cache_hits.inc_by(sequence.num_cached_tokens() as u64);
            }
        }
    }

    /// A NaN in a router makes a token's routing meaningless: its request fails, the others go on.
    fn fail_nan_rows(&mut self, batch: &Batch, marks: &Marks) {
        for row in marks.nan_rows.iter().map(|row| *row as usize) {
            let Some(scheduled) = batch.scheduled.iter().find(|scheduled| scheduled.rows.contains(&row)) else {
                continue;
            };
            let Some(key) = self.live_key(scheduled.seq) else { continue };
            let position = batch.positions[row] as usize;
            self.fail(key, RequestError::NotANumber { place: "router logits", position });
        }
    }

    pub(crate) fn fail_batch(&mut self, batch: &Batch, message: &str) {
        tracing::error!(message, "a forward pass failed; its requests fail");
        for scheduled in &batch.scheduled {
            if let Some(key) = self.live_key(scheduled.seq) {
                self.fail(key, RequestError::Engine(format!("the forward pass failed: {message}")));
            }
        }
    }
}
