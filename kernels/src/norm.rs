use candle_core::{Device, Result, Tensor};

use crate::buffer::Shared;
use crate::form::Form;
use crate::linear::check_len;
use crate::pool;
use crate::simd::{Body, Lanes, dispatch, math};
use crate::tensor::{with_elements, with_rows};

/// Elements of a pool task: below that, waking a thread costs more than the work.
pub(crate) const TASK_ELEMENTS: usize = 16384;

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
pub fn rms_norm_rows(form: Form, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "x and out have the same rows");
    let width = weight.len().max(1);
    let n = x.len() / width;
    let rows = TASK_ELEMENTS.div_ceil(width);
    let shared = Shared::new(out);
    pool::run(n.div_ceil(rows), &|task| {
        let range = task * rows * width..n.min((task + 1) * rows) * width;
        // SAFETY: each task has rows of its own.
        let out = unsafe { shared.slice(range.start, range.len()) };
        dispatch(form, NormRows { x: &x[range], weight, eps, out });
    });
}

struct NormRows<'a> {
    /// `[rows, width]`
    x: &'a [f32],
    /// `[width]`
    weight: &'a [f32],
    eps: f32,
    /// `[rows, width]`
    out: &'a mut [f32],
}

impl Body for NormRows<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let width = self.weight.len();
        let mut at = 0;
        while at < self.x.len() {
            // SAFETY: both slices hold whole rows.
            unsafe {
                let (x, out) = (self.x.as_ptr().add(at), self.out.as_mut_ptr().add(at));
                math::rms_norm::<L>(x, self.weight.as_ptr(), self.eps, out, width);
            }
            at += width;
        }
    }
}
