use candle_core::{Device, Result, Tensor};

use crate::form::Form;
use crate::reference;
use crate::tensor::with_rows;

/// `silu(gate) * up` for `gate_up` f32 `[n, 2 inter]`, gate first, to f32 `[n, inter]`.
pub fn silu_and_mul(gate_up: &Tensor) -> Result<Tensor> {
    let width = gate_up.dims().last().copied().unwrap_or(0);
    let inter = width / 2;
    with_rows("silu_and_mul", "gate_up", gate_up, 2 * inter, |gate_up, n| {
        let mut out = vec![0.0; n * inter];
        silu_and_mul_rows(Form::current(), gate_up, inter, &mut out);
        Tensor::from_vec(out, (n, inter), &Device::Cpu)
    })
}

/// As [`silu_and_mul`] on slices: `gate_up` `[n, 2 inter]`, `out` `[n, inter]`.
pub fn silu_and_mul_rows(_form: Form, gate_up: &[f32], inter: usize, out: &mut [f32]) {
    let inter = inter.max(1);
    for (row, out) in gate_up.chunks_exact(2 * inter).zip(out.chunks_exact_mut(inter)) {
        let (gate, up) = row.split_at(inter);
        reference::silu_and_mul(gate, up, out);
    }
}
