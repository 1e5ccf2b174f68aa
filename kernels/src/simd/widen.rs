//! How the weights of a format lie in a panel and come to be f32.

use super::{LANES, Lanes};
use crate::buffer::Plain;
use crate::format::WeightFormat;
use crate::packed::{CHUNK, PANEL};

/// The weights of one format.
pub(crate) trait Widen: 'static {
    /// An element of a panel.
    type Weight: Plain;
    /// Whether activations are rounded to bf16.
    const ROUNDS: bool = false;
    /// Elements of a panel before its first chunk.
    const HEAD_LEN: usize = 0;
    /// Elements of a chunk.
    const CHUNK_LEN: usize = CHUNK * PANEL;
    /// What sixteen outputs share in a chunk.
    type Scale<L: Lanes>: Copy;

    /// What outputs `16 * vector..` share in a chunk.
    ///
    /// # Safety
    /// As the methods of [`Lanes`]; the whole chunk is there, and `vector < 4`.
    unsafe fn scale<L: Lanes>(chunk: *const Self::Weight, vector: usize) -> Self::Scale<L>;

    /// The weights of outputs `16 * vector..` and one input of a chunk.
    ///
    /// # Safety
    /// As [`Widen::scale`]; `input < 32`.
    unsafe fn load<L: Lanes>(chunk: *const Self::Weight, input: usize, vector: usize, scale: Self::Scale<L>) -> L;

    /// The sums of outputs `16 * vector..`, given those of the weights as they were loaded and the panel's head.
    ///
    /// # Safety
    /// As the methods of [`Lanes`]; the head is there.
    #[inline(always)]
    unsafe fn finish<L: Lanes>(_head: *const Self::Weight, _vector: usize, sums: L) -> L {
        sums
    }
}

/// f32 weights.
pub(crate) struct WidenF32;
/// f16 weights.
pub(crate) struct WidenF16;
/// Pairs of bf16 weights; activations are rounded to bf16 where `ROUNDS`.
pub(crate) struct WidenBf16<const ROUNDS: bool>;
/// Whole numbers, scaled in the end.
pub(crate) struct WidenInt8;
/// Whole numbers with a scale a chunk.
pub(crate) struct WidenQ8;
/// Halves of bytes with a scale and a minimum a chunk.
pub(crate) struct WidenQ4;

impl Widen for WidenF32 {
    type Weight = f32;
    type Scale<L: Lanes> = ();
    #[inline(always)]
    unsafe fn scale<L: Lanes>(_: *const f32, _: usize) {}
    #[inline(always)]
    unsafe fn load<L: Lanes>(chunk: *const f32, input: usize, vector: usize, (): ()) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::load(chunk.add(input * PANEL + vector * LANES)) }
    }
}

impl Widen for WidenF16 {
    type Weight = u16;
    type Scale<L: Lanes> = ();
    #[inline(always)]
    unsafe fn scale<L: Lanes>(_: *const u16, _: usize) {}
    #[inline(always)]
    unsafe fn load<L: Lanes>(chunk: *const u16, input: usize, vector: usize, (): ()) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::load_f16(chunk.add(input * PANEL + vector * LANES)) }
    }
}

impl<const ROUNDS: bool> Widen for WidenBf16<ROUNDS> {
    type Weight = u16;
    const ROUNDS: bool = ROUNDS;
    type Scale<L: Lanes> = ();
    #[inline(always)]
    unsafe fn scale<L: Lanes>(_: *const u16, _: usize) {}
    #[inline(always)]
    unsafe fn load<L: Lanes>(chunk: *const u16, input: usize, vector: usize, (): ()) -> L {
        // SAFETY: the caller's contract.
        unsafe {
            let from = chunk.add((input / 2 * PANEL + vector * LANES) * 2);
            if input.is_multiple_of(2) { L::load_bf16_even(from) } else { L::load_bf16_odd(from) }
        }
    }
}

impl Widen for WidenInt8 {
    type Weight = u8;
    const ROUNDS: bool = true;
    const HEAD_LEN: usize = WeightFormat::Int8.head_bytes();
    type Scale<L: Lanes> = ();
    #[inline(always)]
    unsafe fn scale<L: Lanes>(_: *const u8, _: usize) {}
    #[inline(always)]
    unsafe fn load<L: Lanes>(chunk: *const u8, input: usize, vector: usize, (): ()) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::load_i8(chunk.add(input * PANEL + vector * LANES)) }
    }
    #[inline(always)]
    unsafe fn finish<L: Lanes>(head: *const u8, vector: usize, sums: L) -> L {
        // SAFETY: the caller's contract.
        unsafe { sums.mul(L::load(head.cast::<f32>().add(vector * LANES))) }
    }
}

