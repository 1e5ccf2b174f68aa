//! One step: schedule, forward, sample, hand out.

use std::ops::Range;
use std::sync::Mutex;
use std::time::Instant;

use candle_core::Tensor;
use moetrail_kernels::gpu::SampledToken;
use moetrail_kernels::{SeqSpan, pool, with_elements};
use moetrail_models::{Hidden, HiddenOutput, Marks, ModelError, Replay, StepInput};
use moetrail_routes::TokenSpan;
use moetrail_sched::{Batch, RequestKey, Scheduled, SeqId};

use crate::choice::Choice;
use crate::device_sampling::scored;
use crate::engine::{EngineThread, Live};
use crate::finish::Ending;
use crate::logit_rows::LogitRows;
use crate::logprobs::token_logprobs;
use crate::request::{ChoiceDelta, Event, FinishReason, PromptOutput, RequestError, TokenLogprobs};
use crate::sampler;

/// Logits of at most this many floats are held at once while a prompt is scored (64 MiB).
const PROMPT_LOGITS: usize = 16 << 20;

/// What a step computed.
struct Output {
    hidden: Hidden,
    marks: Marks,
    /// Those of `LogitRows::device`.
    tokens: Vec<SampledToken>,
}

/// A sampled token of one choice.
pub(crate) struct Sampled {
    pub(crate) seq: SeqId,
    pub(crate) token: Result<u32, RequestError>,
    pub(crate) logprobs: Vec<TokenLogprobs>,
}

impl EngineThread {
    /// Computes one step, if there is anything to compute.
    pub(crate) fn step(&mut self) {
        let mut batch = std::mem::take(&mut self.batch);
        if let Err(error) = self.schedule(&mut batch) {
            tracing::error!(%error, "blocks could not be moved; every live request fails");
            return self.fail_all(&format!("blocks could not be moved: {error}"));
        }
        if !batch.is_empty() {
            let wanted = self.logit_rows(&batch);
            match self.forward(&batch, &wanted) {
                Ok(output) => {
                    self.scheduler.commit(&batch);
                    self.count(&batch, &output.marks.changed_cells);
                    self.fail_nan_rows(&batch, &output.marks);
                    self.hand_out(&batch, &wanted, &output);
                }
                Err(message) => self.fail_batch(&batch, &message),
            }
        }
        let scheduled: Vec<SeqId> = batch.scheduled.iter().map(|scheduled| scheduled.seq).collect();
        self.drain_slice(&scheduled);
        self.batch = batch;
    }

    /// Plans the step and moves blocks; sequences that lose theirs have their rows drained first.
    fn schedule(&mut self, batch: &mut Batch) -> Result<(), ModelError> {
        let (capture, choices, settings) = (&self.capture, &mut self.choices, &self.settings);
        self.scheduler.schedule(batch, &mut |sequence, pool, release| {
            if let Some(choice) = choices.get_mut(&sequence.id()) {
                choice.lose_blocks(sequence, pool, release, capture, settings.reprefill_routing);
            }
        });
        self.stats.num_preemptions.inc_by(batch.num_preempted as u64);
        batch.moves.iter().try_for_each(|step| self.swap.execute(*step, &mut self.kv, &mut self.capture))
    }

    /// The given routing of a batch: for each row its row in the ids, and the ids; `None` if all rows are free.
    fn given_routing(&self, batch: &Batch) -> Option<(Vec<u32>, Vec<u16>)> {
        let (mut row_of, mut ids, mut num_rows) = (Vec::new(), Vec::new(), 0);
        for scheduled in &batch.scheduled {
            let saved = self.choices.get(&scheduled.seq).and_then(|choice| choice.saved.as_ref());
            let sequence = self.scheduler.get(scheduled.seq)?;
            let live = self.live.get(&sequence.request());
            let given = live.and_then(|live| live.request.routed_experts_replay.as_deref());
            for position in scheduled.span().iter().filter(|_| saved.is_some() || given.is_some()) {
                // What was used the first time is used again, whoever gave it.
                let row = saved.and_then(|rows| rows.row(position)).or_else(|| given?.row(position));
                let Some(row) = row else { continue };
                row_of.resize(batch.num_tokens(), Replay::FREE);
                row_of[scheduled.rows.start + position - scheduled.first_position] = num_rows;
                num_rows += 1;
                ids.extend_from_slice(row);
            }
        }
        (num_rows > 0).then_some((row_of, ids))
    }

