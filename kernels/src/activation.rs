use candle_core::{Device, Result, Tensor};

use crate::buffer::Shared;
use crate::form::Form;
use crate::norm::TASK_ELEMENTS;
use crate::pool;
use crate::simd::math::silu_mul;
use crate::simd::{Body, LANES, Lanes, dispatch};
use crate::tensor::{unfilled, with_rows};

/// `silu(gate) * up` for `gate_up` f32 `[n, 2 inter]`, gate first, to f32 `[n, inter]`.
pub fn silu_and_mul(gate_up: &Tensor) -> Result<Tensor> {
    let width = gate_up.dims().last().copied().unwrap_or(0);
    let inter = width / 2;
    with_rows("silu_and_mul", "gate_up", gate_up, 2 * inter, |gate_up, n| {
        let mut out = unfilled(n * inter);
        silu_and_mul_rows(Form::current(), gate_up, inter, &mut out);
        Tensor::from_vec(out, (n, inter), &Device::Cpu)
    })
}

/// As [`silu_and_mul`] on slices: `gate_up` `[n, 2 inter]`, `out` `[n, inter]`.
pub fn silu_and_mul_rows(form: Form, gate_up: &[f32], inter: usize, out: &mut [f32]) {
    assert_eq!(gate_up.len(), 2 * out.len(), "gate and up have the rows of out");
    let n = out.len() / inter.max(1);
    let rows = TASK_ELEMENTS.div_ceil(inter.max(1));
    let shared = Shared::new(out);
    pool::run(n.div_ceil(rows), &|task| {
        let range = task * rows * inter..n.min((task + 1) * rows) * inter;
        // SAFETY: each task has rows of its own.
        let out = unsafe { shared.slice(range.start, range.len()) };
        dispatch(form, SiluRows { gate_up: &gate_up[2 * range.start..2 * range.end], inter, out });
    });
}

struct SiluRows<'a> {
    /// `[rows, 2 inter]`
    gate_up: &'a [f32],
    inter: usize,
    /// `[rows, inter]`
    out: &'a mut [f32],
}

impl Body for SiluRows<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let mut row = 0;
        while row * self.inter < self.out.len() {
            let gate = self.gate_up[2 * row * self.inter..].as_ptr();
            let out = self.out[row * self.inter..].as_mut_ptr();
            let mut at = 0;
            while at < self.inter {
                let count = (self.inter - at).min(LANES);
                // SAFETY: `at + count` stays inside gate, up and out.
                unsafe {
                    let up = L::load_part(gate.add(self.inter + at), count);
                    silu_mul(L::load_part(gate.add(at), count), up).store_part(out.add(at), count);
                }
                at += LANES;
            }
            row += 1;
        }
    }
}
