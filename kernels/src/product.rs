//! Products of activations with packed weights, split into pool tasks.

use std::cell::Cell;

use crate::buffer::{Shared, elements};
use crate::form::Form;
use crate::packed::{PANEL, PackedMatrix};
use crate::pool;
use crate::simd::tile::{Kind, KindBf16, KindF16, KindF32, Sums, add_products, round_row};
use crate::simd::{Body, LANES, Lanes, dispatch};
use crate::weights::WeightDtype;

// A pair of bf16 activations is one u32 with the even element in its low half.
const _: () = assert!(cfg!(target_endian = "little"), "the kernels are written for little-endian machines");

/// Rows of the tallest tile of any form.
pub(crate) const MAX_TILE_ROWS: usize = 6;

/// Activations a task keeps in the second-level cache beside its panel of weights.
const ACTIVATION_BYTES: usize = 768 << 10;

/// `x` `[n, in]` times the weights `[out, in]`, plus `bias` `[out]`, to `out` `[n, out]`.
pub fn linear(form: Form, x: &[f32], weight: &PackedMatrix, bias: Option<&[f32]>, out: &mut [f32]) {
    let (outs, ins) = (weight.out_features(), weight.in_features());
    if out.is_empty() {
        return;
    }
    let n = out.len() / outs;
    assert_eq!((x.len(), out.len()), (n * ins, n * outs), "x and out have the same rows");
    assert!(bias.is_none_or(|bias| bias.len() == outs), "a bias has one element an output");
    match weight.dtype() {
        WeightDtype::F32 => by_panels::<KindF32>(form, x, weight, bias, out),
        WeightDtype::F16 => by_panels::<KindF16>(form, x, weight, bias, out),
        WeightDtype::BF16 => with_pairs(form, x, ins, |pairs| by_panels::<KindBf16>(form, pairs, weight, bias, out)),
    }
}

fn by_panels<K: Kind>(form: Form, acts: &[K::Act], weight: &PackedMatrix, bias: Option<&[f32]>, out: &mut [f32]) {
    let outs = weight.out_features();
    let n = out.len() / outs;
    let steps = acts.len() / n;
    let panels = weight.shape().panels();
    let rows = block_rows(n, size_of_val(acts) / n, panels);
    let shared = Shared::new(out);
    pool::run(panels * n.div_ceil(rows), &|task| {
        let (block, panel) = (task / panels, task % panels);
        let first_row = block * rows;
        let first_out = panel * PANEL;
        let body = PanelProduct::<K> {
            panel: elements(weight.panel_bytes(panel)),
            acts: &acts[first_row * steps..(first_row + rows).min(n) * steps],
            steps,
            bias: bias.map(|bias| &bias[first_out..(first_out + PANEL).min(outs)]),
            out: shared,
            first: first_row * outs + first_out,
            stride: outs,
            width: (outs - first_out).min(PANEL),
        };
        dispatch(form, body);
    });
}

/// Rows of a task: few enough to stay in the cache, and such that there are tasks for every thread.
pub(crate) fn block_rows(n: usize, row_bytes: usize, panels: usize) -> usize {
    let cached = (ACTIVATION_BYTES / row_bytes.max(1)).max(4 * MAX_TILE_ROWS);
    let wanted_blocks = (4 * pool::threads()).div_ceil(panels.max(1));
    let shared_out = n.div_ceil(wanted_blocks).max(2 * MAX_TILE_ROWS);
    cached.min(shared_out).next_multiple_of(MAX_TILE_ROWS)
}

/// Some rows by one panel.
struct PanelProduct<'a, K: Kind> {
    panel: &'a [K::Weight],
    /// `[rows, steps]`
    acts: &'a [K::Act],
    steps: usize,
    bias: Option<&'a [f32]>,
    out: Shared<f32>,
    /// Where row 0, lane 0 goes.
    first: usize,
    stride: usize,
    /// Lanes that are outputs.
    width: usize,
}

