//! Quantised weights by activations of eight bits, by `vpdpbusd`: sums of four products of bytes.
//!
//! Sums inside a chunk are exact; chunks are added in f32, in order, whatever the number of rows.

use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::ahead::Ahead;
use super::avx512::{self, Avx512};
use super::kind::{Kind, Sums, finish, rounding};
use super::widen::{Widen, WidenInt8, WidenQ4, WidenQ8};
use super::{Body, LANES, Lanes};
use crate::form::Form;
use crate::format::WeightFormat;
use crate::packed::{CENTRE, CHUNK, PANEL, PackedShape};

/// A few rows in registers.
pub(crate) struct Quads<W>(PhantomData<W>);

/// Vectors of a panel.
const VECTORS: usize = PANEL / LANES;

/// Fours of a chunk.
const FOURS: usize = CHUNK / 4;

// Words of a chunk of activations: their codes in fours, and what belongs to all of them.
const SCALE: usize = FOURS;
/// What the sum of the codes takes from products with codes that have [`CENTRE`] added.
const OFFSET: usize = SCALE + 1;
/// The sum of the activations as they were rounded.
const TOTAL: usize = SCALE + 2;

/// How a format's codes are multiplied.
pub(crate) trait Codes: Widen<Weight = u8> {
    /// Whether codes have [`CENTRE`] added.
    const CENTRED: bool;

    /// The unsigned codes of outputs `16 * vector..` and inputs `4 * four..` of a chunk.
    ///
    /// # Safety
    /// The whole chunk is there; inside [`avx512::run_dots`].
    unsafe fn codes(chunk: *const u8, four: usize, vector: usize) -> __m512i;

    /// `sum` and the weighted activations of a chunk, given the products `dots` of their numbers.
    ///
    /// # Safety
    /// As [`Codes::codes`]; `acts` is a chunk of activations.
    unsafe fn add(chunk: *const u8, vector: usize, dots: __m512, acts: *const i32, sum: __m512) -> __m512;
}

/// A value that a chunk of activations has for all of them.
///
/// # Safety
/// `acts` is a chunk of activations; inside [`avx512::run_dots`].
#[inline(always)]
unsafe fn shared(acts: *const i32, word: usize) -> __m512 {
    // SAFETY: the caller's contract.
    unsafe { _mm512_set1_ps(*acts.add(word).cast::<f32>()) }
}

/// Sixteen outputs' bytes of four neighbouring inputs.
///
/// # Safety
/// They are there; inside [`avx512::run_dots`].
#[inline(always)]
unsafe fn bytes(codes: *const u8, four: usize, vector: usize) -> __m512i {
    // SAFETY: the caller's contract.
    unsafe { _mm512_loadu_si512(codes.add(PackedShape::code_position(vector * LANES, 4 * four)).cast()) }
}

impl Codes for WidenInt8 {
    const CENTRED: bool = true;
    #[inline(always)]
    unsafe fn codes(chunk: *const u8, four: usize, vector: usize) -> __m512i {
        // SAFETY: the caller's contract.
        unsafe { bytes(chunk, four, vector) }
    }
    #[inline(always)]
    unsafe fn add(_: *const u8, _: usize, dots: __m512, acts: *const i32, sum: __m512) -> __m512 {
        // SAFETY: the caller's contract.
        unsafe { _mm512_fmadd_ps(dots, shared(acts, SCALE), sum) }
    }
}

impl Codes for WidenQ8 {
    const CENTRED: bool = true;
    #[inline(always)]
    unsafe fn codes(chunk: *const u8, four: usize, vector: usize) -> __m512i {
        // SAFETY: the caller's contract.
        unsafe { bytes(chunk.add(WeightFormat::Q8_0.scale_bytes()), four, vector) }
    }
    #[inline(always)]
    unsafe fn add(chunk: *const u8, vector: usize, dots: __m512, acts: *const i32, sum: __m512) -> __m512 {
        // SAFETY: the caller's contract.
        unsafe {
            let scales = Self::scale::<Avx512>(chunk, vector).0;
            _mm512_fmadd_ps(dots, _mm512_mul_ps(scales, shared(acts, SCALE)), sum)
        }
    }
}

