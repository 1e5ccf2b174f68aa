//! The product of a few rows with one panel of 64 outputs: the inner loop of every projection, and of attention.
//!
//! Each output lane is summed over the inputs in order, whatever the number of rows, so all tile shapes give the same
//! bits.

use super::stored::{Stored, StoredBf16};
use super::{LANES, Lanes};
use crate::buffer::Plain;
use crate::packed::PANEL;

/// Vectors of a panel.
const VECTORS: usize = PANEL / LANES;

/// How weights of a dtype meet activations; one step takes one activation a row, or a pair of them.
pub(crate) trait Kind: 'static {
    /// An element of the panel.
    type Weight: Plain;
    /// The activations of one step.
    type Act: Plain;
    /// Panel elements of one output in one step.
    const PER_STEP: usize;
    /// A vector of weights in registers.
    type W<L: Lanes>: Copy;

    /// # Safety
    /// As the methods of [`Lanes`].
    unsafe fn load<L: Lanes>(from: *const Self::Weight) -> Self::W<L>;
    /// # Safety
    /// As the methods of [`Lanes`].
    unsafe fn splat<L: Lanes>(act: Self::Act) -> Self::W<L>;
    /// # Safety
    /// As the methods of [`Lanes`].
    unsafe fn step<L: Lanes>(sum: L, weight: Self::W<L>, act: Self::W<L>) -> L;

    /// A buffer's bits as activations.
    fn acts_of(bits: &[u32]) -> &[Self::Act];
    /// Writes `width` values as activations.
    ///
    /// # Safety
    /// As the methods of [`Lanes`]; `to` has `ceil(width / PER_STEP)` elements.
    unsafe fn put_acts<L: Lanes>(from: *const f32, width: usize, to: *mut u32);
}

/// f32 weights, f32 activations.
pub(crate) struct KindF32;
/// f16 weights, f32 activations.
pub(crate) struct KindF16;
/// Pairs of bf16 weights and bf16 activations.
pub(crate) struct KindBf16;

// SAFETY (the three impls): the caller's contract is that of the lanes.
impl Kind for KindF32 {
    type Weight = f32;
    type Act = f32;
    const PER_STEP: usize = 1;
    type W<L: Lanes> = L;
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const f32) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::load(from) }
    }
    #[inline(always)]
    unsafe fn splat<L: Lanes>(act: f32) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::splat(act) }
    }
    #[inline(always)]
    unsafe fn step<L: Lanes>(sum: L, weight: L, act: L) -> L {
        // SAFETY: the caller's contract.
        unsafe { weight.mul_add(act, sum) }
    }
    fn acts_of(bits: &[u32]) -> &[f32] {
        floats(bits)
    }
    #[inline(always)]
    unsafe fn put_acts<L: Lanes>(from: *const f32, width: usize, to: *mut u32) {
        // SAFETY: the caller's contract.
        unsafe { std::ptr::copy_nonoverlapping(from, to.cast(), width) }
    }
}

impl Kind for KindF16 {
    type Weight = u16;
    type Act = f32;
    const PER_STEP: usize = 1;
    type W<L: Lanes> = L;
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const u16) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::load_f16(from) }
    }
    #[inline(always)]
    unsafe fn splat<L: Lanes>(act: f32) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::splat(act) }
    }
    #[inline(always)]
    unsafe fn step<L: Lanes>(sum: L, weight: L, act: L) -> L {
        // SAFETY: the caller's contract.
        unsafe { weight.mul_add(act, sum) }
    }
    fn acts_of(bits: &[u32]) -> &[f32] {
        floats(bits)
    }
    #[inline(always)]
    unsafe fn put_acts<L: Lanes>(from: *const f32, width: usize, to: *mut u32) {
        // SAFETY: the caller's contract.
        unsafe { std::ptr::copy_nonoverlapping(from, to.cast(), width) }
    }
}

impl Kind for KindBf16 {
    type Weight = u16;
    type Act = u32;
    const PER_STEP: usize = 2;
    type W<L: Lanes> = L::Pairs;
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const u16) -> L::Pairs {
        // SAFETY: the caller's contract.
        unsafe { L::load_pairs(from) }
    }
    #[inline(always)]
    unsafe fn splat<L: Lanes>(act: u32) -> L::Pairs {
        // SAFETY: the caller's contract.
        unsafe { L::splat_pair(act) }
    }
    #[inline(always)]
    unsafe fn step<L: Lanes>(sum: L, weight: L::Pairs, act: L::Pairs) -> L {
        // SAFETY: the caller's contract.
        unsafe { sum.add_dot(weight, act) }
    }
    fn acts_of(bits: &[u32]) -> &[u32] {
        bits
    }
    #[inline(always)]
    unsafe fn put_acts<L: Lanes>(from: *const f32, width: usize, to: *mut u32) {
        // SAFETY: the caller's contract.
        unsafe { round_row::<L>(from, width, to.cast()) }
    }
}

