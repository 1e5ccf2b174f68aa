//! What a device samples by itself, so that no logits cross to the host.

use moetrail_kernels::gpu::{SampleParams, SampledToken};
use moetrail_models::{Hidden, ModelError};
use moetrail_sched::SeqId;

use crate::engine::{EngineThread, Live};
use crate::hand_out::{Sampled, picked};
use crate::request::TokenLogprobs;
use crate::sampler;
use crate::sampling::SamplingParams;
use crate::token_counts::penalises;

/// How a device that lists up to `most` alternatives samples output token `num_output`; `None` if it cannot, as logits
/// have to be changed first, or more are to be listed. That depends on the request alone, never on the batch.
pub(crate) fn device_params(
    params: &SamplingParams,
    num_output: usize,
    eos: &[u32],
    most: usize,
    uniform: impl FnOnce() -> f64,
) -> Option<SampleParams> {
    let banned = sampler::banned(params, num_output, eos);
    if penalises(params) || sampler::masks(params, &banned) || params.logprobs.unwrap_or(0) > most {
        return None;
    }
    let how = SampleParams {
        temperature: params.temperature,
        top_k: u32::try_from(params.top_k).unwrap_or(u32::MAX),
        top_p: params.top_p,
        min_p: params.min_p,
        uniform: 0.0,
        logprobs: params.logprobs,
        given: None,
    };
    Some(if how.is_greedy() { how } else { SampleParams { uniform: uniform(), ..how } })
}

/// How a token that is there already is scored.
fn score(token: u32, num_top: usize) -> SampleParams {
    SampleParams { logprobs: Some(num_top), given: Some(token), ..SampleParams::GREEDY }
}

fn with_id(token: &SampledToken) -> Option<TokenLogprobs> {
    let logprobs = token.logprobs.as_ref()?;
    let (logprob, rank, top) = (logprobs.logprob, logprobs.rank, logprobs.top.clone());
    Some(TokenLogprobs { token_id: token.token?, logprob, rank, top })
}

/// What the device says of a prompt's token; a logit that is NaN makes its logprob one.
pub(crate) fn scored(token: &SampledToken) -> Option<TokenLogprobs> {
    let logprobs = with_id(token)?;
    Some(if token.is_nan { TokenLogprobs { logprob: f32::NAN, ..logprobs } } else { logprobs })
}

impl EngineThread {
    /// How the device samples what follows: the next token of the sequence, or the first of each choice that it is
    /// about to split into.
    ///
    /// They are output token `num_output`.
    pub(crate) fn device_tokens(&self, live: &Live, seq: SeqId, num_output: usize) -> Option<Vec<SampleParams>> {
        let most = self.decoder.max_sampled_logprobs()?;
        let (choice, params) = (self.choices.get(&seq)?, &live.request.sampling);
        let choices = if live.prompt_sent { choice.index..choice.index + 1 } else { 0..params.n };
        let token = |index: usize| {
            let uniform = || sampler::uniform(live.seed, index, num_output);
            device_params(params, num_output, &self.info.eos_token_ids, most, uniform)
        };
        choices.map(token).collect()
    }

    /// Whether the device gives log-probabilities with so many alternatives.
    pub(crate) fn scores_on_device(&self, num_top: usize) -> bool {
        self.decoder.max_sampled_logprobs().is_some_and(|most| num_top <= most)
    }

    /// How the device scores the prompt's token at a position.
    pub(crate) fn device_score(&self, live: &Live, position: usize) -> Option<SampleParams> {
        let num_top = live.request.sampling.prompt_logprobs.filter(|num_top| self.scores_on_device(*num_top))?;
        Some(score(live.request.prompt[position], num_top))
    }

    /// Log-probabilities of tokens that the host sampled from these hidden rows: all have the bits that the device gives
    /// them, also when they are scored as a prompt.
    pub(crate) fn score_sampled(
        &self,
        sampled: &mut [Sampled],
        rows: impl Iterator<Item = usize>,
        hidden: &Hidden,
    ) -> Result<(), ModelError> {
        let params = |sampled: &Sampled| {
            let request = &self.live.get(&self.scheduler.get(sampled.seq)?.request())?.request;
            let num_top = request.sampling.logprobs.filter(|num_top| self.scores_on_device(*num_top))?;
            Some(score(*sampled.token.as_ref().ok()?, num_top))
        };
        let asked =
            sampled.iter_mut().zip(rows).filter_map(|(sampled, row)| Some((row as u32, params(sampled)?, sampled)));
        let (tokens, asked): (Vec<_>, Vec<_>) = asked.map(|(row, params, sampled)| ((row, params), sampled)).unzip();
        let tokens = self.decoder.sample(hidden, &tokens)?.finish()?;
        asked.into_iter().zip(&tokens).for_each(|(sampled, token)| sampled.logprobs.extend(with_id(token)));
        Ok(())
    }

    /// What the device sampled for a choice.
    pub(crate) fn take_sampled(&self, seq: SeqId, token: &SampledToken) -> Sampled {
        let known = self.scheduler.get(seq).and_then(|sequence| self.live.get(&sequence.request()));
        let Some((live, choice)) = known.zip(self.choices.get(&seq)) else { return Sampled::unknown(seq) };
        let logprobs = with_id(token).into_iter().collect();
        Sampled { seq, token: picked((!token.is_nan).then_some(token.token), live, choice), logprobs }
    }
}

