use crate::attention::AttentionShape;

/// Key positions whose state is computed by itself (`SPLIT` in `kernels/cuda/attention.cuh`).
pub const ATTENTION_SPLIT: usize = 512;

/// What the launches of a step of single rows may depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DecodeBucket {
    /// Rows, with those that pad the batch.
    pub seqs: usize,
    /// No context is longer; block tables have room for it.
    pub context: usize,
    /// No more splits over all sequences ([`attention_splits`]), each padded row taking one.
    pub splits: usize,
}

impl DecodeBucket {
    /// Room for `seqs` contexts of `context` keys each.
    pub fn new(shape: &AttentionShape, seqs: usize, context: usize) -> DecodeBucket {
        DecodeBucket { seqs, context, splits: seqs * most_splits(shape, context) }
    }
}

/// Splits that a single row after `context - 1` others looks into.
pub fn attention_splits(shape: &AttentionShape, context: usize) -> usize {
    let last = context.max(1) - 1;
    last / ATTENTION_SPLIT - shape.first_visible(last) / ATTENTION_SPLIT + 1
}

/// Most splits that a single row looks into in contexts up to this one.
pub(super) fn most_splits(shape: &AttentionShape, context: usize) -> usize {
    let all = context.div_ceil(ATTENTION_SPLIT).max(1);
    let seen = |window: usize| (window.max(1) + ATTENTION_SPLIT - 2) / ATTENTION_SPLIT + 1;
    shape.window.map_or(all, |window| all.min(seen(window)))
}