fn floats(bits: &[u32]) -> &[f32] {
    // SAFETY: same size and alignment, and any bits are an f32.
    unsafe { std::slice::from_raw_parts(bits.as_ptr().cast(), bits.len()) }
}

/// Rounds `width` elements to bf16; an odd width is followed by a zero.
///
/// # Safety
/// As the methods of [`Lanes`]; `to` has `width` elements, one more when that is odd.
#[inline(always)]
pub(crate) unsafe fn round_row<L: Lanes>(from: *const f32, width: usize, to: *mut u16) {
    // SAFETY: the caller's contract.
    unsafe {
        let mut at = 0;
        while at + LANES <= width {
            L::load(from.add(at)).store_bf16(to.add(at));
            at += LANES;
        }
        if at < width {
            let count = width - at;
            StoredBf16::store_part(L::load_part(from.add(at), count), to.add(at), count.next_multiple_of(2));
        }
    }
}

/// One row's sums over a panel.
pub(crate) type Sums = [f32; PANEL];

/// Adds to `sums` (`rows.len() <= TILE_ROWS` rows of `[64]`, `stride` elements apart) the products of each row's
/// first `steps` activations with the panel.
///
/// # Safety
/// As the methods of [`Lanes`]; the panel holds `steps * PER_STEP * 64` weights, every row `steps` activations.
#[inline(always)]
pub(crate) unsafe fn add_products<L: Lanes, K: Kind>(
    panel: *const K::Weight,
    rows: &[*const K::Act],
    steps: usize,
    sums: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller's contract.
    unsafe {
        match rows.len() {
            0 => {}
            1 => tile::<L, K, 1, VECTORS>(panel, rows.as_ptr(), steps, sums, stride),
            count if L::WHOLE_PANEL => match count {
                2 => tile::<L, K, 2, VECTORS>(panel, rows.as_ptr(), steps, sums, stride),
                3 => tile::<L, K, 3, VECTORS>(panel, rows.as_ptr(), steps, sums, stride),
                4 => tile::<L, K, 4, VECTORS>(panel, rows.as_ptr(), steps, sums, stride),
                5 => tile::<L, K, 5, VECTORS>(panel, rows.as_ptr(), steps, sums, stride),
                _ => tile::<L, K, 6, VECTORS>(panel, rows.as_ptr(), steps, sums, stride),
            },
            count => {
                let mut vector = 0;
                while vector < VECTORS {
                    let panel = panel.add(vector * LANES * K::PER_STEP);
                    let sums = sums.add(vector * LANES);
                    match count {
                        2 => tile::<L, K, 2, 2>(panel, rows.as_ptr(), steps, sums, stride),
                        _ => tile::<L, K, 3, 2>(panel, rows.as_ptr(), steps, sums, stride),
                    }
                    vector += 2;
                }
            }
        }
    }
}

/// `M` rows by `V` vectors of outputs, held in registers over all steps.
#[inline(always)]
unsafe fn tile<L: Lanes, K: Kind, const M: usize, const V: usize>(
    panel: *const K::Weight,
    rows: *const *const K::Act,
    steps: usize,
    out: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller's contract; `rows` has `M` elements.
    unsafe {
        let rows = *rows.cast::<[*const K::Act; M]>();
        let mut sums = [[L::splat(0.0); V]; M];
        for m in 0..M {
            for v in 0..V {
                sums[m][v] = L::load(out.add(m * stride + v * LANES));
            }
        }
        let mut weights = panel;
        for step in 0..steps {
            let mut w = [K::load::<L>(weights); V];
            for v in 1..V {
                w[v] = K::load::<L>(weights.add(v * LANES * K::PER_STEP));
            }
            for m in 0..M {
                let act = K::splat::<L>(*rows[m].add(step));
                for v in 0..V {
                    sums[m][v] = K::step(sums[m][v], w[v], act);
                }
            }
            weights = weights.add(PANEL * K::PER_STEP);
        }
        for m in 0..M {
            for v in 0..V {
                sums[m][v].store(out.add(m * stride + v * LANES));
            }
        }
    }
}
