use half::{bf16, f16};

use super::product::dot;
use crate::attention::AttentionCall;
use crate::buffer::elements;
use crate::weights::WeightDtype;

/// Causal attention, one query and head at a time; the operands were checked.
pub fn attention(call: &AttentionCall<'_>, q: &[f32], out: &mut [f32]) {
    let AttentionCall { shape, seqs, kv } = call;
    let (head_dim, block_size) = (shape.head_dim, kv.block_size);
    for seq in *seqs {
        for row in seq.rows.clone() {
            let position = seq.first_position as usize + row - seq.rows.start;
            let slots: Vec<usize> = (shape.first_visible(position)..=position)
                .map(|j| seq.block_table[j / block_size] as usize * block_size + j % block_size)
                .collect();
            for head in 0..shape.heads {
                let at = row * shape.q_width() + head * head_dim;
                let kv_head = head / shape.group();
                let query = &q[at..][..head_dim];
                let score = |&slot: &usize| {
                    dot(query, &head_of(kv.k, kv.dtype, kv.start(slot, kv_head), head_dim)) * shape.scale
                };
                let scores: Vec<f32> = slots.iter().map(score).collect();
                let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let weights: Vec<f32> = scores.iter().map(|score| (score - max).exp()).collect();
                let sum: f32 = weights.iter().sum();
                let out = &mut out[at..][..head_dim];
                for (&slot, weight) in slots.iter().zip(weights) {
                    let value = head_of(kv.v, kv.dtype, kv.start(slot, kv_head), head_dim);
                    out.iter_mut().zip(value).for_each(|(out, value)| *out += weight / sum * value);
                }
            }
        }
    }
}

/// `len` cached elements from `start` as f32.
fn head_of(bytes: &[u8], dtype: WeightDtype, start: usize, len: usize) -> Vec<f32> {
    match dtype {
        WeightDtype::F32 => elements::<f32>(bytes)[start..][..len].to_vec(),
        WeightDtype::BF16 => {
            elements::<u16>(bytes)[start..][..len].iter().map(|&bits| bf16::from_bits(bits).to_f32()).collect()
        }
        WeightDtype::F16 => {
            elements::<u16>(bytes)[start..][..len].iter().map(|&bits| f16::from_bits(bits).to_f32()).collect()
        }
    }
}
