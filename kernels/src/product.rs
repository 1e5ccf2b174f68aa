//! Products of activations with packed weights, split into pool tasks.

use std::cell::Cell;

use crate::acts::{acts_len, with_acts};
use crate::buffer::{Shared, elements};
use crate::form::Form;
use crate::format::WeightFormat;
use crate::packed::{PANEL, PackedMatrix};
use crate::pool;
use crate::scratch::Scratch;
use crate::simd::ahead::Walk;
#[cfg(target_arch = "x86_64")]
use crate::simd::dot::Dot;
use crate::simd::kind::{Fused, Kind, Sums};
#[cfg(target_arch = "x86_64")]
use crate::simd::tile::Tile;
use crate::simd::widen::{WidenBf16, WidenF16, WidenF32, WidenInt8, WidenQ4, WidenQ8};
use crate::simd::{Body, LANES, Lanes};
use crate::weights::WeightDtype;

// Weights are read from checkpoints and caches byte by byte as they lie.
const _: () = assert!(cfg!(target_endian = "little"), "the kernels are written for little-endian machines");

thread_local! {
    static SUMS: Cell<Scratch> = const { Cell::new(Scratch::new()) };
}

/// Activations a task keeps in the second-level cache beside its panel of weights.
const ACTIVATION_BYTES: usize = 768 << 10;

/// What is to be done in the kind that a form has for weights of a dtype.
pub(crate) trait ByKind {
    type Output;
    fn run<K: Kind>(self) -> Self::Output;
}

/// Calls `by` with the kind that this form has for weights of this format.
pub(crate) fn by_kind<B: ByKind>(form: Form, format: WeightFormat, by: B) -> B::Output {
    match format {
        WeightFormat::Float(WeightDtype::F32) => by.run::<Fused<WidenF32>>(),
        WeightFormat::Float(WeightDtype::F16) => by.run::<Fused<WidenF16>>(),
        #[cfg(target_arch = "x86_64")]
        WeightFormat::Float(WeightDtype::BF16) if form == Form::Amx && form.is_supported() => by.run::<Tile>(),
        #[cfg(target_arch = "x86_64")]
        WeightFormat::Float(WeightDtype::BF16) if form == Form::Avx512Bf16 && form.is_supported() => by.run::<Dot>(),
        WeightFormat::Float(WeightDtype::BF16) => by.run::<Fused<WidenBf16<true>>>(),
        WeightFormat::Int8 => by_codes::<WidenInt8, B>(form, by),
        WeightFormat::Q8_0 => by_codes::<WidenQ8, B>(form, by),
        WeightFormat::Q4K => by_codes::<WidenQ4, B>(form, by),
    }
}

#[cfg(target_arch = "x86_64")]
fn by_codes<W: crate::simd::quads::Codes, B: ByKind>(form: Form, by: B) -> B::Output {
    match form {
        Form::Amx | Form::Avx512Bf16 if form.is_supported() => by.run::<crate::simd::quads::Quads<W>>(),
        _ => by.run::<Fused<W>>(),
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn by_codes<W: crate::simd::widen::Widen, B: ByKind>(_: Form, by: B) -> B::Output {
    by.run::<Fused<W>>()
}

/// `x` `[n, in]` times the weights `[out, in]`, plus `bias` `[out]`, to `out` `[n, out]`.
pub fn linear(form: Form, x: &[f32], weight: &PackedMatrix, bias: Option<&[f32]>, out: &mut [f32]) {
    if let Some(product) = Product::new(form, x, weight, bias, out) {
        by_kind(form, weight.format(), product);
    }
}

/// As [`linear`] with activations in f32 whatever the weights' dtype: products are exact, sums are f32.
///
/// # Panics
/// When the weights are no floats.
pub(crate) fn linear_f32(form: Form, x: &[f32], weight: &PackedMatrix, out: &mut [f32]) {
    let Some(product) = Product::new(form, x, weight, None, out) else { return };
    match weight.format() {
        WeightFormat::Float(WeightDtype::F32) => product.run::<Fused<WidenF32>>(),
        WeightFormat::Float(WeightDtype::F16) => product.run::<Fused<WidenF16>>(),
        WeightFormat::Float(WeightDtype::BF16) => product.run::<Fused<WidenBf16<false>>>(),
        format => panic!("{format} weights times f32 activations"),
    }
}

struct Product<'a> {
    form: Form,
    x: &'a [f32],
    weight: &'a PackedMatrix,
    bias: Option<&'a [f32]>,
    out: &'a mut [f32],
}

impl<'a> Product<'a> {
    /// Checked operands; none where there is nothing to do.
    fn new(
        form: Form,
        x: &'a [f32],
        weight: &'a PackedMatrix,
        bias: Option<&'a [f32]>,
        out: &'a mut [f32],
    ) -> Option<Product<'a>> {
        let (outs, ins) = (weight.out_features(), weight.in_features());
        if out.is_empty() {
            return None;
        }
        let n = out.len() / outs;
        assert_eq!((x.len(), out.len()), (n * ins, n * outs), "x and out have the same rows");
        assert!(bias.is_none_or(|bias| bias.len() == outs), "a bias has one element an output");
        Some(Product { form, x, weight, bias, out })
    }
}

