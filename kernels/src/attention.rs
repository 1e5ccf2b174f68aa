mod fused;
mod piece;
mod running;
mod stream;
#[cfg(target_arch = "x86_64")]
mod tile_products;
#[cfg(target_arch = "x86_64")]
mod tiles;

use std::ops::Range;

use candle_core::{Device, Result, Tensor};

use crate::error::{KernelError, check_index, check_shape};
use crate::form::Form;
use crate::kv::LayerKv;
use crate::tensor::{unfilled, with_rows};
#[cfg(target_arch = "x86_64")]
use crate::weights::WeightDtype;

const OP: &str = "paged_attention";

/// The attention of one layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; `heads / kv_heads` neighbouring query heads share one.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Multiplies every score.
    pub scale: f32,
    /// Sliding window: key `j` is visible to query `i` iff `i - j < window`.
    pub window: Option<usize>,
    /// Queries, keys and values are clamped to `[-clip, clip]` before the rotation (OLMoE).
    pub clip_qkv: Option<f32>,
}

impl AttentionShape {
    /// Elements of a row of queries.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Query heads that share one key and value head.
    pub(crate) fn group(&self) -> usize {
        self.heads / self.kv_heads.max(1)
    }

    /// First key position a query sees.
    pub(crate) fn first_visible(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window.max(1)))
    }

    pub(crate) fn check(&self, op: &'static str, kv: &LayerKv<'_>) -> std::result::Result<(), KernelError> {
        let cache = [kv.kv_heads, kv.head_dim];
        check_shape(op, "kv cache heads", &cache, &[self.kv_heads, self.head_dim])?;
        check_shape(op, "query heads", &[self.heads], &[self.group() * self.kv_heads])
    }
}

/// The rows of one sequence in a batch: consecutive positions from `first_position`.
#[derive(Clone, Debug)]
pub struct SeqSpan<'a> {
    /// Rows of the batch.
    pub rows: Range<usize>,
    /// Absolute position of the first row.
    pub first_position: u32,
    /// Block of each `block_size` positions, from position 0.
    pub block_table: &'a [u32],
}

/// Causal attention of `q` f32 `[n, heads * head_dim]` over the cache, to f32 of the same shape: [`AttentionCall::run`]
/// on tensors.
pub fn paged_attention(q: &Tensor, shape: &AttentionShape, seqs: &[SeqSpan<'_>], kv: LayerKv<'_>) -> Result<Tensor> {
    with_rows(OP, "q", q, shape.q_width(), |q, n| {
        let named: usize = seqs.iter().map(|seq| seq.rows.len()).sum();
        let mut out = if named == n { unfilled(q.len()) } else { vec![0.0; q.len()] };
        AttentionCall { shape, seqs, kv: &kv }.run(Form::current(), q, &mut out)?;
        Tensor::from_vec(out, (n, shape.q_width()), &Device::Cpu)
    })
}

/// The operands of one call apart from the queries.
#[derive(Clone, Copy)]
pub struct AttentionCall<'a> {
    /// Heads and their width.
    pub shape: &'a AttentionShape,
    /// The sequences, by ascending rows.
    pub seqs: &'a [SeqSpan<'a>],
    /// The cache.
    pub kv: &'a LayerKv<'a>,
}

impl AttentionCall<'_> {
    /// Causal attention of `q` over the cache, both `[n, heads * head_dim]`.
    ///
    /// The query at position `p` sees keys `0..=p` (or the window) through its sequence's block table; K and V are
    /// always read back from the cache. Rows that no sequence names are left alone. Scores, weights and sums are f32;
    /// where the form multiplies bf16 pairs ([`Form::Amx`]), queries and weights are sums of two of them.
    pub fn run(&self, form: Form, q: &[f32], out: &mut [f32]) -> std::result::Result<(), KernelError> {
        self.check(q, out)?;
        match (form, self.kv.dtype) {
            #[cfg(target_arch = "x86_64")]
            (Form::Amx, WeightDtype::BF16) if form.is_supported() => tiles::attend(self, q, out),
            _ => fused::attend(form, self, q, out),
        }
        Ok(())
    }

    fn check(&self, q: &[f32], out: &[f32]) -> std::result::Result<(), KernelError> {
        let AttentionCall { shape, kv, .. } = self;
        shape.check(OP, kv)?;
        check_shape(OP, "out", &[out.len()], &[q.len()])?;
        let n = q.len() / shape.q_width().max(1);
        // Rows are written in parallel, so a row belongs to one sequence: spans come in ascending order.
        let mut next_row = 0;
        for seq in self.seqs {
            check_index(OP, "previous span's end", next_row, seq.rows.start + 1)?;
            check_index(OP, "row", seq.rows.end, n + 1)?;
            if seq.rows.is_empty() {
                continue;
            }
            next_row = seq.rows.end;
            let end = seq.first_position as usize + seq.rows.len();
            check_index(OP, "last block", (end - 1) / kv.block_size, seq.block_table.len())?;
            for &block in &seq.block_table[..end.div_ceil(kv.block_size)] {
                check_index(OP, "block", block as usize, kv.num_blocks)?;
            }
        }
        Ok(())
    }
}
