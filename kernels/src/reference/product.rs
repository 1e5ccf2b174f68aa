use half::bf16;

use crate::format::WeightFormat;
use crate::packed::{CHUNK, PackedMatrix};
use crate::weights::WeightDtype;

/// `x` `[n, in]` times the weights `[out, in]`, plus `bias` `[out]`, to `out` `[n, out]`.
pub fn linear(x: &[f32], weight: &PackedMatrix, bias: Option<&[f32]>, out: &mut [f32]) {
    let (outs, ins) = (weight.out_features(), weight.in_features());
    let n = out.len() / outs.max(1);
    let x = rounded(x, ins, weight.format());
    let mut row = vec![0.0; ins];
    for o in 0..outs {
        weight.unpack_row(o, &mut row);
        for i in 0..n {
            out[i * outs + o] = dot(&x[i * ins..][..ins], &row) + bias.map_or(0.0, |bias| bias[o]);
        }
    }
}

/// Rows of `width` activations as a product with weights of this format reads them.
pub(super) fn rounded(x: &[f32], width: usize, format: WeightFormat) -> Vec<f32> {
    match format {
        WeightFormat::Float(WeightDtype::BF16) => x.iter().map(|&value| bf16::from_f32(value).to_f32()).collect(),
        WeightFormat::Float(_) => x.to_vec(),
        _ => x.chunks(width).flat_map(|row| row.chunks(CHUNK)).flat_map(eight_bits).collect(),
    }
}

/// Whole numbers of -127 to 127 times a common scale.
fn eight_bits(chunk: &[f32]) -> impl Iterator<Item = f32> {
    let largest = chunk.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    chunk.iter().map(move |value| (value * inverse).round_ties_even() * (largest / 127.0))
}

pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(0.0, |sum, (a, b)| sum + a * b)
}
