use std::ops::Range;

use candle_core::{Device, Result, Tensor};

use crate::buffer::Shared;
use crate::error::check_shape;
use crate::form::Form;
use crate::linear::check_len;
use crate::pool;
use crate::simd::{Body, LANES, Lanes, dispatch, math};
use crate::tensor::{unfilled, with_elements, with_rows};

const OP: &str = "rms_norm";

/// Elements of a pool task: below that, waking a thread costs more than the work.
pub(crate) const TASK_ELEMENTS: usize = 16384;

/// `x * rsqrt(mean(x^2) + eps) * weight` for each row of `x` `[n, width]`, with `weight` f32 `[width]`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let width = x.dims().last().copied().unwrap_or(0);
    with_rows(OP, "x", x, width, |x, n| {
        with_elements(OP, weight, |weight| {
            check_len(OP, "weight", weight.len(), width)?;
            let mut out = unfilled(x.len());
            rms_norm_rows(Form::current(), x, weight, eps, &mut out);
            Tensor::from_vec(out, (n, width), &Device::Cpu)
        })
    })
}

/// `x + y`, and the [`rms_norm`] of it: both `[n, width]`, read and written once.
pub fn add_rms_norm(x: &Tensor, y: &Tensor, weight: &Tensor, eps: f32) -> Result<(Tensor, Tensor)> {
    let width = x.dims().last().copied().unwrap_or(0);
    with_rows(OP, "x", x, width, |x, n| {
        check_shape(OP, "y", y.dims(), &[n, width])?;
        with_elements(OP, y, |y| {
            with_elements(OP, weight, |weight| {
                check_len(OP, "weight", weight.len(), width)?;
                let (mut sum, mut out) = (unfilled(x.len()), unfilled(x.len()));
                add_rms_norm_rows(Form::current(), (x, y), weight, eps, &mut sum, &mut out);
                let shape = (n, width);
                Ok((Tensor::from_vec(sum, shape, &Device::Cpu)?, Tensor::from_vec(out, shape, &Device::Cpu)?))
            })
        })
    })
}

/// As [`rms_norm`] on slices: `x` and `out` `[n, width]`, `weight` `[width]`.
pub fn rms_norm_rows(form: Form, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "x and out have the same rows");
    let out = Shared::new(out);
    by_rows(x.len(), weight.len(), |range| {
        // SAFETY: each task has rows of its own.
        let out = unsafe { out.slice(range.start, range.len()) };
        dispatch(form, NormRows { x: &x[range], weight, eps, out });
    });
}

/// As [`add_rms_norm`] on slices: `x`, `y`, `sum` and `out` `[n, width]`, `weight` `[width]`.
pub fn add_rms_norm_rows(
    form: Form,
    (x, y): (&[f32], &[f32]),
    weight: &[f32],
    eps: f32,
    sum: &mut [f32],
    out: &mut [f32],
) {
    assert!([x.len(), y.len(), sum.len()].iter().all(|&len| len == out.len()), "x, y, sum and out have the same rows");
    let (sum, out) = (Shared::new(sum), Shared::new(out));
    by_rows(x.len(), weight.len(), |range| {
        // SAFETY: each task has rows of its own.
        let (sum, out) = unsafe { (sum.slice(range.start, range.len()), out.slice(range.start, range.len())) };
        dispatch(form, Add { x: &x[range.clone()], y: &y[range], sum });
        dispatch(form, NormRows { x: sum, weight, eps, out });
    });
}

/// Runs `task` for parts of `len` elements that are whole rows.
fn by_rows(len: usize, width: usize, task: impl Fn(Range<usize>) + Sync) {
    let part = TASK_ELEMENTS.next_multiple_of(width.max(1));
    pool::run(len.div_ceil(part), &|index| task(index * part..len.min((index + 1) * part)));
}

struct Add<'a> {
    x: &'a [f32],
    y: &'a [f32],
    sum: &'a mut [f32],
}

impl Body for Add<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let mut at = 0;
        while at < self.sum.len() {
            let count = (self.sum.len() - at).min(LANES);
            // SAFETY: `at + count` stays inside all three.
            unsafe {
                let (x, y) =
                    (L::load_part(self.x.as_ptr().add(at), count), L::load_part(self.y.as_ptr().add(at), count));
                x.add(y).store_part(self.sum.as_mut_ptr().add(at), count);
            }
            at += LANES;
        }
    }
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