impl Widen for WidenQ8 {
    type Weight = u8;
    const ROUNDS: bool = true;
    const CHUNK_LEN: usize = WeightFormat::Q8_0.chunk_bytes();
    type Scale<L: Lanes> = L;
    #[inline(always)]
    unsafe fn scale<L: Lanes>(chunk: *const u8, vector: usize) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::load_f16(chunk.cast::<u16>().add(vector * LANES)) }
    }
    #[inline(always)]
    unsafe fn load<L: Lanes>(chunk: *const u8, input: usize, vector: usize, scale: L) -> L {
        let codes = WeightFormat::Q8_0.scale_bytes();
        // SAFETY: the caller's contract.
        unsafe { L::load_i8(chunk.add(codes + input * PANEL + vector * LANES)).mul(scale) }
    }
}

impl Widen for WidenQ4 {
    type Weight = u8;
    const ROUNDS: bool = true;
    const CHUNK_LEN: usize = WeightFormat::Q4K.chunk_bytes();
    /// The scale, and what is added.
    type Scale<L: Lanes> = (L, L);
    #[inline(always)]
    unsafe fn scale<L: Lanes>(chunk: *const u8, vector: usize) -> (L, L) {
        // SAFETY: the caller's contract.
        unsafe {
            let scales = chunk.cast::<u16>().add(vector * LANES);
            (L::load_f16(scales), L::load_f16(scales.add(PANEL)))
        }
    }
    #[inline(always)]
    unsafe fn load<L: Lanes>(chunk: *const u8, input: usize, vector: usize, (scale, addition): (L, L)) -> L {
        const HALF: usize = CHUNK / 2;
        let codes = WeightFormat::Q4K.scale_bytes();
        // SAFETY: the caller's contract.
        unsafe {
            let from = chunk.add(codes + input % HALF * PANEL + vector * LANES);
            L::load_u4(from, input >= HALF).mul_add(scale, addition)
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use pairs::Pairs;

/// Weights as pairs of bf16.
#[cfg(target_arch = "x86_64")]
mod pairs {
    use std::arch::x86_64::*;

    use super::*;
    use crate::simd::avx512::Avx512;

    /// Formats whose weights, or codes, are multiplied as bf16.
    pub(crate) trait Pairs: Widen {
        /// Whether a panel is pairs of bf16 already.
        const PLAIN: bool = false;

        /// Outputs `16 * vector..` and inputs `2 * pair` and the next of a chunk, pair by pair; rounded to nearest even.
        ///
        /// # Safety
        /// As [`Widen::load`], with `avx512bf16`.
        #[inline(always)]
        unsafe fn pair(chunk: *const Self::Weight, pair: usize, vector: usize, scale: Self::Scale<Avx512>) -> __m512i {
            // SAFETY: the caller's contract.
            unsafe {
                let even = Self::load::<Avx512>(chunk, 2 * pair, vector, scale).0;
                let odd = Self::load::<Avx512>(chunk, 2 * pair + 1, vector, scale).0;
                let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(odd, even));
                _mm512_permutexvar_epi16(_mm512_load_si512((&raw const ALTERNATE).cast()), both)
            }
        }
    }

    #[repr(C, align(64))]
    struct Order([u16; 32]);

    /// Elements 0, 16, 1, 17 and so on.
    static ALTERNATE: Order = {
        let mut order = [0; 32];
        let mut i = 0;
        while i < 32 {
            order[i] = (i / 2 + i % 2 * 16) as u16;
            i += 1;
        }
        Order(order)
    };

    impl Pairs for WidenBf16<true> {
        const PLAIN: bool = true;
        #[inline(always)]
        unsafe fn pair(chunk: *const u16, pair: usize, vector: usize, (): ()) -> __m512i {
            // SAFETY: the caller's contract.
            unsafe { _mm512_loadu_si512(chunk.add((pair * PANEL + vector * LANES) * 2).cast()) }
        }
    }

    impl Pairs for WidenInt8 {
        #[inline(always)]
        unsafe fn pair(chunk: *const u8, pair: usize, vector: usize, (): ()) -> __m512i {
            // SAFETY: the caller's contract.
            unsafe {
                let even = _mm512_castps_si512(Self::load::<Avx512>(chunk, 2 * pair, vector, ()).0);
                let odd = _mm512_castps_si512(Self::load::<Avx512>(chunk, 2 * pair + 1, vector, ()).0);
                // A whole number of eight bits is a bf16: the low halves are zero.
                _mm512_or_si512(_mm512_srli_epi32::<16>(even), odd)
            }
        }
    }

    impl Pairs for WidenQ8 {}
    impl Pairs for WidenQ4 {}
}
