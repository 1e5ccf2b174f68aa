/// Softmax over all `logits`, gathered at `ids`, divided by the gathered sum when `normalise`.
pub fn softmax_weights(logits: &[f32], ids: &[u32], normalise: bool, weights: &mut [f32]) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits.iter().map(|logit| (logit - max).exp()).sum();
    for (weight, &id) in weights.iter_mut().zip(ids) {
        *weight = (logits[id as usize] - max).exp() / sum;
    }
    if normalise {
        let sum: f32 = weights.iter().sum();
        weights.iter_mut().for_each(|weight| *weight /= sum);
    }
}
