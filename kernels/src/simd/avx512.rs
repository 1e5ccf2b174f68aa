use std::arch::x86_64::*;

use super::{Body, LANES, Lanes};

/// One 512-bit register.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(pub(crate) __m512);

/// # Safety
/// The machine has every instruction set named here.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
pub(super) unsafe fn run<B: Body>(body: B) -> B::Output {
    // SAFETY: the instructions are enabled here, and everything below is inlined.
    unsafe { body.run::<Avx512>() }
}

/// As [`run`], for bodies that multiply pairs of bf16 or fours of bytes.
///
/// # Safety
/// As [`run`].
#[target_feature(enable = "avx512bf16,avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
pub(super) unsafe fn run_dots<B: Body>(body: B) -> B::Output {
    // SAFETY: as above.
    unsafe { body.run::<Avx512>() }
}

#[inline(always)]
unsafe fn first(count: usize) -> __mmask16 {
    ((1u32 << count) - 1) as __mmask16
}

// SAFETY (whole block): the trait's contract gives the instructions and valid pointers; loads and stores are unaligned.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Lanes for Avx512 {
    const WHOLE_PANEL: bool = true;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        unsafe { Avx512(_mm512_set1_ps(value)) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { Avx512(_mm512_loadu_ps(from)) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm512_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        unsafe { Avx512(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_bits(from: *const u8, shift: u32, mask: u32) -> Self {
        unsafe {
            let words = _mm512_srlv_epi32(_mm512_loadu_si512(from.cast()), _mm512_set1_epi32(shift as i32));
            Avx512(_mm512_cvtepi32_ps(_mm512_and_si512(words, _mm512_set1_epi32(mask as i32))))
        }
    }
    #[inline(always)]
    unsafe fn first_bf16(self) -> Self {
        unsafe { Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_castps_si512(self.0)))) }
    }
    #[inline(always)]
    unsafe fn second_bf16(self) -> Self {
        unsafe {
            let high = _mm512_set1_epi32(0xffff_0000u32 as i32);
            Avx512(_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(self.0), high)))
        }
    }
    #[inline(always)]
    unsafe fn round_bf16(self) -> Self {
        unsafe {
            let bits = _mm512_castps_si512(self.0);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            // NaN must not be rounded: its payload could carry into the exponent.
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x40_0000));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
            let high = _mm512_set1_epi32(0xffff_0000u32 as i32);
            Avx512(_mm512_castsi512_ps(_mm512_and_si512(_mm512_mask_blend_epi32(nan, rounded, quiet), high)))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        unsafe {
            let high = _mm512_srli_epi32::<16>(_mm512_castps_si512(self.round_bf16().0));
            _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(high));
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        unsafe { _mm256_storeu_si256(to.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0)) }
    }
    #[inline(always)]
    unsafe fn prefetch<T>(at: *const T) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        unsafe { Avx512(_mm512_add_ps(self.0, other.0)) }
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        unsafe { Avx512(_mm512_sub_ps(self.0, other.0)) }
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        unsafe { Avx512(_mm512_mul_ps(self.0, other.0)) }
    }
    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        unsafe { Avx512(_mm512_div_ps(self.0, other.0)) }
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        unsafe { Avx512(_mm512_max_ps(self.0, other.0)) }
    }
    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        unsafe { Avx512(_mm512_min_ps(self.0, other.0)) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
        unsafe { Avx512(_mm512_fmadd_ps(self.0, factor.0, term.0)) }
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        unsafe { Avx512(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0)) }
    }
    #[inline(always)]
    unsafe fn scale(self, exponent: Self) -> Self {
        unsafe { Avx512(_mm512_scalef_ps(self.0, exponent.0)) }
    }
    #[inline(always)]
    unsafe fn keep(self, from: usize, to: usize, other: Self) -> Self {
        unsafe { Avx512(_mm512_mask_blend_ps(first(to) & !first(from), other.0, self.0)) }
    }
    #[inline(always)]
    unsafe fn load_part(from: *const f32, count: usize) -> Self {
        unsafe { Avx512(_mm512_maskz_loadu_ps(first(count), from)) }
    }
    #[inline(always)]
    unsafe fn store_part(self, to: *mut f32, count: usize) {
        unsafe { _mm512_mask_storeu_ps(to, first(count), self.0) }
    }

    #[inline(always)]
    unsafe fn transpose(rows: &mut [Self; LANES]) {
        unsafe {
            let mut a = [_mm512_setzero_pd(); LANES];
            for i in 0..LANES / 2 {
                let (even, odd) = (rows[2 * i].0, rows[2 * i + 1].0);
                a[2 * i] = _mm512_castps_pd(_mm512_unpacklo_ps(even, odd));
                a[2 * i + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(even, odd));
            }
            // b[4 i + c]: column 4 q + c of rows 4 i.. in 128-bit quarter q.
            let mut b = [_mm512_setzero_ps(); LANES];
            for i in 0..LANES / 4 {
                b[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a[4 * i], a[4 * i + 2]));
                b[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a[4 * i], a[4 * i + 2]));
                b[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(a[4 * i + 1], a[4 * i + 3]));
                b[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(a[4 * i + 1], a[4 * i + 3]));
            }
            for c in 0..LANES / 4 {
                let low = _mm512_shuffle_f32x4::<0x88>(b[c], b[4 + c]);
                let high = _mm512_shuffle_f32x4::<0x88>(b[8 + c], b[12 + c]);
                rows[c].0 = _mm512_shuffle_f32x4::<0x88>(low, high);
                rows[8 + c].0 = _mm512_shuffle_f32x4::<0xdd>(low, high);
                let low = _mm512_shuffle_f32x4::<0xdd>(b[c], b[4 + c]);
                let high = _mm512_shuffle_f32x4::<0xdd>(b[8 + c], b[12 + c]);
                rows[4 + c].0 = _mm512_shuffle_f32x4::<0x88>(low, high);
                rows[12 + c].0 = _mm512_shuffle_f32x4::<0xdd>(low, high);
            }
        }
    }
}
