/// Softmax over all `logits`, gathered at `ids`, divided by the gathered sum when `normalise`.
///
/// Sums are in f64: one after the other in f32, hundreds of terms would lose more than the kernels may.
pub fn softmax_weights(logits: &[f32], ids: &[u32], normalise: bool, weights: &mut [f32]) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp = |logit: f32| f64::from((logit - max).exp());
    let sum: f64 = match normalise {
        true => ids.iter().map(|&id| exp(logits[id as usize])).sum(),
        false => logits.iter().map(|&logit| exp(logit)).sum(),
    };
    for (weight, &id) in weights.iter_mut().zip(ids) {
        *weight = (exp(logits[id as usize]) / sum) as f32;
    }
}
