//! The ways to multiply activations by packed weights: which instruction, and how it wants the activations to lie.

use std::marker::PhantomData;

use super::ahead::Ahead;
use super::fused::{FUSED_ROWS, add_products};
use super::widen::{Rounding, Widen};
use super::{Body, LANES, Lanes, dispatch};
use crate::buffer::Plain;
use crate::form::Form;
use crate::packed::{CHUNK, PANEL};

/// Rows of the tallest block of any kind.
pub(crate) const MAX_ROWS: usize = 32;

/// The products of a block of rows with one panel, `[rows, 64]`. It comes from a [`Scratch`](crate::scratch::Scratch): to
/// fill it with zeros would cost a task of one row a hundredth of its time.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Sums(pub(crate) [[f32; PANEL]; MAX_ROWS]);

// SAFETY: floats and nothing else, aligned to 64.
unsafe impl Plain for Sums {}

/// A way to multiply.
///
/// Activations `[rows, depth]` lie in blocks of `BLOCK` rows, and in each block chunk by chunk of `CHUNK` inputs: see
/// [`chunk_at`]. `depth` is a multiple of `CHUNK`. All kinds sum an output over the inputs in an order that depends on
/// the depth alone.
pub(crate) trait Kind: 'static {
    /// An element of a panel.
    type Weight: Plain;
    /// An activation as the product reads it.
    type Act: Plain;
    /// Elements of a panel before its first chunk.
    const HEAD_LEN: usize;
    /// Elements of a chunk of a panel.
    const CHUNK_LEN: usize;
    /// Rows that [`Kind::products`] takes at most, a multiple of `BLOCK`.
    const ROWS: usize;
    /// Rows that lie together.
    const BLOCK: usize;
    /// What a thread holds while it multiplies.
    type Session;

    /// Runs a body that multiplies in this way.
    fn dispatch<B: Body>(form: Form, body: B) -> B::Output;

    /// Makes this thread ready to multiply; taking it anew for every product would be felt.
    ///
    /// # Safety
    /// Inside [`Kind::dispatch`].
    unsafe fn begin() -> Self::Session;

    /// One row's chunk of activations: `1 <= count <= CHUNK` values, then zeros.
    ///
    /// # Safety
    /// As the methods of [`Lanes`]; `to` has `CHUNK` elements.
    unsafe fn put<L: Lanes>(from: *const f32, count: usize, to: *mut Self::Act);

    /// Rows of whole chunks as activations, where they need not be changed for it.
    fn as_they_are(_rows: &[f32]) -> Option<&[Self::Act]> {
        None
    }

    /// Elements of a panel of `depth` inputs.
    fn panel_len(depth: usize) -> usize {
        Self::HEAD_LEN + depth / CHUNK * Self::CHUNK_LEN
    }

    /// How often `rows` rows go through all chunks of a panel.
    fn passes(rows: usize) -> usize {
        rows.div_ceil(Self::ROWS)
    }

    /// The first `rows <= ROWS` rows of `sums`.
    ///
    /// # Safety
    /// As the methods of [`Lanes`], inside [`Kind::dispatch`]; the panel has `panel_len(depth)` elements, `acts` whole
    /// blocks of rows.
    unsafe fn products<L: Lanes>(
        session: &Self::Session,
        panel: *const Self::Weight,
        acts: *const Self::Act,
        depth: usize,
        rows: usize,
        ahead: &mut Ahead,
        sums: &mut Sums,
    );
}

/// Where a row's chunk of activations starts, of rows that lie in blocks of `block`.
#[inline(always)]
pub(crate) fn chunk_at(block: usize, depth: usize, row: usize, chunk: usize) -> usize {
    row / block * block * depth + chunk * block * CHUNK + row % block * CHUNK
}

/// Activations of a row from `width` values, from chunk `first_chunk` on, in blocks of `block` rows of `depth` inputs.
///
/// # Safety
/// As the methods of [`Lanes`]; `from` has `width` elements, `acts` holds the whole block of the row.
#[inline(always)]
pub(crate) unsafe fn put_row<L: Lanes, K: Kind>(
    from: *const f32,
    width: usize,
    (block, depth): (usize, usize),
    acts: *mut K::Act,
    row: usize,
    first_chunk: usize,
) {
    let mut at = 0;
    while at < width {
        // SAFETY: the caller's contract; the chunk lies inside the row.
        unsafe {
            let to = acts.add(chunk_at(block, depth, row, first_chunk + at / CHUNK));
            K::put::<L>(from.add(at), (width - at).min(CHUNK), to);
        }
        at += CHUNK;
    }
}

