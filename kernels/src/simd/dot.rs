//! Pairs of bf16 activations by pairs of bf16 weights, by `vdpbf16ps`.

use std::arch::x86_64::*;

use super::ahead::Ahead;
use super::avx512;
use super::kind::{Kind, Sums};
use super::{Body, LANES, Lanes};
use crate::form::Form;
use crate::packed::{CHUNK, PANEL};

/// Vectors of a panel.
const VECTORS: usize = PANEL / LANES;

/// A few rows in registers.
pub(crate) struct Dot;

/// [`Kind::put`] as bf16.
///
/// # Safety
/// As [`Kind::put`], inside [`avx512::run_dots`].
#[inline(always)]
pub(super) unsafe fn put_bf16(from: *const f32, count: usize, to: *mut u16) {
    let mask = (u32::MAX >> (CHUNK - count)) as __mmask32;
    // SAFETY: the caller's contract; masked lanes are not read.
    unsafe {
        let low = _mm512_maskz_loadu_ps(mask as __mmask16, from);
        let high = _mm512_maskz_loadu_ps((mask >> LANES) as __mmask16, from.wrapping_add(LANES));
        let both = _mm512_cvtne2ps_pbh(high, low);
        _mm512_storeu_si512(to.cast(), std::mem::transmute::<__m512bh, __m512i>(both));
    }
}

impl Kind for Dot {
    type Weight = u16;
    type Act = u16;
    const HEAD_LEN: usize = 0;
    const CHUNK_LEN: usize = CHUNK * PANEL;
    const ROWS: usize = 6;
    const BLOCK: usize = 1;
    type Session = ();

    fn dispatch<B: Body>(_: Form, body: B) -> B::Output {
        // SAFETY: the form that chooses this kind was detected.
        unsafe { avx512::run_dots(body) }
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
    mut chunk: *const u16,
    mut acts: *const u16,
    depth: usize,
    ahead: &mut Ahead,
    sums: &mut Sums,
) {
    // SAFETY: the caller's contract: `M` rows of `depth` activations, and all chunks.
    unsafe {
        let mut totals = [[_mm512_setzero_ps(); VECTORS]; M];
        for _ in 0..depth / CHUNK {
            for pair in 0..CHUNK / 2 {
                if pair % (CHUNK / 8) == 0 {
                    ahead.ask::<L, 4>();
                }
                let mut weights = [_mm512_setzero_si512(); VECTORS];
                for (v, weights) in weights.iter_mut().enumerate() {
                    *weights = _mm512_loadu_si512(chunk.add((pair * PANEL + v * LANES) * 2).cast());
                }
                for (m, totals) in totals.iter_mut().enumerate() {
                    let acts = acts.add(m * depth + 2 * pair).cast::<i32>().read_unaligned();
                    let acts = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(acts));
                    for (total, weights) in totals.iter_mut().zip(weights) {
                        *total = _mm512_dpbf16_ps(*total, acts, std::mem::transmute::<__m512i, __m512bh>(weights));
                    }
                }
            }
            chunk = chunk.add(Dot::CHUNK_LEN);
            acts = acts.add(CHUNK);
        }
        for (m, totals) in totals.iter().enumerate() {
            for (v, total) in totals.iter().enumerate() {
                _mm512_store_ps(sums.0[m].as_mut_ptr().add(v * LANES), *total);
            }
        }
    }
}