#[cfg(test)]
mod tests {
    use moetrail_kernels::gpu::{Arena, DeviceBuffer, DeviceRows, SampleBatch, bytes_of, sample};

    use super::*;
    use crate::logprobs::token_logprobs;
    use crate::token_counts::TokenCounts;

    const MOST: usize = SampleParams::MAX_TOP;

    /// Under many settings the device's tokens are those of the host's sampler, and so are their logprobs but for
    /// rounding.
    #[test]
    fn a_device_samples_as_the_host_does() {
        let Some(gpu) = moetrail_emulation::gpu(11, 1 << 30) else { return };
        let (vocab, cases) = (1500, 400);
        // Numbers of a test are the sampler's own: choice 0 for the logits, 1 for the settings, 2 for the tokens.
        let toss = |case: usize, at: usize| sampler::uniform(5, 1, case * 16 + at);
        let pick = |case: usize, at: usize, of: &[f32]| of[(toss(case, at) * of.len() as f64) as usize];
        let logit = |at: usize| (0..3).map(|i| sampler::uniform(5, 0, 3 * at + i) as f32 - 0.5).sum::<f32>();
        let (mut logits, mut settings) = (Vec::new(), Vec::new());
        for case in 0..cases {
            let scale = pick(case, 0, &[0.1, 4.0, 12.0]);
            logits.extend((0..vocab).map(|id| logit(case * vocab + id) * scale));
            settings.push(SamplingParams {
                temperature: pick(case, 1, &[0.0, 0.5, 1.0, 1.0, 1.6]),
                top_k: pick(case, 2, &[0.0, 0.0, 1.0, 30.0, 1e6]) as usize,
                top_p: pick(case, 3, &[1.0, 1.0, 0.95, 0.5]),
                min_p: pick(case, 4, &[0.0, 0.0, 0.02, 0.3]),
                logprobs: [None, Some(0), Some(3), Some(MOST)][(toss(case, 5) * 4.0) as usize],
                ..SamplingParams::default()
            });
        }
        let uniform = |case: usize| sampler::uniform(5, 2, case);
        let params = |case: usize| device_params(&settings[case], 0, &[1], MOST, || uniform(case)).expect("no penalty");
        let tokens: Vec<(u32, SampleParams)> = (0..cases).map(|case| (case as u32, params(case))).collect();
        let batch = SampleBatch::new(&tokens);
        let arena = Arena::new(&gpu);
        let rows = DeviceRows::floats(&arena, cases, vocab).expect("room for the logits");
        gpu.upload(rows.address(), bytes_of(&logits)).expect("they are copied");
        let words = DeviceBuffer::of(&gpu, batch.words()).expect("room for the parameters");
        let samples = sample(&arena, &rows, &batch, words.address()).expect("the shapes agree");
        let mut seen = std::collections::HashSet::new();
        for (case, token) in samples.to_host().expect("they are read").iter().enumerate() {
            let (raw, params) = (&logits[case * vocab..][..vocab], &settings[case]);
            let expected = sampler::pick(raw, params, &TokenCounts::default(), &[], || uniform(case));
            assert_eq!((token.token, token.is_nan), (expected, false), "{params:?}");
            seen.extend(token.token);
            let expected = expected.zip(params.logprobs).map(|(id, top)| token_logprobs(raw, id, top));
            assert_eq!(with_id(token).is_some(), expected.is_some());
            if let Some((got, expected)) = with_id(token).zip(expected) {
                assert_eq!(
                    (got.token_id, got.rank, got.top.len()),
                    (expected.token_id, expected.rank, expected.top.len())
                );
                let pairs = got.top.iter().zip(&expected.top).map(|(got, expected)| {
                    assert_eq!(got.0, expected.0);
                    (got.1, expected.1)
                });
                let far = |(got, expected): (f32, f32)| (got - expected).abs() > 4e-6 * (1.0 + expected.abs());
                assert!(!pairs.chain([(got.logprob, expected.logprob)]).any(far), "{got:?}, expected {expected:?}");
            }
        }
        assert!(seen.len() > cases / 2, "only {} tokens were ever sampled", seen.len());
    }

    #[test]
    fn what_the_device_cannot_do_goes_to_the_host() {
        let can = |params: SamplingParams, num_output| device_params(&params, num_output, &[2], MOST, || 0.5).is_some();
        let base = SamplingParams::default;
        assert!(can(base(), 0));
        assert!(can(SamplingParams { logprobs: Some(MOST), ..base() }, 0));
        let cannot = [
            SamplingParams { logprobs: Some(MOST + 1), ..base() },
            SamplingParams { repetition_penalty: 1.1, ..base() },
            SamplingParams { presence_penalty: -0.1, ..base() },
            SamplingParams { frequency_penalty: 0.1, ..base() },
            SamplingParams { logit_bias: vec![(0, 1.0)], ..base() },
            SamplingParams { allowed_token_ids: Some(vec![0]), ..base() },
        ];
        assert!(!cannot.into_iter().any(|params| can(params, 0)));
        // Bans last as long as they matter.
        let least = SamplingParams { min_tokens: 3, ..base() };
        assert_eq!([0, 2, 3].map(|num_output| can(least.clone(), num_output)), [false, false, true]);
        assert!(device_params(&least, 0, &[], MOST, || 0.5).is_some(), "nothing is banned");
        let greedy = SamplingParams { temperature: 0.0, ..base() };
        assert!(device_params(&greedy, 0, &[], MOST, || unreachable!("no random number")).is_some());
    }
}
