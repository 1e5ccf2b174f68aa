use candle_core::{Device, Result, Tensor};

use crate::attention::AttentionShape;
use crate::buffer::{Shared, elements_mut};
use crate::error::{KernelError, check_index, check_shape};
use crate::form::Form;
use crate::kv::LayerKv;
use crate::norm::TASK_ELEMENTS;
use crate::pool;
use crate::rope::RopeTable;
use crate::simd::math::rms_norm;
use crate::simd::stored::{Stored, StoredBf16, StoredF16, StoredF32};
use crate::simd::{Body, LANES, Lanes, dispatch};
use crate::tensor::{unfilled, with_rows};
use crate::weights::WeightDtype;

const OP: &str = "qkv_rope_store";

/// RMS norm of the queries and keys, before clamp and rotation.
#[derive(Clone, Debug)]
pub struct QkNorm {
    /// `[head_dim]` per head, `[heads * head_dim]` over the whole width.
    pub q_weight: Vec<f32>,
    /// `[head_dim]` per head, `[kv_heads * head_dim]` over the whole width.
    pub k_weight: Vec<f32>,
    /// Added to the mean square.
    pub eps: f32,
    /// Whether each head has its own mean square (Qwen3), or the whole row one (OLMoE).
    pub per_head: bool,
}

impl QkNorm {
    fn check(&self, shape: &AttentionShape) -> std::result::Result<(), KernelError> {
        let (q, k) = if self.per_head { (1, 1) } else { (shape.heads, shape.kv_heads) };
        check_shape(OP, "q norm weight", &[self.q_weight.len()], &[q * shape.head_dim])?;
        check_shape(OP, "k norm weight", &[self.k_weight.len()], &[k * shape.head_dim])
    }
}

/// Norms, clamps and rotates `qkv` f32 `[n, (heads + 2 kv_heads) * head_dim]`, stores K and V at `slots`, and returns
/// the queries, f32 `[n, heads * head_dim]`.
///
/// The order is that of the published models: norm, clamp (`clip_qkv`, V too), rotation.
#[allow(clippy::too_many_arguments)]
pub fn qkv_rope_store(
    qkv: &Tensor,
    shape: &AttentionShape,
    norm: Option<&QkNorm>,
    rope: &RopeTable,
    positions: &[u32],
    slots: &[u32],
    kv: LayerKv<'_>,
) -> Result<Tensor> {
    with_rows(OP, "qkv", qkv, (shape.heads + 2 * shape.kv_heads) * shape.head_dim, |qkv, n| {
        let mut q = unfilled(n * shape.q_width());
        let call = QkvCall { shape, norm, rope, positions, slots };
        call.run(Form::current(), qkv, &mut q, kv)?;
        Tensor::from_vec(q, (n, shape.q_width()), &Device::Cpu)
    })
}

/// The operands of one call apart from activations and cache; `positions` and `slots` have one element a row.
#[derive(Clone, Copy)]
pub struct QkvCall<'a> {
    /// Heads and their width.
    pub shape: &'a AttentionShape,
    /// Norm of queries and keys.
    pub norm: Option<&'a QkNorm>,
    /// Cosines and sines.
    pub rope: &'a RopeTable,
    /// Absolute position of each row.
    pub positions: &'a [u32],
    /// Cache slot of each row; no two are equal.
    pub slots: &'a [u32],
}

