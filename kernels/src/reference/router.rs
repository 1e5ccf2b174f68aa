use std::cmp::Ordering;

use crate::gpu::{DeviceRouterConfig, Scoring};

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

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// What the router compares of one row: logits, or their sigmoids with the bias added.
pub fn compared_scores(logits: &[f32], bias: Option<&[f32]>, scoring: Scoring) -> Vec<f32> {
    match scoring {
        Scoring::Softmax => logits.to_vec(),
        Scoring::Sigmoid { .. } => {
            let bias = |id: usize| bias.map_or(0.0, |bias| bias[id]);
            logits.iter().enumerate().map(|(id, &logit)| sigmoid(logit) + bias(id)).collect()
        }
    }
}

/// Larger first, NaN last, ties lower id first.
fn sorted(scores: &[f32], ids: impl Iterator<Item = usize>) -> Vec<usize> {
    let mut ids: Vec<usize> = ids.collect();
    ids.sort_by(|&a, &b| {
        let (x, y) = (scores[a], scores[b]);
        x.is_nan().cmp(&y.is_nan()).then(y.partial_cmp(&x).unwrap_or(Ordering::Equal)).then(a.cmp(&b))
    });
    ids
}

/// The `top_k` experts of one row, best first, among those of the best groups; a group is as good as the sum of its two
/// best experts.
pub fn choose_experts(logits: &[f32], bias: Option<&[f32]>, cfg: &DeviceRouterConfig) -> Vec<u32> {
    let scores = compared_scores(logits, bias, cfg.scoring);
    let (n_group, topk_group) = match cfg.scoring {
        Scoring::Softmax => (1, 1),
        Scoring::Sigmoid { n_group, topk_group } => (n_group, topk_group),
    };
    let size = scores.len() / n_group;
    let of_group = |group: usize| -> f32 {
        let best = sorted(&scores, group * size..(group + 1) * size);
        best.iter().skip(1).take(1).fold(scores[best[0]], |sum, &id| sum + scores[id])
    };
    let groups: Vec<f32> = (0..n_group).map(of_group).collect();
    let kept = &sorted(&groups, 0..n_group)[..topk_group];
    let ids = sorted(&scores, (0..scores.len()).filter(|id| kept.contains(&(id / size))));
    ids[..cfg.top_k].iter().map(|&id| id as u32).collect()
}

/// The weights of one row's experts.
pub fn expert_weights(logits: &[f32], ids: &[u32], cfg: &DeviceRouterConfig) -> Vec<f32> {
    let mut weights = vec![0.0; ids.len()];
    match cfg.scoring {
        Scoring::Softmax => softmax_weights(logits, ids, cfg.norm_topk_prob, &mut weights),
        Scoring::Sigmoid { .. } => {
            weights.iter_mut().zip(ids).for_each(|(weight, &id)| *weight = sigmoid(logits[id as usize]));
            if cfg.norm_topk_prob {
                let sum = weights.iter().sum::<f32>() + 1e-20;
                weights.iter_mut().for_each(|weight| *weight /= sum);
            }
        }
    }
    weights.iter().map(|weight| weight * cfg.routed_scaling_factor).collect()
}
