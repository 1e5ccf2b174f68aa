//! Log-probabilities of raw logits.

use std::cmp::Ordering;

use crate::request::TokenLogprobs;

/// Orders logits best first: higher first, ties by lower id.
pub(crate) fn best_first(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// The log-softmax of raw logits at `token`, its rank, and the `num_top` most likely tokens.
///
/// The sum runs over the vocabulary in order and in f64, so it does not depend on anything but the logits.
pub(crate) fn token_logprobs(logits: &[f32], token: u32, num_top: usize) -> TokenLogprobs {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from((logit - max).exp())).sum();
    let log_sum = sum.ln() as f32;
    let own = logits[token as usize];
    let rank = 1 + logits.iter().filter(|logit| **logit > own).count() as u32;
    let top = top(logits, num_top).into_iter().map(|(id, logit)| (id, logit - max - log_sum)).collect();
    TokenLogprobs { token_id: token, logprob: own - max - log_sum, rank, top }
}

/// The `k` best logits, best first.
fn top(logits: &[f32], k: usize) -> Vec<(u32, f32)> {
    // `k` is small (at most `max_logprobs`), so one pass with a short sorted list beats sorting the vocabulary.
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(k + 1);
    for (id, logit) in logits.iter().enumerate() {
        if best.len() < k || best.last().is_some_and(|last| *logit > last.1) {
            let at = best.partition_point(|other| other.1 >= *logit);
            best.insert(at, (id as u32, *logit));
            best.truncate(k);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_ties_and_top() {
        let logits = [1.0f32, 3.0, 3.0, 2.0];
        let result = token_logprobs(&logits, 2, 3);
        assert_eq!(result.rank, 1);
        assert_eq!(result.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2, 3]);
        let total: f32 = (0..4).map(|t| token_logprobs(&logits, t, 0).logprob.exp()).sum();
        assert!((total - 1.0).abs() < 1e-6);
        assert_eq!(token_logprobs(&[0.0, f32::NEG_INFINITY], 1, 0).logprob, f32::NEG_INFINITY);
    }
}