impl QkvCall<'_> {
    /// As [`qkv_rope_store`] on slices: `qkv` `[n, (heads + 2 kv_heads) * head_dim]`, `q` `[n, heads * head_dim]`.
    pub fn run(&self, form: Form, qkv: &[f32], q: &mut [f32], kv: LayerKv<'_>) -> std::result::Result<(), KernelError> {
        self.check(qkv.len(), q.len(), &kv)?;
        match kv.dtype {
            WeightDtype::F32 => self.by_rows::<StoredF32>(form, qkv, q, kv),
            WeightDtype::BF16 => self.by_rows::<StoredBf16>(form, qkv, q, kv),
            WeightDtype::F16 => self.by_rows::<StoredF16>(form, qkv, q, kv),
        }
        Ok(())
    }

    fn by_rows<S: Stored>(&self, form: Form, qkv: &[f32], q: &mut [f32], kv: LayerKv<'_>) {
        let (q_width, kv_width) = (self.shape.q_width(), kv.width());
        let head_stride = kv.block_size * kv.head_dim;
        let starts: Vec<usize> = self.slots.iter().map(|&slot| kv.start(slot as usize, 0)).collect();
        let n = self.slots.len();
        let rows = TASK_ELEMENTS.div_ceil(q_width + 2 * kv_width);
        let q = Shared::new(q);
        let (k, v) = (Shared::new(elements_mut::<S::Bits>(kv.k)), Shared::new(elements_mut::<S::Bits>(kv.v)));
        pool::run(n.div_ceil(rows), &|task| {
            let mut turned = vec![0.0; kv_width];
            for row in task * rows..n.min((task + 1) * rows) {
                let body = Row::<S> {
                    call: self,
                    row: &qkv[row * (q_width + 2 * kv_width)..][..q_width + 2 * kv_width],
                    position: self.positions[row],
                    // SAFETY: rows are distinct, and this one lies inside the output.
                    q: unsafe { q.slice(row * q_width, q_width) },
                    turned: &mut turned,
                    k,
                    v,
                    start: starts[row],
                    head_stride,
                };
                dispatch(form, body);
            }
        });
    }

    fn check(&self, qkv_len: usize, q_len: usize, kv: &LayerKv<'_>) -> std::result::Result<(), KernelError> {
        let n = self.slots.len();
        self.shape.check(OP, kv)?;
        if let Some(norm) = self.norm {
            norm.check(self.shape)?;
        }
        check_shape(OP, "qkv", &[qkv_len], &[n * (self.shape.q_width() + 2 * kv.width())])?;
        check_shape(OP, "q", &[q_len], &[n * self.shape.q_width()])?;
        check_shape(OP, "positions", &[self.positions.len()], &[n])?;
        check_index(OP, "rotary width", self.rope.rotary_dim(), self.shape.head_dim + 1)?;
        for (&position, &slot) in self.positions.iter().zip(self.slots) {
            check_index(OP, "position", position as usize, self.rope.max_positions())?;
            check_index(OP, "slot", slot as usize, kv.num_slots())?;
        }
        check_distinct(OP, self.slots)
    }
}

/// Fails when a slot is named twice: rows are stored in parallel, and the order of two writes would be chance.
pub(crate) fn check_distinct(op: &'static str, slots: &[u32]) -> std::result::Result<(), KernelError> {
    if slots.windows(2).all(|pair| pair[0] < pair[1]) {
        return Ok(());
    }
    let mut sorted = slots.to_vec();
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(KernelError::DuplicateSlot { op, slot: pair[0] }),
        None => Ok(()),
    }
}

/// One row.
struct Row<'a, S: Stored> {
    call: &'a QkvCall<'a>,
    /// `[(heads + 2 kv_heads) * head_dim]`
    row: &'a [f32],
    position: u32,
    q: &'a mut [f32],
    /// The keys before they are rounded.
    turned: &'a mut [f32],
    /// The whole cache of the layer, of which this row's slot is written.
    k: Shared<S::Bits>,
    v: Shared<S::Bits>,
    /// Where head 0 of the slot lies, and how far the next head is.
    start: usize,
    head_stride: usize,
}

