//! What a step that has been computed means for its requests: tokens, text, events.

use std::ops::Range;
use std::sync::Mutex;
use std::time::Instant;

use candle_core::Tensor;
use moetrail_kernels::{pool, with_elements};
use moetrail_models::Hidden;
use moetrail_sched::{Batch, RequestKey, SeqId};

use crate::choice::Choice;
use crate::device_sampling::scored;
use crate::engine::{EngineThread, Live};
use crate::finish::Ending;
use crate::flight::Output;
use crate::logit_rows::LogitRows;
use crate::logprobs::token_logprobs;
use crate::request::{ChoiceDelta, Event, FinishReason, PromptOutput, RequestError, TokenLogprobs};
use crate::sampler;

/// Logits of at most this many floats are held at once while a prompt is scored (64 MiB).
const PROMPT_LOGITS: usize = 16 << 20;

/// A sampled token of one choice.
pub(crate) struct Sampled {
    pub(crate) seq: SeqId,
    pub(crate) token: Result<u32, RequestError>,
    pub(crate) logprobs: Vec<TokenLogprobs>,
}

impl EngineThread {
    /// Turns hidden rows, and what the device made of them, into events.
    pub(crate) fn hand_out(&mut self, batch: &Batch, wanted: &LogitRows, output: &Output) {
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
            // One that failed in this step, or ended while it was on its way, is no longer known.
            let Some(key) = self.live_key(scheduled.seq) else { continue };
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
