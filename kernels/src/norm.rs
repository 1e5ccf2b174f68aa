use candle_core::{Device, Result, Tensor};

use crate::form::Form;
use crate::linear::check_len;
use crate::reference;
use crate::tensor::{with_elements, with_rows};

/// `x * rsqrt(mean(x^2) + eps) * weight` for each row of `x` `[n, width]`, with `weight` f32 `[width]`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let width = x.dims().last().copied().unwrap_or(0);
    with_rows("rms_norm", "x", x, width, |x, n| {
        with_elements("rms_norm", weight, |weight| {
            check_len("rms_norm", "weight", weight.len(), width)?;
            let mut out = vec![0.0; x.len()];
            rms_norm_rows(Form::current(), x, weight, eps, &mut out);
            Tensor::from_vec(out, (n, width), &Device::Cpu)
        })
    })
}

/// As [`rms_norm`] on slices: `x` and `out` `[n, width]`, `weight` `[width]`.
pub fn rms_norm_rows(_form: Form, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len().max(1);
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        reference::rms_norm(x, weight, eps, out);
    }
}