/// f32 activations and fused multiply-adds, in any form.
pub(crate) struct Fused<W>(PhantomData<W>);

impl<W: Widen> Kind for Fused<W> {
    type Weight = W::Weight;
    type Act = f32;
    const HEAD_LEN: usize = W::HEAD_LEN;
    const CHUNK_LEN: usize = W::CHUNK_LEN;
    const ROWS: usize = FUSED_ROWS;
    const BLOCK: usize = 1;
    type Session = ();

    fn dispatch<B: Body>(form: Form, body: B) -> B::Output {
        dispatch(form, body)
    }

    fn as_they_are(rows: &[f32]) -> Option<&[f32]> {
        (W::ROUNDING == Rounding::None).then_some(rows)
    }

    #[inline(always)]
    unsafe fn begin() {}

    #[inline(always)]
    unsafe fn put<L: Lanes>(from: *const f32, count: usize, to: *mut f32) {
        // SAFETY: the caller's contract.
        unsafe {
            let (values, scale) = match W::ROUNDING {
                Rounding::Bytes => rounding::<L>(from, count),
                _ => (values::<L>(from, count), 1.0),
            };
            for (half, values) in values.into_iter().enumerate() {
                let values = match W::ROUNDING {
                    Rounding::None => values,
                    Rounding::Bf16 => values.round_bf16(),
                    Rounding::Bytes => values.mul(L::splat(scale)),
                };
                values.store(to.add(half * LANES));
            }
        }
    }

    #[inline(always)]
    unsafe fn products<L: Lanes>(
        (): &(),
        panel: *const W::Weight,
        acts: *const f32,
        depth: usize,
        rows: usize,
        ahead: &mut Ahead,
        sums: &mut Sums,
    ) {
        let mut each = [acts; FUSED_ROWS];
        for row in 0..rows {
            each[row] = acts.wrapping_add(row * depth);
            sums.0[row] = [0.0; PANEL];
        }
        // SAFETY: the caller's contract.
        unsafe {
            let chunks = panel.add(W::HEAD_LEN);
            add_products::<L, W>(chunks, &each[..rows], depth, ahead, sums.0.as_mut_ptr().cast(), PANEL);
            finish::<L, W>(panel, &mut sums.0[..rows]);
        }
    }
}

/// A chunk of `count` values, zeros beyond.
///
/// # Safety
/// As [`Kind::put`].
#[inline(always)]
unsafe fn values<L: Lanes>(from: *const f32, count: usize) -> [L; 2] {
    // SAFETY: the caller's contract.
    unsafe {
        [L::load_part(from, count.min(LANES)), L::load_part(from.wrapping_add(LANES), count.saturating_sub(LANES))]
    }
}

/// A chunk of activations as whole numbers of -127 to 127 and their scale, as ggml's `Q8_0` has them: a NaN or an
/// infinity makes the scale NaN.
///
/// # Safety
/// As [`Kind::put`].
#[inline(always)]
pub(crate) unsafe fn rounding<L: Lanes>(from: *const f32, count: usize) -> ([L; 2], f32) {
    const LARGEST: f32 = 127.0;
    // SAFETY: the caller's contract.
    unsafe {
        let [low, high] = values::<L>(from, count);
        let zero = L::splat(0.0);
        let (low_size, high_size) = (low.max(zero.sub(low)), high.max(zero.sub(high)));
        let largest = low_size.max(high_size).reduce_max();
        // Beside what is too small for an inverse there is nothing but zero.
        let inverse = if largest > f32::MIN_POSITIVE * LARGEST { LARGEST / largest } else { 0.0 };
        // Zero but for a NaN or an infinity, which must not become a number.
        let strange = low.mul(zero).add(high.mul(zero)).reduce_add();
        let scale = if inverse > 0.0 { largest / LARGEST } else { 0.0 } + strange;
        let inverse = L::splat(inverse);
        ([low.mul(inverse).round(), high.mul(inverse).round()], scale)
    }
}

/// What the panel's head makes of the sums.
///
/// # Safety
/// As the methods of [`Lanes`]; the head is there.
#[inline(always)]
pub(crate) unsafe fn finish<L: Lanes, W: Widen>(head: *const W::Weight, sums: &mut [[f32; PANEL]]) {
    if W::HEAD_LEN == 0 {
        return;
    }
    for sums in sums {
        for vector in 0..PANEL / LANES {
            // SAFETY: the caller's contract.
            unsafe {
                let at = sums.as_mut_ptr().add(vector * LANES);
                W::finish(head, vector, L::load(at)).store(at);
            }
        }
    }
}
