use half::bf16;

use crate::format::WeightFormat;
use crate::packed::PackedMatrix;

/// `x` `[n, in]` times the weights `[out, in]`, plus `bias` `[out]`, to `out` `[n, out]`.
pub fn linear(x: &[f32], weight: &PackedMatrix, bias: Option<&[f32]>, out: &mut [f32]) {
    let (outs, ins) = (weight.out_features(), weight.in_features());
    let n = out.len() / outs.max(1);
    let x = rounded(x, weight.format());
    let mut row = vec![0.0; ins];
    for o in 0..outs {
        weight.unpack_row(o, &mut row);
        for i in 0..n {
            out[i * outs + o] = dot(&x[i * ins..][..ins], &row) + bias.map_or(0.0, |bias| bias[o]);
        }
    }
}

/// Activations as a product with weights of this format sees them.
pub(super) fn rounded(x: &[f32], format: WeightFormat) -> Vec<f32> {
    match format.rounds_activations() {
        true => x.iter().map(|&value| bf16::from_f32(value).to_f32()).collect(),
        false => x.to_vec(),
    }
}

pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(0.0, |sum, (a, b)| sum + a * b)
}
