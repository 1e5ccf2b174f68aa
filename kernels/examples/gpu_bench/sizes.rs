//! What is measured: shapes of a layer of Qwen3-30B-A3B, and small ones.

/// Sizes of one layer, and how much memory the copies of its weights take.
pub(crate) struct Sizes {
    pub(crate) hidden: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) experts: usize,
    pub(crate) top_k: usize,
    pub(crate) inter: usize,
    pub(crate) vocab: usize,
    /// Layers of the ring.
    pub(crate) layers: usize,
    /// Rows of the products.
    pub(crate) rows: &'static [usize],
    /// Rows of the expert networks.
    pub(crate) expert_rows: &'static [usize],
    /// (batch, context) of decode.
    pub(crate) decode: &'static [(usize, usize)],
    pub(crate) prefill: &'static [usize],
    /// Tokens of the KV cache.
    pub(crate) slots: usize,
    /// Rows that are drained.
    pub(crate) drained: usize,
    /// Bytes that no cache holds.
    pub(crate) cold: usize,
}

pub(crate) const LARGE: Sizes = Sizes {
    hidden: 2048,
    heads: 32,
    kv_heads: 4,
    head_dim: 128,
    experts: 128,
    top_k: 8,
    inter: 768,
    vocab: 151_936,
    layers: 48,
    rows: &[1, 8, 32, 64, 512, 2048, 8192],
    expert_rows: &[1, 8, 64, 256, 512, 2048, 8192],
    decode: &[(1, 1024), (1, 8192), (8, 8192), (64, 1024), (64, 8192)],
    prefill: &[512, 2048, 8192],
    slots: 64 * 8192,
    drained: 32_768,
    cold: 512 << 20,
};

pub(crate) const TINY: Sizes = Sizes {
    hidden: 64,
    heads: 4,
    kv_heads: 2,
    head_dim: 32,
    experts: 8,
    top_k: 2,
    inter: 32,
    vocab: 96,
    layers: 3,
    rows: &[1, 70],
    expert_rows: &[1, 9],
    decode: &[(1, 16), (2, 600)],
    prefill: &[40],
    slots: 2 * 608,
    drained: 40,
    cold: 1 << 15,
};
