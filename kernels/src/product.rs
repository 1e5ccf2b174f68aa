//! Products of activations with packed weights, split into pool tasks.

use std::cell::Cell;
use std::marker::PhantomData;

use crate::buffer::{Shared, elements};
use crate::form::Form;
use crate::norm::TASK_ELEMENTS;
use crate::packed::{PANEL, PackedMatrix};
use crate::pool;
use crate::simd::tile::{Kind, KindBf16, KindF16, KindF32, Sums, TILE_ROWS, add_products, round_row};
use crate::simd::{Body, LANES, Lanes, dispatch};
use crate::weights::WeightDtype;

// Weights are read from checkpoints and caches byte by byte as they lie.
const _: () = assert!(cfg!(target_endian = "little"), "the kernels are written for little-endian machines");

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
        WeightDtype::BF16 => {
            with_acts::<KindBf16, _>(form, x, ins, |x| by_panels::<KindBf16>(form, x, weight, bias, out));
        }
    }
}

fn by_panels<K: Kind>(form: Form, acts: &[f32], weight: &PackedMatrix, bias: Option<&[f32]>, out: &mut [f32]) {
    let outs = weight.out_features();
    let n = out.len() / outs;
    let depth = weight.shape().depth();
    let panels = weight.shape().panels();
    let rows = block_rows(n, 4 * depth, panels);
    let shared = Shared::new(out);
    pool::run(panels * n.div_ceil(rows), &|task| {
        let (block, panel) = (task / panels, task % panels);
        let first_row = block * rows;
        let first_out = panel * PANEL;
        let body = PanelProduct::<K> {
            panel: elements(weight.panel_bytes(panel)),
            acts: &acts[first_row * depth..(first_row + rows).min(n) * depth],
            depth,
            rows: rows.min(n - first_row),
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
    let cached = (ACTIVATION_BYTES / row_bytes.max(1)).max(4 * TILE_ROWS);
    let wanted_blocks = (4 * pool::threads()).div_ceil(panels.max(1));
    let shared_out = n.div_ceil(wanted_blocks).max(2 * TILE_ROWS);
    cached.min(shared_out).next_multiple_of(TILE_ROWS)
}

/// Some rows by one panel.
struct PanelProduct<'a, K: Kind> {
    panel: &'a [K::Weight],
    /// `[rows, depth]`
    acts: &'a [f32],
    depth: usize,
    /// Rows, as `acts` may have none of any width.
    rows: usize,
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
        assert!(self.panel.len() >= self.depth * PANEL, "a panel has the whole depth");
        let mut row = 0;
        while row < self.rows {
            let count = (self.rows - row).min(TILE_ROWS);
            let mut rows = [self.acts.as_ptr(); TILE_ROWS];
            for (i, rows) in rows[..count].iter_mut().enumerate() {
                *rows = self.acts[(row + i) * self.depth..(row + i + 1) * self.depth].as_ptr();
            }
            let mut sums: [Sums; TILE_ROWS] = [[0.0; PANEL]; TILE_ROWS];
            // SAFETY: the panel's length was checked; every row has `depth` activations, `sums` has `count` rows.
            unsafe {
                let panel = self.panel.as_ptr();
                add_products::<L, K>(panel, &rows[..count], self.depth, sums.as_mut_ptr().cast(), PANEL);
            }
            for (i, sums) in sums[..count].iter().enumerate() {
                // SAFETY: this task alone writes these rows and lanes, inside the output.
                let to = unsafe { self.out.slice(self.first + (row + i) * self.stride, self.width) };
                // SAFETY: the form's instructions are available here.
                unsafe { finish::<L>(sums, self.bias, to) };
            }
            row += count;
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
    static ROUNDED: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Calls `body` with `x` `[n, width]` as products with these weights see it: rounded, and padded to whole steps.
pub(crate) fn with_acts<K: Kind, R>(form: Form, x: &[f32], width: usize, body: impl FnOnce(&[f32]) -> R) -> R {
    if K::DTYPE != WeightDtype::BF16 {
        return body(x);
    }
    let n = x.len() / width.max(1);
    let depth = width.next_multiple_of(K::PER_STEP);
    // The buffer is taken out while in use: a nested call gets one of its own.
    let mut acts = ROUNDED.take();
    if acts.len() < n * depth {
        acts.resize(n * depth, 0.0);
    }
    let shared = Shared::new(&mut acts);
    let rows = TASK_ELEMENTS.div_ceil(width.max(1));
    pool::run(n.div_ceil(rows), &|task| {
        let range = task * rows..((task + 1) * rows).min(n);
        // SAFETY: each task has rows of its own.
        let acts = unsafe { shared.slice(range.start * depth, range.len() * depth) };
        let x = &x[range.start * width..range.end * width];
        dispatch(form, RoundRows::<K> { x, width, acts, kind: PhantomData });
    });
    let result = body(&acts[..n * depth]);
    ROUNDED.set(acts);
    result
}

struct RoundRows<'a, K: Kind> {
    /// `[rows, width]`
    x: &'a [f32],
    width: usize,
    /// `[rows, depth]`
    acts: &'a mut [f32],
    kind: PhantomData<K>,
}

impl<K: Kind> Body for RoundRows<'_, K> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let depth = self.width.next_multiple_of(K::PER_STEP);
        for (x, acts) in self.x.chunks_exact(self.width).zip(self.acts.chunks_exact_mut(depth)) {
            // SAFETY: the rows have `width` and `depth` elements.
            unsafe { round_row::<L, K>(x.as_ptr(), self.width, acts.as_mut_ptr()) };
        }
    }
}