impl<K: Kind> Body for PanelProduct<'_, K> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        assert!(self.panel.len() >= self.steps * K::PER_STEP * PANEL, "a panel has every step");
        let mut row = 0;
        let mut left = self.acts.len() / self.steps.max(1);
        while left > 0 {
            let count = left.min(L::TILE_ROWS);
            let mut rows = [self.acts.as_ptr(); MAX_TILE_ROWS];
            for i in 0..count {
                rows[i] = self.acts[(row + i) * self.steps..].as_ptr();
            }
            let mut sums: [Sums; MAX_TILE_ROWS] = [[0.0; PANEL]; MAX_TILE_ROWS];
            // SAFETY: the panel's length was checked; every row has `steps` activations, `sums` has `count` rows.
            unsafe {
                let panel = self.panel.as_ptr();
                add_products::<L, K>(panel, &rows[..count], self.steps, sums.as_mut_ptr().cast(), PANEL);
            }
            for i in 0..count {
                // SAFETY: this task alone writes these rows and lanes, inside the output.
                let to = unsafe { self.out.slice(self.first + (row + i) * self.stride, self.width) };
                // SAFETY: the form's instructions are available here.
                unsafe { finish::<L>(&sums[i], self.bias, to) };
            }
            row += count;
            left -= count;
        }
    }
}

/// `to = sums + bias` for the lanes that are outputs.
///
/// # Safety
/// As the methods of [`Lanes`].
#[inline(always)]
unsafe fn finish<L: Lanes>(sums: &Sums, bias: Option<&[f32]>, to: &mut [f32]) {
    let mut lane = 0;
    while lane < to.len() {
        let count = (to.len() - lane).min(LANES);
        // SAFETY: `lane + count` stays inside `to`, and `bias` has its length.
        unsafe {
            let mut sum = L::load(sums.as_ptr().add(lane));
            if let Some(bias) = bias {
                sum = sum.add(L::load_part(bias.as_ptr().add(lane), count));
            }
            if count == LANES {
                sum.store(to.as_mut_ptr().add(lane));
            } else {
                sum.store_part(to.as_mut_ptr().add(lane), count);
            }
        }
        lane += LANES;
    }
}

thread_local! {
    static PAIRS: Cell<Vec<u32>> = const { Cell::new(Vec::new()) };
}

/// Calls `body` with `x` `[n, width]` rounded to bf16, in pairs `[n, ceil(width / 2)]`; an odd end is padded with zero.
pub(crate) fn with_pairs<R>(form: Form, x: &[f32], width: usize, body: impl FnOnce(&[u32]) -> R) -> R {
    let n = x.len() / width.max(1);
    let steps = width.div_ceil(2);
    // The buffer is taken out while in use: a nested call gets one of its own.
    let mut pairs = PAIRS.take();
    if pairs.len() < n * steps {
        pairs.resize(n * steps, 0);
    }
    let shared = Shared::new(&mut pairs);
    let rows = (16384 / width.max(1)).max(1);
    pool::run(n.div_ceil(rows), &|task| {
        let range = task * rows..((task + 1) * rows).min(n);
        // SAFETY: each task has rows of its own.
        let pairs = unsafe { shared.slice(range.start * steps, range.len() * steps) };
        dispatch(form, RoundRows { x: &x[range.start * width..range.end * width], width, pairs });
    });
    let result = body(&pairs[..n * steps]);
    PAIRS.set(pairs);
    result
}

struct RoundRows<'a> {
    /// `[rows, width]`
    x: &'a [f32],
    width: usize,
    /// `[rows, ceil(width / 2)]`
    pairs: &'a mut [u32],
}

impl Body for RoundRows<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let steps = self.width.div_ceil(2);
        let rows = self.pairs.len() / steps;
        assert!(self.x.len() >= rows * self.width, "x has every row");
        for row in 0..rows {
            // SAFETY: the row lies inside both slices.
            unsafe {
                let from = self.x.as_ptr().add(row * self.width);
                let to = self.pairs.as_mut_ptr().add(row * steps);
                round_row::<L>(from, self.width, to.cast());
            }
        }
    }
}
