use candle_core::{Device, Result, Tensor};
use half::{bf16, f16};

use crate::attention::AttentionShape;
use crate::buffer::elements_mut;
use crate::error::{KernelError, check_index, check_shape};
use crate::form::Form;
use crate::kv::LayerKv;
use crate::reference;
use crate::rope::RopeTable;
use crate::tensor::with_rows;
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
        let mut q = vec![0.0; n * shape.q_width()];
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
    pub fn run(
        &self,
        _form: Form,
        qkv: &[f32],
        q: &mut [f32],
        kv: LayerKv<'_>,
    ) -> std::result::Result<(), KernelError> {
        self.check(qkv.len(), &kv)?;
        let (q_width, kv_width) = (self.shape.q_width(), kv.width());
        let mut row = vec![0.0; q_width + 2 * kv_width];
        for (index, from) in qkv.chunks_exact(row.len()).enumerate() {
            row.copy_from_slice(from);
            let position = self.positions[index];
            reference::qkv_rope(&mut row, self.shape, self.norm, self.rope, position);
            q[index * q_width..][..q_width].copy_from_slice(&row[..q_width]);
            let (k, v) = row[q_width..].split_at(kv_width);
            let slot = self.slots[index] as usize;
            let bytes = slot * kv_width * kv.dtype.bytes()..(slot + 1) * kv_width * kv.dtype.bytes();
            store(kv.dtype, k, &mut kv.k[bytes.clone()]);
            store(kv.dtype, v, &mut kv.v[bytes]);
        }
        Ok(())
    }

    fn check(&self, qkv_len: usize, kv: &LayerKv<'_>) -> std::result::Result<(), KernelError> {
        let n = self.slots.len();
        self.shape.check(OP, kv)?;
        if let Some(norm) = self.norm {
            norm.check(self.shape)?;
        }
        check_shape(OP, "qkv", &[qkv_len], &[n * (self.shape.q_width() + 2 * kv.width())])?;
        check_shape(OP, "positions", &[self.positions.len()], &[n])?;
        check_index(OP, "rotary width", self.rope.rotary_dim(), self.shape.head_dim + 1)?;
        for (&position, &slot) in self.positions.iter().zip(self.slots) {
            check_index(OP, "position", position as usize, self.rope.max_positions())?;
            check_index(OP, "slot", slot as usize, kv.num_slots)?;
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

/// Rounds `from` to the cache's dtype.
fn store(dtype: WeightDtype, from: &[f32], to: &mut [u8]) {
    match dtype {
        WeightDtype::F32 => elements_mut::<f32>(to).copy_from_slice(from),
        WeightDtype::BF16 => {
            let to = elements_mut::<u16>(to);
            to.iter_mut().zip(from).for_each(|(to, &from)| *to = bf16::from_f32(from).to_bits());
        }
        WeightDtype::F16 => {
            let to = elements_mut::<u16>(to);
            to.iter_mut().zip(from).for_each(|(to, &from)| *to = f16::from_f32(from).to_bits());
        }
    }
}