impl Codes for WidenQ4 {
    const CENTRED: bool = false;
    #[inline(always)]
    unsafe fn codes(chunk: *const u8, four: usize, vector: usize) -> __m512i {
        // SAFETY: the caller's contract.
        unsafe {
            let both = bytes(chunk.add(WeightFormat::Q4K.scale_bytes()), four % (FOURS / 2), vector);
            // The codes of the second half of the inputs are the high halves.
            let low = if four < FOURS / 2 { both } else { _mm512_srli_epi16::<4>(both) };
            _mm512_and_si512(low, _mm512_set1_epi8(15))
        }
    }
    #[inline(always)]
    unsafe fn add(chunk: *const u8, vector: usize, dots: __m512, acts: *const i32, sum: __m512) -> __m512 {
        // SAFETY: the caller's contract.
        unsafe {
            let (Avx512(scales), Avx512(minima)) = Self::scale::<Avx512>(chunk, vector);
            let sum = _mm512_fmadd_ps(dots, _mm512_mul_ps(scales, shared(acts, SCALE)), sum);
            _mm512_fmadd_ps(minima, shared(acts, TOTAL), sum)
        }
    }
}

impl<W: Codes> Kind for Quads<W> {
    type Weight = u8;
    /// A chunk has room for sixteen words, of which eleven are used.
    type Act = u16;
    const HEAD_LEN: usize = W::HEAD_LEN;
    const CHUNK_LEN: usize = W::CHUNK_LEN;
    /// Their sums leave room for the weights in registers.
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
        unsafe {
            let ([Avx512(low), Avx512(high)], scale) = rounding::<Avx512>(from, count);
            let codes = [_mm512_cvtps_epi32(low), _mm512_cvtps_epi32(high)];
            let to = to.cast::<i32>();
            for (half, codes) in codes.into_iter().enumerate() {
                _mm_storeu_si128(to.add(half * FOURS / 2).cast(), _mm512_cvtepi32_epi8(codes));
            }
            let total = _mm512_reduce_add_epi32(_mm512_add_epi32(codes[0], codes[1]));
            *to.add(SCALE).cast() = scale;
            *to.add(OFFSET) = -i32::from(CENTRE) * total;
            *to.add(TOTAL).cast() = total as f32 * scale;
        }
    }

    #[inline(always)]
    unsafe fn products<L: Lanes>(
        (): &(),
        panel: *const u8,
        acts: *const u16,
        depth: usize,
        rows: usize,
        ahead: &mut Ahead,
        sums: &mut Sums,
    ) {
        // SAFETY: the caller's contract.
        unsafe {
            let chunks = panel.add(W::HEAD_LEN);
            match rows {
                1 => dots::<L, W, 1>(chunks, acts, depth, ahead, sums),
                2 => dots::<L, W, 2>(chunks, acts, depth, ahead, sums),
                3 => dots::<L, W, 3>(chunks, acts, depth, ahead, sums),
                4 => dots::<L, W, 4>(chunks, acts, depth, ahead, sums),
                5 => dots::<L, W, 5>(chunks, acts, depth, ahead, sums),
                _ => dots::<L, W, 6>(chunks, acts, depth, ahead, sums),
            }
            finish::<L, W>(panel, &mut sums.0[..rows]);
        }
    }
}

/// `M` rows by a panel.
///
/// # Safety
/// As [`Kind::products`].
#[inline(always)]
unsafe fn dots<L: Lanes, W: Codes, const M: usize>(
    mut chunk: *const u8,
    mut acts: *const u16,
    depth: usize,
    ahead: &mut Ahead,
    sums: &mut Sums,
) {
    for sums in &mut sums.0[..M] {
        *sums = [0.0; PANEL];
    }
    for _ in 0..depth / CHUNK {
        // SAFETY: the caller's contract: `M` rows of `depth` activations, and all chunks.
        unsafe {
            let row = |m: usize| acts.add(m * depth).cast::<i32>();
            // Not between the products, which leave no register free for a call.
            ahead.ask::<L, 1>();
            let mut dots = [[_mm512_setzero_si512(); VECTORS]; M];
            if W::CENTRED {
                for (m, dots) in dots.iter_mut().enumerate() {
                    *dots = [_mm512_set1_epi32(*row(m).add(OFFSET)); VECTORS];
                }
            }
            for four in 0..FOURS {
                let mut codes = [_mm512_setzero_si512(); VECTORS];
                for (v, codes) in codes.iter_mut().enumerate() {
                    *codes = W::codes(chunk, four, v);
                }
                for (m, dots) in dots.iter_mut().enumerate() {
                    let acts = _mm512_set1_epi32(*row(m).add(four));
                    for (dots, codes) in dots.iter_mut().zip(codes) {
                        *dots = _mm512_dpbusd_epi32(*dots, codes, acts);
                    }
                }
            }
            for (m, dots) in dots.iter().enumerate() {
                for (v, dots) in dots.iter().enumerate() {
                    let to = sums.0[m].as_mut_ptr().add(v * LANES);
                    let sum = W::add(chunk, v, _mm512_cvtepi32_ps(*dots), row(m), _mm512_load_ps(to));
                    _mm512_store_ps(to, sum);
                }
            }
            chunk = chunk.add(W::CHUNK_LEN);
            acts = acts.add(CHUNK);
        }
    }
}