    /// Runs the layers, and what the device samples: it is waited for once.
    fn forward(&mut self, batch: &Batch, wanted: &LogitRows) -> Result<Output, String> {
        let given = self.given_routing(batch);
        let span = |scheduled: &Scheduled| SeqSpan {
            rows: scheduled.rows.clone(),
            first_position: scheduled.first_position as u32,
            block_table: &batch.block_tables[scheduled.blocks.clone()],
        };
        let seqs: Vec<SeqSpan<'_>> = batch.scheduled.iter().map(span).collect();
        let input = StepInput {
            token_ids: &batch.token_ids,
            positions: &batch.positions,
            slot_mapping: &batch.slot_mapping,
            seqs: &seqs,
            logit_rows: &wanted.batch_rows(),
            replay: given.as_ref().map(|(row_of, ids)| Replay { row_of, ids }),
        };
        let mut run = || {
            let HiddenOutput { hidden, marks } = self.decoder.hidden(&input, &mut self.kv, self.capture.cells())?;
            let tokens = self.decoder.sample(&hidden, &wanted.device.tokens)?;
            let (marks, tokens) = marks.finish(&tokens)?;
            Ok::<_, ModelError>(Output { hidden, marks, tokens })
        };
        run().map_err(|error| error.to_string())
    }

    /// Counts what the step computed, and notes first admissions.
    fn count(&mut self, batch: &Batch, changed_cells: &[u32]) {
        self.stats.iterations.inc();
        if self.capture.is_on() {
            self.stats.rows_captured.inc_by(batch.num_tokens() as u64);
            self.capture.count_selections(&batch.slot_mapping);
        }
        let moe_layers = self.info.routing.as_ref().map_or(0, |routing| routing.moe_layers.len());
        for scheduled in &batch.scheduled {
            let Some(sequence) = self.scheduler.get(scheduled.seq) else { continue };
            if let Some(rows) = self.choices.get_mut(&scheduled.seq).and_then(|choice| choice.rows.as_mut()) {
                // Rows of positions just computed are on the host only if they were drained at a preemption.
                let span = scheduled.span();
                self.stats.rows_deduplicated.inc_by(span.intersection(rows.span()).len() as u64);
                if self.settings.verify_reprefill {
                    self.capture.verify(sequence, rows, span);
                }
            }
            if let Some(choice) = self.choices.get_mut(&scheduled.seq) {
                let computed = sequence.num_computed_tokens();
                choice.saved = choice.saved.take().filter(|saved| saved.span().end > computed);
            }
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
            let Some(key) = self.scheduler.get(scheduled.seq).map(|sequence| sequence.request()) else { continue };
            let position = batch.positions[row] as usize;
            self.fail(key, RequestError::NotANumber { place: "router logits", position });
        }
    }

    fn fail_batch(&mut self, batch: &Batch, message: &str) {
        tracing::error!(message, "a forward pass failed; its requests fail");
        for scheduled in &batch.scheduled {
            if let Some(key) = self.scheduler.get(scheduled.seq).map(|sequence| sequence.request()) {
                self.fail(key, RequestError::Engine(format!("the forward pass failed: {message}")));
            }
        }
    }

    /// Turns hidden rows, and what the device made of them, into events.
    fn hand_out(&mut self, batch: &Batch, wanted: &LogitRows, output: &Output) {
        for &(at, key, position) in &wanted.device.prompt {
            self.take_prompt_logprob(key, position, scored(&output.tokens[at]));
        }
        let (first, len) = (wanted.prompt_rows.len(), wanted.next_rows.len());
        let done = self.score_prompts(wanted, &output.hidden).and_then(|()| {
            let logits = self.logits(&output.hidden, first..first + len)?;
            with_elements("sampling", &logits, |logits| self.hand_out_tokens(batch, wanted, logits, output))
        });
        if let Err(error) = done {
            self.fail_batch(batch, &error.to_string());
        }
    }