impl<S: Stored> Body for Row<'_, S> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let (shape, norm) = (self.call.shape, self.call.norm);
        let (cos, sin) = self.call.rope.at(self.position);
        let (q, rest) = self.row.split_at(self.q.len());
        let (k, v) = rest.split_at(self.turned.len());
        // SAFETY: each part has the length of the slice it is written to; the norm's weights were checked.
        unsafe {
            let eps = norm.map_or(0.0, |norm| norm.eps);
            let q_weight = norm.map(|norm| &*norm.q_weight);
            self.q.copy_from_slice(q);
            prepare::<L>(self.q, shape, q_weight, eps, cos, sin);
            let k_weight = norm.map(|norm| &*norm.k_weight);
            self.turned.copy_from_slice(k);
            prepare::<L>(self.turned, shape, k_weight, eps, cos, sin);
            let width = shape.head_dim;
            for head in 0..shape.kv_heads {
                let (from, to) = (head * width, self.start + head * self.head_stride);
                // Slots were checked to be distinct and inside the cache: this row alone writes here.
                store::<L, S>(&self.turned[from..from + width], None, self.k.slice(to, width));
                store::<L, S>(&v[from..from + width], shape.clip_qkv, self.v.slice(to, width));
            }
        }
    }
}

/// Norm, clamp and rotation of some heads, in place.
///
/// # Safety
/// As the methods of [`Lanes`]; `x` has whole heads, and whole rows of the norm's weights.
#[inline(always)]
unsafe fn prepare<L: Lanes>(
    x: &mut [f32],
    shape: &AttentionShape,
    weight: Option<&[f32]>,
    eps: f32,
    cos: &[f32],
    sin: &[f32],
) {
    let half = cos.len();
    // SAFETY: the caller's contract; parts of a head stay inside it.
    unsafe {
        if let Some(weight) = weight {
            let mut at = 0;
            while at < x.len() {
                let part = x[at..at + weight.len()].as_mut_ptr();
                rms_norm::<L>(part, weight.as_ptr(), eps, part, weight.len());
                at += weight.len();
            }
        }
        if let Some(clip) = shape.clip_qkv {
            let mut at = 0;
            while at < x.len() {
                let count = (x.len() - at).min(LANES);
                let to = x.as_mut_ptr().add(at);
                clamp(L::load_part(to, count), clip).store_part(to, count);
                at += LANES;
            }
        }
        let mut head = 0;
        while head < x.len() {
            let first = x[head..head + shape.head_dim].as_mut_ptr();
            let second = first.add(half);
            let mut at = 0;
            while at < half {
                let count = (half - at).min(LANES);
                let (a, b) = (L::load_part(first.add(at), count), L::load_part(second.add(at), count));
                let (c, s) = (L::load_part(cos.as_ptr().add(at), count), L::load_part(sin.as_ptr().add(at), count));
                a.mul(c).sub(b.mul(s)).store_part(first.add(at), count);
                b.mul(c).add(a.mul(s)).store_part(second.add(at), count);
                at += LANES;
            }
            head += shape.head_dim;
        }
    }
}

/// NaN stays NaN.
///
/// # Safety
/// As the methods of [`Lanes`].
#[inline(always)]
unsafe fn clamp<L: Lanes>(x: L, clip: f32) -> L {
    // SAFETY: the caller's contract.
    unsafe { L::splat(clip).min(L::splat(-clip).max(x)) }
}

/// Rounds `from`, clamped where asked, to the cache's dtype.
///
/// # Safety
/// As the methods of [`Lanes`]; both have the same length.
#[inline(always)]
unsafe fn store<L: Lanes, S: Stored>(from: &[f32], clip: Option<f32>, to: &mut [S::Bits]) {
    let mut at = 0;
    while at < from.len() {
        let count = (from.len() - at).min(LANES);
        // SAFETY: `at + count` stays inside both.
        unsafe {
            let mut lanes = L::load_part(from.as_ptr().add(at), count);
            if let Some(clip) = clip {
                lanes = clamp(lanes, clip);
            }
            S::store_part(lanes, to.as_mut_ptr().add(at), count);
        }
        at += LANES;
    }
}
