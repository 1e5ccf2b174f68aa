use crate::attention::AttentionShape;
use crate::qkv::QkNorm;
use crate::reference::rms_norm;
use crate::rope::RopeTable;

/// Norm, clamp and rotation of one row `[(heads + 2 kv_heads) * head_dim]`, in place.
pub fn qkv_rope(row: &mut [f32], shape: &AttentionShape, norm: Option<&QkNorm>, rope: &RopeTable, position: u32) {
    let (q, rest) = row.split_at_mut(shape.q_width());
    let (k, v) = rest.split_at_mut(shape.kv_heads * shape.head_dim);
    if let Some(norm) = norm {
        for (part, weight) in [(&mut *q, &norm.q_weight), (&mut *k, &norm.k_weight)] {
            for part in part.chunks_exact_mut(weight.len()) {
                let copy = part.to_vec();
                rms_norm(&copy, weight, norm.eps, part);
            }
        }
    }
    if let Some(clip) = shape.clip_qkv {
        q.iter_mut().chain(&mut *k).chain(v).for_each(|value| *value = value.clamp(-clip, clip));
    }
    let (cos, sin) = rope.at(position);
    for head in q.chunks_exact_mut(shape.head_dim).chain(k.chunks_exact_mut(shape.head_dim)) {
        let (first, second) = head[..rope.rotary_dim()].split_at_mut(cos.len());
        for i in 0..cos.len() {
            let (a, b) = (first[i], second[i]);
            first[i] = a * cos[i] - b * sin[i];
            second[i] = b * cos[i] + a * sin[i];
        }
    }
}