    /// Tells of complete prompts, samples from the logits `[next_rows, vocab]`, and lets the choices advance, by the
    /// device's tokens as well.
    fn hand_out_tokens(
        &mut self,
        batch: &Batch,
        wanted: &LogitRows,
        logits: &[f32],
        output: &Output,
    ) -> candle_core::Result<()> {
        let vocab = self.info.vocab_size;
        let row_of = |index: usize| &logits[index * vocab..(index + 1) * vocab];

        // Prompts that are complete now: tell, then split into choices, which all continue from the same logits.
        let mut jobs: Vec<(usize, SeqId)> = Vec::with_capacity(wanted.next.len());
        let mut sampled_already: Vec<(usize, SeqId)> = Vec::with_capacity(wanted.device.next.len());
        for scheduled in batch.scheduled.iter().filter(|scheduled| scheduled.samples) {
            // A request that failed in this step is no longer known.
            let Some(key) = self.scheduler.get(scheduled.seq).map(|sequence| sequence.request()) else { continue };
            let first = self.announce_prompt(key, scheduled.seq);
            let choices = if first { self.fork(key, scheduled.seq) } else { vec![scheduled.seq] };
            match (wanted.next.get(&scheduled.seq), wanted.device.next.get(&scheduled.seq)) {
                (Some(index), _) => jobs.extend(choices.into_iter().map(|seq| (*index, seq))),
                (None, Some(first)) => sampled_already.extend((*first..).zip(choices)),
                (None, None) => {
                    for seq in choices {
                        self.finish(seq, Ending::without_token(FinishReason::Length));
                    }
                }
            }
        }
        let mut sampled = self.sample(&jobs, &row_of);
        let rows = jobs.iter().map(|(index, _)| wanted.prompt_rows.len() + index);
        self.score_sampled(&mut sampled, rows, &output.hidden).map_err(candle_core::Error::wrap)?;
        for sampled in sampled {
            self.advance(sampled);
        }
        for (at, seq) in sampled_already {
            self.advance(self.take_sampled(seq, &output.tokens[at]));
        }
        Ok(())
    }

    /// The logits of some hidden rows on the host, `[rows, vocab]`.
    fn logits(&self, hidden: &Hidden, rows: Range<usize>) -> candle_core::Result<Tensor> {
        if self.decoder.gpu().is_some() {
            self.stats.logits_d2h_bytes.inc_by((rows.len() * self.info.vocab_size * size_of::<f32>()) as u64);
        }
        self.decoder.logits(hidden, rows).map_err(candle_core::Error::wrap)
    }

    /// Adds the prompt log-probabilities of this step, slice by slice.
    fn score_prompts(&mut self, wanted: &LogitRows, hidden: &Hidden) -> candle_core::Result<()> {
        let vocab = self.info.vocab_size;
        let slice = (PROMPT_LOGITS / vocab).max(1);
        for (index, entries) in wanted.prompt.chunks(slice).enumerate() {
            let logits = self.logits(hidden, index * slice..index * slice + entries.len())?;
            let live = &self.live;
            let results = with_elements("scoring", &logits, |logits| {
                Ok(in_parallel(entries.len(), |job| {
                    let (key, position) = entries[job];
                    let request = &live.get(&key)?.request;
                    let num_top = request.sampling.prompt_logprobs.unwrap_or(0);
                    Some(token_logprobs(&logits[job * vocab..(job + 1) * vocab], request.prompt[position], num_top))
                }))
            })?;
            for ((key, position), result) in entries.iter().zip(results) {
                self.take_prompt_logprob(*key, *position, result);
            }
        }
        Ok(())
    }

    fn take_prompt_logprob(&mut self, key: RequestKey, position: usize, result: Option<TokenLogprobs>) {
        let (Some(live), Some(result)) = (self.live.get_mut(&key), result) else { return };
        if result.logprob.is_nan() {
            return self.fail(key, RequestError::NotANumber { place: "logits", position: position - 1 });
        }
        if live.prompt_logprobs.is_empty() {
            live.prompt_logprobs.push(None);
        }
        // Positions come in order, each once.
        live.prompt_logprobs.push(Some(result));
    }

    /// Sends the prompt's event, once. Returns whether it did.
    fn announce_prompt(&mut self, key: RequestKey, seq: SeqId) -> bool {
        let cached_tokens = self.scheduler.get(seq).map_or(0, |sequence| sequence.num_cached_tokens());
        let Some(live) = self.live.get_mut(&key).filter(|live| !live.prompt_sent) else { return false };
        live.prompt_sent = true;
        self.stats.prompt_tokens.inc_by(live.request.prompt.len() as u64);
        self.stats.prompt_tokens_cached.inc_by(cached_tokens as u64);
        let prompt_logprobs = live.request.sampling.prompt_logprobs.map(|_| {
            let mut entries = std::mem::take(&mut live.prompt_logprobs);
            // A prompt of one token predicts nothing within the prompt.
            entries.resize(live.request.prompt.len(), None);
            entries
        });
        let replay_stats = live.request.routed_experts_replay.as_ref().map(|_| live.replay_stats);
        // A client that is gone is noticed when its stream is dropped.
        let _ = live.events.send(Event::Prompt(PromptOutput { cached_tokens, prompt_logprobs, replay_stats }));
        true
    }

