use std::arch::x86_64::*;

use super::{Body, Lanes};

/// Two 256-bit registers: lanes 0..8 and 8..16.
#[derive(Clone, Copy)]
pub(super) struct Avx2(__m256, __m256);

/// # Safety
/// The machine has every instruction set named here.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run<B: Body>(body: B) -> B::Output {
    // SAFETY: the instructions are enabled here, and everything below is inlined.
    unsafe { body.run::<Avx2>() }
}

/// Rounds eight lanes to bf16, nearest even, in the high half of each; NaN stays a quiet NaN.
#[inline(always)]
unsafe fn round8(value: __m256) -> __m256i {
    // SAFETY: the caller's contract.
    unsafe {
        let bits = _mm256_castps_si256(value);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(value, value));
        let high = _mm256_set1_epi32(0xffff_0000u32 as i32);
        _mm256_and_si256(_mm256_blendv_epi8(rounded, quiet, nan), high)
    }
}

#[inline(always)]
unsafe fn widen_bf16(from: *const u16) -> __m256 {
    // SAFETY: the caller's contract.
    unsafe {
        let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
    }
}

#[inline(always)]
unsafe fn pow2(exponent: __m256) -> __m256 {
    // SAFETY: the caller's contract.
    unsafe {
        let biased = _mm256_add_epi32(_mm256_cvtps_epi32(exponent), _mm256_set1_epi32(127));
        _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
    }
}

#[inline(always)]
unsafe fn keep8(base: i32, from: usize, to: usize, yes: __m256, no: __m256) -> __m256 {
    // SAFETY: the caller's contract.
    unsafe {
        let lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(base));
        let above = _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(from as i32 - 1));
        let below = _mm256_cmpgt_epi32(_mm256_set1_epi32(to as i32), lane);
        _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(_mm256_and_si256(above, below)))
    }
}

// SAFETY (whole block): the trait's contract gives the instructions and valid pointers; loads and stores are unaligned.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Lanes for Avx2 {
    const WHOLE_PANEL: bool = false;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        unsafe { Avx2(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { Avx2(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe {
            _mm256_storeu_ps(to, self.0);
            _mm256_storeu_ps(to.add(8), self.1);
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        unsafe { Avx2(widen_bf16(from), widen_bf16(from.add(8))) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        unsafe {
            let (low, high) = (_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(8).cast()));
            Avx2(_mm256_cvtph_ps(low), _mm256_cvtph_ps(high))
        }
    }
    #[inline(always)]
    unsafe fn load_bits(from: *const u8, shift: u32, mask: u32) -> Self {
        unsafe {
            let (shift, mask) = (_mm256_set1_epi32(shift as i32), _mm256_set1_epi32(mask as i32));
            let low = _mm256_srlv_epi32(_mm256_loadu_si256(from.cast()), shift);
            let high = _mm256_srlv_epi32(_mm256_loadu_si256(from.add(32).cast()), shift);
            Avx2(_mm256_cvtepi32_ps(_mm256_and_si256(low, mask)), _mm256_cvtepi32_ps(_mm256_and_si256(high, mask)))
        }
    }
    #[inline(always)]
    unsafe fn first_bf16(self) -> Self {
        unsafe {
            let (low, high) = (_mm256_castps_si256(self.0), _mm256_castps_si256(self.1));
            Avx2(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)))
        }
    }
    #[inline(always)]
    unsafe fn second_bf16(self) -> Self {
        unsafe {
            let mask = _mm256_castsi256_ps(_mm256_set1_epi32(0xffff_0000u32 as i32));
            Avx2(_mm256_and_ps(self.0, mask), _mm256_and_ps(self.1, mask))
        }
    }
    #[inline(always)]
    unsafe fn round_bf16(self) -> Self {
        unsafe { Avx2(_mm256_castsi256_ps(round8(self.0)), _mm256_castsi256_ps(round8(self.1))) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        unsafe {
            // Packing works in 128-bit halves; the permutation puts the quarters back in order.
            let packed =
                _mm256_packus_epi32(_mm256_srli_epi32::<16>(round8(self.0)), _mm256_srli_epi32::<16>(round8(self.1)));
            _mm256_storeu_si256(to.cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(packed));
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        unsafe {
            _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0));
            _mm_storeu_si128(to.add(8).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.1));
        }
    }
    #[inline(always)]
    unsafe fn prefetch<T>(at: *const T) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        unsafe { Avx2(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        unsafe { Avx2(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1)) }
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        unsafe { Avx2(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)) }
    }
    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        unsafe { Avx2(_mm256_div_ps(self.0, other.0), _mm256_div_ps(self.1, other.1)) }
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        unsafe { Avx2(_mm256_max_ps(self.0, other.0), _mm256_max_ps(self.1, other.1)) }
    }
    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        unsafe { Avx2(_mm256_min_ps(self.0, other.0), _mm256_min_ps(self.1, other.1)) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
        unsafe { Avx2(_mm256_fmadd_ps(self.0, factor.0, term.0), _mm256_fmadd_ps(self.1, factor.1, term.1)) }
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        unsafe {
            const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            Avx2(_mm256_round_ps::<NEAREST>(self.0), _mm256_round_ps::<NEAREST>(self.1))
        }
    }
    #[inline(always)]
    unsafe fn scale(self, exponent: Self) -> Self {
        unsafe { self.mul(Avx2(pow2(exponent.0), pow2(exponent.1))) }
    }
    #[inline(always)]
    unsafe fn keep(self, from: usize, to: usize, other: Self) -> Self {
        unsafe { Avx2(keep8(0, from, to, self.0, other.0), keep8(8, from, to, self.1, other.1)) }
    }
}
