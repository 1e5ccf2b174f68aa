//! The product of a few rows with one panel of 64 outputs by fused multiply-adds in f32.
//!
//! Each output lane is summed over the inputs in order, whatever the number of rows, so all shapes give the same bits.

use super::ahead::Ahead;
use super::{LANES, Lanes};
use crate::buffer::Plain;
use crate::packed::{CHUNK, PANEL};

/// Rows of the tallest block: as many as leave the sums in registers.
pub(crate) const FUSED_ROWS: usize = 6;

/// Vectors of a panel.
const VECTORS: usize = PANEL / LANES;

/// How the weights of a dtype lie in a panel and come to be f32.
pub(crate) trait Widen: 'static {
    /// An element of the panel.
    type Weight: Plain;
    /// Neighbouring inputs that lie together for each output.
    const PER_STEP: usize;
    /// Whether activations are rounded to the weights' dtype.
    const ROUNDS: bool = false;

    /// The weights of sixteen outputs and one input of a step (`0..PER_STEP`).
    ///
    /// # Safety
    /// As the methods of [`Lanes`]; `from` has `16 * PER_STEP` weights.
    unsafe fn load<L: Lanes>(from: *const Self::Weight, input: usize) -> L;
}

/// f32 weights.
pub(crate) struct WidenF32;
/// f16 weights.
pub(crate) struct WidenF16;
/// Pairs of bf16 weights; activations are rounded to bf16 where `ROUNDS`.
pub(crate) struct WidenBf16<const ROUNDS: bool>;

impl Widen for WidenF32 {
    type Weight = f32;
    const PER_STEP: usize = 1;
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const f32, _: usize) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::load(from) }
    }
}

impl Widen for WidenF16 {
    type Weight = u16;
    const PER_STEP: usize = 1;
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const u16, _: usize) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::load_f16(from) }
    }
}

impl<const ROUNDS: bool> Widen for WidenBf16<ROUNDS> {
    type Weight = u16;
    const PER_STEP: usize = 2;
    const ROUNDS: bool = ROUNDS;
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const u16, input: usize) -> L {
        // SAFETY: the caller's contract.
        unsafe { if input == 0 { L::load_bf16_even(from) } else { L::load_bf16_odd(from) } }
    }
}

/// Adds to `sums` (`rows.len() <= FUSED_ROWS` rows of `[64]`, `stride` elements apart) the products of each row's
/// first `depth` activations with the panel.
///
/// # Safety
/// As the methods of [`Lanes`]; the panel holds `depth * 64` weights, every row `depth` activations, and `depth` is a
/// multiple of `PER_STEP`.
#[inline(always)]
pub(crate) unsafe fn add_products<L: Lanes, W: Widen>(
    panel: *const W::Weight,
    rows: &[*const f32],
    depth: usize,
    ahead: &mut Ahead,
    sums: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller's contract.
    unsafe {
        match rows.len() {
            0 => {}
            1 => block::<L, W, 1, VECTORS>(panel, rows.as_ptr(), depth, ahead, sums, stride),
            count if L::WHOLE_PANEL => match count {
                2 => block::<L, W, 2, VECTORS>(panel, rows.as_ptr(), depth, ahead, sums, stride),
                3 => block::<L, W, 3, VECTORS>(panel, rows.as_ptr(), depth, ahead, sums, stride),
                4 => block::<L, W, 4, VECTORS>(panel, rows.as_ptr(), depth, ahead, sums, stride),
                5 => block::<L, W, 5, VECTORS>(panel, rows.as_ptr(), depth, ahead, sums, stride),
                _ => block::<L, W, 6, VECTORS>(panel, rows.as_ptr(), depth, ahead, sums, stride),
            },
            2 => {
                block::<L, W, 2, 2>(panel, rows.as_ptr(), depth, ahead, sums, stride);
                let (panel, sums) = (panel.add(2 * LANES * W::PER_STEP), sums.add(2 * LANES));
                block::<L, W, 2, 2>(panel, rows.as_ptr(), depth, ahead, sums, stride);
            }
            count => {
                for vector in 0..VECTORS {
                    let panel = panel.add(vector * LANES * W::PER_STEP);
                    let sums = sums.add(vector * LANES);
                    match count {
                        3 => block::<L, W, 3, 1>(panel, rows.as_ptr(), depth, ahead, sums, stride),
                        4 => block::<L, W, 4, 1>(panel, rows.as_ptr(), depth, ahead, sums, stride),
                        5 => block::<L, W, 5, 1>(panel, rows.as_ptr(), depth, ahead, sums, stride),
                        _ => block::<L, W, 6, 1>(panel, rows.as_ptr(), depth, ahead, sums, stride),
                    }
                }
            }
        }
    }
}

/// `M` rows by `V` vectors of outputs, held in registers over the whole depth.
#[inline(always)]
unsafe fn block<L: Lanes, W: Widen, const M: usize, const V: usize>(
    panel: *const W::Weight,
    rows: *const *const f32,
    depth: usize,
    ahead: &mut Ahead,
    out: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller's contract; `rows` has `M` elements.
    unsafe {
        let rows = *rows.cast::<[*const f32; M]>();
        let mut sums = [[L::splat(0.0); V]; M];
        for (m, sums) in sums.iter_mut().enumerate() {
            for (v, sum) in sums.iter_mut().enumerate() {
                *sum = L::load(out.add(m * stride + v * LANES));
            }
        }
        let mut weights = panel;
        let mut at = 0;
        while at < depth {
            // Many rows take longer than their weights, which the processor then fetches in time by itself.
            if M < FUSED_ROWS && at % (CHUNK / 4) == 0 {
                ahead.ask::<L, 4>();
            }
            // The inputs of a step come one after the other: their weights are never in registers together.
            for input in 0..W::PER_STEP {
                let mut w = [W::load::<L>(weights, input); V];
                for (v, w) in w.iter_mut().enumerate() {
                    *w = W::load::<L>(weights.add(v * LANES * W::PER_STEP), input);
                }
                for (row, sums) in rows.iter().zip(&mut sums) {
                    let act = L::splat(*row.add(at + input));
                    for (sum, w) in sums.iter_mut().zip(w) {
                        *sum = w.mul_add(act, *sum);
                    }
                }
            }
            weights = weights.add(PANEL * W::PER_STEP);
            at += W::PER_STEP;
        }
        for (m, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                sum.store(out.add(m * stride + v * LANES));
            }
        }
    }
}
