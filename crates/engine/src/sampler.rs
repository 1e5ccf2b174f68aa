//! From logits to the next token.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::logprobs::best_first;
use crate::sampling::SamplingParams;
use crate::token_counts::TokenCounts;

/// Below this temperature sampling is greedy, as in vLLM.
const GREEDY_BELOW: f32 = 1e-5;

/// Logits that are compared at once.
const LANES: usize = 32;

/// The random number of choice `c`, output position `j`, in `[0, 1)`: a function of `(seed, c, j)` and nothing else.
pub(crate) fn uniform(seed: u64, choice: usize, position: usize) -> f64 {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(choice as u64);
    rng.set_word_pos(position as u128 * 2);
    // The upper 53 bits fill an f64's mantissa exactly.
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Picks a token: bias and masks, penalties, temperature, then min-p, top-k and top-p.
///
/// `banned` cannot be sampled. Returns `None` if nothing can be.
pub(crate) fn pick(
    logits: &[f32],
    params: &SamplingParams,
    counts: &TokenCounts,
    banned: &[u32],
    uniform: impl FnOnce() -> f64,
) -> Option<u32> {
    let greedy = params.temperature < GREEDY_BELOW;
    if greedy && !masks(params, banned) && !counts.is_active() {
        return argmax(logits);
    }
    let logits = &mut logits.to_vec();
    mask(logits, params, banned);
    counts.penalise(params, logits);
    if greedy {
        return argmax(logits);
    }
    for logit in logits.iter_mut() {
        *logit /= params.temperature;
    }
    let best = argmax(logits)?;
    let max = logits[best as usize];
    let candidates = candidates(logits, params, max);
    let total: f64 = candidates.iter().map(|(_, logit)| weight(*logit, max)).sum();
    let mut left = uniform() * total;
    for (id, logit) in &candidates {
        left -= weight(*logit, max);
        if left < 0.0 {
            return Some(*id);
        }
    }
    // Rounding can leave a sliver beyond the last candidate.
    candidates.iter().rev().find(|(_, logit)| weight(*logit, max) > 0.0).map(|(id, _)| *id)
}

fn weight(logit: f32, max: f32) -> f64 {
    f64::from((logit - max).exp())
}

/// What cannot be sampled as output token `num_output`.
pub(crate) fn banned(params: &SamplingParams, num_output: usize, eos: &[u32]) -> Vec<u32> {
    if num_output < params.min_tokens { [eos, &params.stop_token_ids].concat() } else { Vec::new() }
}

/// Whether logits are changed before any is compared.
pub(crate) fn masks(params: &SamplingParams, banned: &[u32]) -> bool {
    params.allowed_token_ids.is_some() || !params.logit_bias.is_empty() || !banned.is_empty()
}

fn mask(logits: &mut [f32], params: &SamplingParams, banned: &[u32]) {
    if let Some(allowed) = &params.allowed_token_ids {
        let kept: Vec<(u32, f32)> = allowed.iter().map(|id| (*id, logits[*id as usize])).collect();
        logits.fill(f32::NEG_INFINITY);
        kept.into_iter().for_each(|(id, logit)| logits[id as usize] = logit);
    }
    for (id, bias) in &params.logit_bias {
        logits[*id as usize] += bias;
    }
    for id in banned {
        if let Some(logit) = logits.get_mut(*id as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// The best token, ties by lower id; `None` if every logit is −inf.
fn argmax(logits: &[f32]) -> Option<u32> {
    // Two passes of whole vectors are several times faster than one that remembers where it was.
    let lanes = logits.chunks_exact(LANES);
    let rest = lanes.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let each = lanes.fold([f32::NEG_INFINITY; LANES], |mut max, chunk| {
        max.iter_mut().zip(chunk).for_each(|(max, logit)| *max = if *logit > *max { *logit } else { *max });
        max
    });
    let max = each.into_iter().fold(rest, f32::max);
    let best = (max > f32::NEG_INFINITY).then(|| logits.iter().position(|logit| *logit == max))?;
    best.map(|id| id as u32)
}

/// The tokens that may be sampled: in id order if nothing truncates, else best first.
fn candidates(logits: &[f32], params: &SamplingParams, max: f32) -> Vec<(u32, f32)> {
    let all = logits.iter().enumerate().map(|(id, logit)| (id as u32, *logit));
    // Comparing logits spares an exp per token: p >= min_p * p_max  <=>  logit >= max + ln(min_p).
    let floor = if params.min_p > 0.0 { max + params.min_p.ln() } else { f32::NEG_INFINITY };
    let mut kept: Vec<(u32, f32)> = all.filter(|(_, logit)| *logit >= floor && *logit > f32::NEG_INFINITY).collect();
    let top_k = if params.top_k == 0 { kept.len() } else { params.top_k.min(kept.len()) };
    if top_k == kept.len() && params.top_p >= 1.0 {
        return kept;
    }
    if top_k < kept.len() {
        kept.select_nth_unstable_by(top_k - 1, best_first);
        kept.truncate(top_k);
    }
    if params.top_p < 1.0 {
        kept = nucleus(kept, params.top_p, max);
    } else {
        kept.sort_unstable_by(best_first);
    }
    kept
}

/// The shortest run of best tokens whose mass reaches `top_p` of the candidates'; at least one.
fn nucleus(mut kept: Vec<(u32, f32)>, top_p: f32, max: f32) -> Vec<(u32, f32)> {
    let total: f64 = kept.iter().map(|(_, logit)| weight(*logit, max)).sum();
    // Tokens below this share sum to less than 1 - top_p together, so the nucleus lies above: no need to sort them.
    let share = total * (1.0 - f64::from(top_p)) / kept.len() as f64;
    kept.retain(|(_, logit)| weight(*logit, max) >= share);
    kept.sort_unstable_by(best_first);
    let mut mass = 0.0;
    let end = kept.iter().position(|(_, logit)| {
        mass += weight(*logit, max);
        mass >= f64::from(top_p) * total
    });
    kept.truncate(end.map_or(kept.len(), |end| end + 1));
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params() -> SamplingParams {
        SamplingParams::default()
    }

    fn kept(logits: &[f32], params: &SamplingParams) -> Vec<u32> {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        candidates(logits, params, max).into_iter().map(|c| c.0).collect()
    }

    #[test]
    fn truncations_keep_the_right_tokens() {
        // Probabilities 0.5, 0.25, 0.125, 0.125 by id 1, 3, 0, 2.
        let logits = [0.125f32.ln(), 0.5f32.ln(), 0.125f32.ln(), 0.25f32.ln()];
        assert_eq!(kept(&logits, &params()), [0, 1, 2, 3]);
        assert_eq!(kept(&logits, &SamplingParams { top_k: 3, ..params() }), [1, 3, 0]);
        assert_eq!(kept(&logits, &SamplingParams { top_p: 0.6, ..params() }), [1, 3]);
        assert_eq!(kept(&logits, &SamplingParams { top_p: 1e-9, ..params() }), [1]);
        assert_eq!(kept(&logits, &SamplingParams { min_p: 0.4, ..params() }), [1, 3]);
        assert_eq!(kept(&logits, &SamplingParams { top_k: 3, top_p: 0.8, ..params() }), [1, 3]);
    }

    #[test]
    fn greedy_takes_the_lower_id_of_a_tie() {
        let greedy = SamplingParams { temperature: 0.0, ..params() };
        let counts = TokenCounts::default();
        let pick = |logits: &[f32], banned: &[u32]| pick(logits, &greedy, &counts, banned, || unreachable!());
        assert_eq!(pick(&[1.0, 2.0, 2.0], &[]), Some(1));
        assert_eq!(pick(&[1.0, 2.0, 2.0], &[1]), Some(2));
        assert_eq!(pick(&[1.0], &[0]), None);
        assert_eq!(pick(&[f32::NEG_INFINITY; 40], &[]), None);
        for best in [0, 31, 32, 63, 64, 69] {
            let logits: Vec<f32> =
                (0..70).map(|id| if id >= best && id % 7 == best % 7 { 3.0 } else { -1.0 }).collect();
            assert_eq!(pick(&logits, &[]), Some(best));
        }
    }

    #[test]
    fn bias_and_allowed_tokens_decide() {
        let greedy = SamplingParams { temperature: 0.0, ..params() };
        let counts = TokenCounts::default();
        let biased = SamplingParams { logit_bias: vec![(0, 5.0)], ..greedy.clone() };
        assert_eq!(pick(&[0.0, 4.0], &biased, &counts, &[], || 0.0), Some(0));
        let allowed = SamplingParams { allowed_token_ids: Some(vec![2, 0]), ..greedy };
        assert_eq!(pick(&[0.0, 4.0, 1.0], &allowed, &counts, &[], || 0.0), Some(2));
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let logits = [0.1f32.ln(), 0.6f32.ln(), 0.3f32.ln()];
        let mut hits = [0u32; 3];
        for position in 0..20_000 {
            let token = pick(&logits, &params(), &TokenCounts::default(), &[], || uniform(7, 0, position));
            hits[token.unwrap() as usize] += 1;
        }
        for (hit, expect) in hits.iter().zip([0.1, 0.6, 0.3]) {
            assert!((f64::from(*hit) / 20_000.0 - expect).abs() < 0.015, "{hits:?}");
        }
    }

    #[test]
    fn the_random_number_is_a_function_of_seed_choice_and_position() {
        assert_eq!(uniform(1, 2, 3), uniform(1, 2, 3));
        let all = [uniform(1, 0, 0), uniform(2, 0, 0), uniform(1, 1, 0), uniform(1, 0, 1)];
        for (i, a) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|b| a != b));
        }
    }
}