    fn sample<'a>(&self, jobs: &[(usize, SeqId)], row_of: &(impl Fn(usize) -> &'a [f32] + Sync)) -> Vec<Sampled> {
        let (scheduler, live, choices, info) = (&self.scheduler, &self.live, &self.choices, &self.info);
        let most_on_device = self.decoder.max_sampled_logprobs();
        in_parallel(jobs.len(), |job| {
            let (index, seq) = jobs[job];
            let known = scheduler.get(seq).and_then(|sequence| live.get(&sequence.request())).zip(choices.get(&seq));
            let Some((live, choice)) = known else { return Sampled::unknown(seq) };
            let raw = row_of(index);
            let token = sample_one(raw, live, choice, &info.eos_token_ids);
            // What the device can score has the device's bits.
            let on_host = |num_top: &usize| most_on_device.is_none_or(|most| *num_top > most);
            let asked = live.request.sampling.logprobs.filter(on_host);
            let asked = token.as_ref().ok().zip(asked);
            let logprobs = asked.map(|(token, num_top)| token_logprobs(raw, *token, num_top)).into_iter().collect();
            Sampled { seq, token, logprobs }
        })
    }

    /// A choice got its next token.
    fn advance(&mut self, sampled: Sampled) {
        let Some(sequence) = self.scheduler.get(sampled.seq) else { return };
        let key = sequence.request();
        let token = match sampled.token {
            Ok(token) => token,
            Err(error) => return self.fail(key, error),
        };
        let (Some(live), Some(choice)) = (self.live.get(&key), self.choices.get_mut(&sampled.seq)) else { return };
        let now = Instant::now();
        match choice.last_token_at.replace(now) {
            None => self.stats.time_to_first_token.observe((now - live.arrived).as_secs_f64()),
            Some(last) => self.stats.inter_token_latency.observe((now - last).as_secs_f64()),
        }
        self.stats.generation_tokens.inc();
        let advance = choice.advance(token, &live.request, &self.info.eos_token_ids);
        if let Some((reason, stop_reason)) = advance.end {
            let (text, logprobs) = (advance.text, sampled.logprobs);
            return self.finish(sampled.seq, Ending { token_ids: vec![token], text, logprobs, reason, stop_reason });
        }
        let routed_experts = choice.rows.as_mut().filter(|_| live.request.routed_experts_delta).and_then(|rows| {
            // Every token but the new one has been forwarded.
            let upto = sequence.num_computed_tokens();
            self.capture.drain(sequence, self.scheduler.pool(), rows, upto);
            self.capture.delta(rows, upto)
        });
        let delta = ChoiceDelta {
            index: choice.index,
            token_ids: vec![token],
            text: advance.text,
            logprobs: sampled.logprobs,
            routed_experts,
            finish: None,
        };
        self.scheduler.push_token(sampled.seq, token);
        // A client that is gone is noticed when its stream is dropped.
        let _ = live.events.send(Event::Choice(delta));
    }
}

impl Sampled {
    /// Of a choice that is gone; it tells nobody.
    pub(crate) fn unknown(seq: SeqId) -> Self {
        let error = RequestError::Engine("the choice is not known to the engine".into());
        Self { seq, token: Err(error), logprobs: Vec::new() }
    }
}

fn sample_one(raw: &[f32], live: &Live, choice: &Choice, eos: &[u32]) -> Result<u32, RequestError> {
    // Without a way out of the loop it takes whole vectors.
    let is_nan = raw.iter().fold(false, |nan, logit| nan | logit.is_nan());
    let params = &live.request.sampling;
    let pick = || {
        let banned = sampler::banned(params, choice.num_output, eos);
        let uniform = || sampler::uniform(live.seed, choice.index, choice.num_output);
        sampler::pick(raw, params, &choice.counts, &banned, uniform)
    };
    picked((!is_nan).then(pick), live, choice)
}

/// The token, if there is one; `None` if a logit is NaN.
pub(crate) fn picked(token: Option<Option<u32>>, live: &Live, choice: &Choice) -> Result<u32, RequestError> {
    let position = || live.request.prompt.len() + choice.num_output - 1;
    let token = token.ok_or_else(|| RequestError::NotANumber { place: "logits", position: position() })?;
    token.ok_or_else(|| RequestError::Engine("bias, masks and min_tokens leave no token to sample".into()))
}

/// Computes `job(0..num_jobs)` on the kernels' pool, in order of the index.
fn in_parallel<T: Send>(num_jobs: usize, job: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let slots: Vec<Mutex<Option<T>>> = (0..num_jobs).map(|_| Mutex::new(None)).collect();
    pool::run(num_jobs, &|index| {
        let result = job(index);
        *slots[index].lock().unwrap_or_else(|poison| poison.into_inner()) = Some(result);
    });
    slots
        .into_iter()
        .map(|slot| slot.into_inner().unwrap_or_else(|poison| poison.into_inner()).expect("the pool runs every job"))
        .collect()
}
