//! The ways to multiply activations by packed weights: which instruction, and how it wants the activations to lie.

use std::marker::PhantomData;

use super::ahead::Ahead;
use super::fused::{FUSED_ROWS, Widen, add_products};
use super::{Body, LANES, Lanes, dispatch};
use crate::buffer::Plain;
use crate::form::Form;
use crate::packed::{CHUNK, PANEL};

/// Rows of the tallest block of any kind.
pub(crate) const MAX_ROWS: usize = 32;

/// The products of a block of rows with one panel, `[rows, 64]`.
#[repr(C, align(64))]
pub(crate) struct Sums(pub(crate) [[f32; PANEL]; MAX_ROWS]);

impl Sums {
    #[inline(always)]
    pub(crate) fn new() -> Sums {
        Sums([[0.0; PANEL]; MAX_ROWS])
    }
}

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

    /// How often `rows` rows go through all chunks of a panel.
    fn passes(rows: usize) -> usize {
        rows.div_ceil(Self::ROWS)
    }

    /// The first `rows <= ROWS` rows of `sums`.
    ///
    /// # Safety
    /// As the methods of [`Lanes`], inside [`Kind::dispatch`]; the panel holds `depth * 64` weights, `acts` whole blocks
    /// of rows.
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

/// One row's activations from `width` values, in blocks of `block` rows.
///
/// # Safety
/// As the methods of [`Lanes`]; `from` has `width` elements, `acts` holds the whole block of the row.
#[inline(always)]
pub(crate) unsafe fn put_row<L: Lanes, K: Kind>(
    from: *const f32,
    width: usize,
    block: usize,
    acts: *mut K::Act,
    row: usize,
) {
    let depth = width.next_multiple_of(CHUNK);
    let mut at = 0;
    while at < width {
        // SAFETY: the caller's contract; the chunk lies inside the row.
        unsafe {
            let to = acts.add(chunk_at(block, depth, row, at / CHUNK));
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
    const ROWS: usize = FUSED_ROWS;
    const BLOCK: usize = 1;
    type Session = ();

    fn dispatch<B: Body>(form: Form, body: B) -> B::Output {
        dispatch(form, body)
    }

    fn as_they_are(rows: &[f32]) -> Option<&[f32]> {
        (!W::ROUNDS).then_some(rows)
    }

    #[inline(always)]
    unsafe fn begin() {}

    #[inline(always)]
    unsafe fn put<L: Lanes>(from: *const f32, count: usize, to: *mut f32) {
        // SAFETY: the caller's contract.
        unsafe {
            for lane in [0, LANES] {
                let count = count.saturating_sub(lane).min(LANES);
                let acts = L::load_part(from.wrapping_add(lane), count);
                let acts = if W::ROUNDS { acts.round_bf16() } else { acts };
                acts.store(to.add(lane));
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
        unsafe { add_products::<L, W>(panel, &each[..rows], depth, ahead, sums.0.as_mut_ptr().cast(), PANEL) };
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use bf16::{DotBf16, TileBf16};

/// Pairs of bf16 activations by pairs of bf16 weights.
#[cfg(target_arch = "x86_64")]
mod bf16 {
    use std::arch::x86_64::*;

    use super::*;
    use crate::simd::amx::{TILE_DEPTH, TILE_ROWS, Tiles};
    use crate::simd::avx512;

    /// By `vdpbf16ps`.
    pub(crate) struct DotBf16;
    /// On matrix tiles.
    pub(crate) struct TileBf16;

    /// Elements from one pair of inputs to the next in a panel.
    const STEP: usize = 2 * PANEL;

    /// # Safety
    /// As [`Kind::put`].
    #[inline(always)]
    unsafe fn put_bf16(from: *const f32, count: usize, to: *mut u16) {
        let mask = (u32::MAX >> (CHUNK - count)) as __mmask32;
        // SAFETY: the caller's contract; masked lanes are not read.
        unsafe {
            let low = _mm512_maskz_loadu_ps(mask as __mmask16, from);
            let high = _mm512_maskz_loadu_ps((mask >> LANES) as __mmask16, from.wrapping_add(LANES));
            let both = _mm512_cvtne2ps_pbh(high, low);
            _mm512_storeu_si512(to.cast(), std::mem::transmute::<__m512bh, __m512i>(both));
        }
    }

    impl Kind for DotBf16 {
        type Weight = u16;
        type Act = u16;
        const ROWS: usize = 6;
        const BLOCK: usize = 1;
        type Session = ();

        fn dispatch<B: Body>(_: Form, body: B) -> B::Output {
            // SAFETY: the form that chooses this kind was detected.
            unsafe { avx512::run_bf16(body) }
        }

        #[inline(always)]
        unsafe fn begin() {}

        #[inline(always)]
        unsafe fn put<L: Lanes>(from: *const f32, count: usize, to: *mut u16) {
            // SAFETY: the caller's contract.
            unsafe { put_bf16(from, count, to) }
        }

        #[inline(always)]
        unsafe fn products<L: Lanes>(
            (): &(),
            panel: *const u16,
            acts: *const u16,
            depth: usize,
            rows: usize,
            ahead: &mut Ahead,
            sums: &mut Sums,
        ) {
            // SAFETY: the caller's contract.
            unsafe {
                match rows {
                    1 => dots::<L, 1>(panel, acts, depth, ahead, sums),
                    2 => dots::<L, 2>(panel, acts, depth, ahead, sums),
                    3 => dots::<L, 3>(panel, acts, depth, ahead, sums),
                    4 => dots::<L, 4>(panel, acts, depth, ahead, sums),
                    5 => dots::<L, 5>(panel, acts, depth, ahead, sums),
                    _ => dots::<L, 6>(panel, acts, depth, ahead, sums),
                }
            }
        }
    }

    /// `M` rows by a panel, held in registers over the whole depth.
    #[inline(always)]
    unsafe fn dots<L: Lanes, const M: usize>(
        panel: *const u16,
        acts: *const u16,
        depth: usize,
        ahead: &mut Ahead,
        sums: &mut Sums,
    ) {
        // SAFETY: the caller's contract: `M` rows of `depth` activations, and a whole panel.
        unsafe {
            let mut totals = [[_mm512_setzero_ps(); PANEL / LANES]; M];
            for pair in 0..depth / 2 {
                if M < DotBf16::ROWS && pair % (CHUNK / 8) == 0 {
                    ahead.ask::<L, 4>();
                }
                let from = panel.add(pair * STEP).cast::<[__m512bh; PANEL / LANES]>();
                let weights = from.read_unaligned();
                for (m, totals) in totals.iter_mut().enumerate() {
                    let acts = acts.add(m * depth + 2 * pair).cast::<i32>().read_unaligned();
                    let acts = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(acts));
                    for (total, weights) in totals.iter_mut().zip(weights) {
                        *total = _mm512_dpbf16_ps(*total, acts, weights);
                    }
                }
            }
            for (m, totals) in totals.iter().enumerate() {
                for (v, total) in totals.iter().enumerate() {
                    _mm512_store_ps(sums.0[m].as_mut_ptr().add(v * LANES), *total);
                }
            }
        }
    }

    impl Kind for TileBf16 {
        type Weight = u16;
        type Act = u16;
        const ROWS: usize = 2 * TILE_ROWS;
        const BLOCK: usize = TILE_ROWS;
        type Session = Tiles;

        fn passes(rows: usize) -> usize {
            // Two halves of the panel where rows fill two tiles.
            rows.div_ceil(TILE_ROWS)
        }

        fn dispatch<B: Body>(_: Form, body: B) -> B::Output {
            // SAFETY: as above.
            unsafe { avx512::run_bf16(body) }
        }

        #[inline(always)]
        unsafe fn begin() -> Tiles {
            // SAFETY: the form that chooses this kind was granted tiles.
            unsafe { Tiles::take() }
        }

        #[inline(always)]
        unsafe fn put<L: Lanes>(from: *const f32, count: usize, to: *mut u16) {
            // SAFETY: the caller's contract.
            unsafe { put_bf16(from, count, to) }
        }

        #[inline(always)]
        unsafe fn products<L: Lanes>(
            tiles: &Tiles,
            panel: *const u16,
            acts: *const u16,
            depth: usize,
            rows: usize,
            ahead: &mut Ahead,
            sums: &mut Sums,
        ) {
            // SAFETY: the caller's contract.
            unsafe {
                let sums = sums.0.as_mut_ptr().cast::<f32>();
                if rows <= TILE_ROWS {
                    return one_by_four::<L>(tiles, panel, acts, depth, ahead, sums);
                }
                for half in [0, PANEL / 2] {
                    two_by_two::<L>(tiles, panel.add(2 * half), acts, depth, ahead, sums.add(half));
                }
            }
        }
    }

    /// Elements of one block of activations in one chunk.
    const ACTS: usize = TILE_ROWS * TILE_DEPTH;
    /// Elements of a panel in one chunk.
    const WEIGHTS: usize = TILE_DEPTH * PANEL;
    const ROW_BYTES: usize = 2 * STEP;
    const ACT_BYTES: usize = 2 * TILE_DEPTH;
    const SUM_BYTES: usize = 4 * PANEL;

    /// Sixteen rows by a panel.
    #[inline(always)]
    unsafe fn one_by_four<L: Lanes>(
        tiles: &Tiles,
        mut panel: *const u16,
        mut acts: *const u16,
        depth: usize,
        ahead: &mut Ahead,
        sums: *mut f32,
    ) {
        tiles.zero_sums();
        // SAFETY: the caller's contract.
        unsafe {
            for _ in 0..depth / TILE_DEPTH {
                tiles.load::<4, _>(acts, ACT_BYTES);
                ahead.ask::<L, 4>();
                tiles.load::<5, _>(panel, ROW_BYTES);
                tiles.dot::<0, 4, 5>();
                ahead.ask::<L, 4>();
                tiles.load::<6, _>(panel.add(2 * LANES), ROW_BYTES);
                tiles.dot::<1, 4, 6>();
                ahead.ask::<L, 4>();
                tiles.load::<7, _>(panel.add(4 * LANES), ROW_BYTES);
                tiles.dot::<2, 4, 7>();
                ahead.ask::<L, 4>();
                tiles.load::<5, _>(panel.add(6 * LANES), ROW_BYTES);
                tiles.dot::<3, 4, 5>();
                panel = panel.add(WEIGHTS);
                acts = acts.add(ACTS);
            }
            tiles.store::<0>(sums, SUM_BYTES);
            tiles.store::<1>(sums.add(LANES), SUM_BYTES);
            tiles.store::<2>(sums.add(2 * LANES), SUM_BYTES);
            tiles.store::<3>(sums.add(3 * LANES), SUM_BYTES);
        }
    }

    /// Thirty-two rows by half a panel.
    #[inline(always)]
    unsafe fn two_by_two<L: Lanes>(
        tiles: &Tiles,
        mut panel: *const u16,
        mut acts: *const u16,
        depth: usize,
        ahead: &mut Ahead,
        sums: *mut f32,
    ) {
        tiles.zero_sums();
        // SAFETY: the caller's contract.
        unsafe {
            for _ in 0..depth / TILE_DEPTH {
                tiles.load::<4, _>(acts, ACT_BYTES);
                tiles.load::<6, _>(panel, ROW_BYTES);
                tiles.dot::<0, 4, 6>();
                ahead.ask::<L, 2>();
                tiles.load::<7, _>(panel.add(2 * LANES), ROW_BYTES);
                tiles.dot::<1, 4, 7>();
                ahead.ask::<L, 2>();
                tiles.load::<5, _>(acts.add(TILE_ROWS * depth), ACT_BYTES);
                tiles.dot::<2, 5, 6>();
                tiles.dot::<3, 5, 7>();
                panel = panel.add(WEIGHTS);
                acts = acts.add(ACTS);
            }
            tiles.store_square(sums, PANEL);
        }
    }
}