impl ByKind for Product<'_> {
    type Output = ();

    fn run<K: Kind>(self) {
        let Product { form, x, weight, bias, out } = self;
        with_acts::<K, _>(form, x, weight.in_features(), K::BLOCK, |acts| {
            by_panels::<K>(form, acts, weight, bias, out)
        });
    }
}

fn by_panels<K: Kind>(form: Form, acts: &[K::Act], weight: &PackedMatrix, bias: Option<&[f32]>, out: &mut [f32]) {
    let outs = weight.out_features();
    let n = out.len() / outs;
    let depth = weight.shape().depth();
    let panels = weight.shape().panels();
    let rows = block_rows::<K>(n, depth, panels);
    let shared = Shared::new(out);
    pool::run(panels * n.div_ceil(rows), &|task| {
        let (block, panel) = (task / panels, task % panels);
        let first_row = block * rows;
        let first_out = panel * PANEL;
        let rows = rows.min(n - first_row);
        let mut scratch = SUMS.take();
        let body = PanelProduct::<K> {
            panel: elements(weight.panel_bytes(panel)),
            next: (panel + 1 < panels).then(|| elements(weight.panel_bytes(panel + 1))),
            acts: &acts[first_row * depth..][..acts_len::<K>(rows, depth)],
            depth,
            rows,
            bias: bias.map(|bias| &bias[first_out..(first_out + PANEL).min(outs)]),
            out: shared,
            first: first_row * outs + first_out,
            stride: outs,
            width: (outs - first_out).min(PANEL),
            sums: &mut scratch.take(1)[0],
        };
        K::dispatch(form, body);
        SUMS.set(scratch);
    });
}

/// Rows of a task: few enough to stay in the cache, and such that there are tasks for every thread.
fn block_rows<K: Kind>(n: usize, depth: usize, panels: usize) -> usize {
    let cached = (ACTIVATION_BYTES / (depth * size_of::<K::Act>()).max(1)).max(2 * K::ROWS);
    let wanted_blocks = (4 * pool::threads()).div_ceil(panels.max(1));
    let shared_out = n.div_ceil(wanted_blocks).max(2 * K::ROWS);
    cached.min(shared_out).next_multiple_of(K::ROWS)
}

/// Some rows by one panel.
struct PanelProduct<'a, K: Kind> {
    panel: &'a [K::Weight],
    /// The panel that this thread comes to next, most likely.
    next: Option<&'a [K::Weight]>,
    /// `[rows, depth]`, in whole blocks
    acts: &'a [K::Act],
    depth: usize,
    rows: usize,
    bias: Option<&'a [f32]>,
    out: Shared<f32>,
    /// Where row 0, lane 0 goes.
    first: usize,
    stride: usize,
    /// Lanes that are outputs.
    width: usize,
    sums: &'a mut Sums,
}

impl<K: Kind> Body for PanelProduct<'_, K> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        assert!(self.panel.len() >= K::panel_len(self.depth), "a panel has the whole depth");
        assert!(self.acts.len() >= self.rows * self.depth, "every row has activations");
        // SAFETY: the form's instructions are available here.
        let session = unsafe { K::begin() };
        let sums = self.sums;
        let mut walk = Walk::new();
        walk.begin::<K>(self.panel, self.next, self.rows);
        let mut row = 0;
        while row < self.rows {
            let count = (self.rows - row).min(K::ROWS);
            // SAFETY: the lengths were checked; rows come in whole blocks.
            unsafe {
                let acts = self.acts.as_ptr().add(row * self.depth);
                K::products::<L>(&session, self.panel.as_ptr(), acts, self.depth, count, walk.ahead(row), sums);
            }
            for i in 0..count {
                // SAFETY: this task alone writes these rows and lanes, inside the output.
                let to = unsafe { self.out.slice(self.first + (row + i) * self.stride, self.width) };
                // SAFETY: the form's instructions are available here.
                unsafe { finish::<L>(&sums.0[i], self.bias, to) };
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
unsafe fn finish<L: Lanes>(sums: &[f32; PANEL], bias: Option<&[f32]>, to: &mut [f32]) {
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
