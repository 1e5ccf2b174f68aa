//! Sixteen f32 lanes in three forms, so that each kernel is written once; and the ways to multiply by packed weights.
//!
//! A kernel's body is a [`Body`], generic over [`Lanes`]; [`dispatch`] runs it inside a function compiled for the
//! form's instructions. Everything below a body is `#[inline(always)]` and free of closures: a function that is not
//! inlined into the dispatching one would be compiled for the baseline machine.

pub(crate) mod ahead;
#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "x86_64")]
pub(crate) mod dot;
pub(crate) mod fused;
pub(crate) mod kind;
pub(crate) mod math;
mod portable;
#[cfg(target_arch = "x86_64")]
pub(crate) mod quads;
pub(crate) mod stored;
#[cfg(target_arch = "x86_64")]
pub(crate) mod tile;
pub(crate) mod widen;

use crate::form::Form;

/// Lanes of a vector, in every form.
pub(crate) const LANES: usize = 16;

/// Sixteen f32 values.
///
/// # Safety
/// Every method may be called only where the form's instructions are available; pointers must be valid for the
/// sixteen (or `count`) elements they stand for, at any alignment.
pub(crate) trait Lanes: Copy {
    /// Whether a tile of several rows may hold a whole panel of outputs in registers.
    const WHOLE_PANEL: bool;

    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn load_bf16(from: *const u16) -> Self;
    unsafe fn load_f16(from: *const u16) -> Self;
    /// Of each of sixteen words of four bytes, the bits of `mask` after a shift to the right, as a whole number.
    unsafe fn load_bits(from: *const u8, shift: u32, mask: u32) -> Self;
    /// The first of the two bf16 values whose bits are in each lane.
    unsafe fn first_bf16(self) -> Self;
    /// The second of the two.
    unsafe fn second_bf16(self) -> Self;
    /// The nearest bf16 values, ties to even.
    unsafe fn round_bf16(self) -> Self;
    /// Rounds to nearest even.
    unsafe fn store_bf16(self, to: *mut u16);
    /// Rounds to nearest even.
    unsafe fn store_f16(self, to: *mut u16);

    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    /// The larger lane; `other` where either is NaN.
    unsafe fn max(self, other: Self) -> Self;
    /// The smaller lane; `other` where either is NaN.
    unsafe fn min(self, other: Self) -> Self;
    /// `self * factor + term`; rounded once where the form has the instruction.
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self;
    unsafe fn round(self) -> Self;
    /// `self * 2^exponent` for whole exponents in -126..=127.
    unsafe fn scale(self, exponent: Self) -> Self;
    /// `self` in lanes `from..to`, `other` elsewhere.
    unsafe fn keep(self, from: usize, to: usize, other: Self) -> Self;

    /// Asks for the cache line at an address, which need not be valid.
    #[inline(always)]
    unsafe fn prefetch<T>(_at: *const T) {}

    /// The first `count <= 16` elements, zero elsewhere.
    #[inline(always)]
    unsafe fn load_part(from: *const f32, count: usize) -> Self {
        let mut lanes = [0.0; LANES];
        // SAFETY: the caller's contract.
        unsafe {
            std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), count);
            Self::load(lanes.as_ptr())
        }
    }

    /// Stores the first `count <= 16` lanes.
    #[inline(always)]
    unsafe fn store_part(self, to: *mut f32, count: usize) {
        // SAFETY: the caller's contract.
        unsafe { std::ptr::copy_nonoverlapping(self.to_array().as_ptr(), to, count) }
    }

    #[inline(always)]
    unsafe fn to_array(self) -> [f32; LANES] {
        let mut lanes = [0.0; LANES];
        // SAFETY: the array has sixteen elements.
        unsafe { self.store(lanes.as_mut_ptr()) };
        lanes
    }

    /// The sum of all lanes, always in the same order: halves are added to each other.
    #[inline(always)]
    unsafe fn reduce_add(self) -> f32 {
        // SAFETY: the caller's contract.
        let mut lanes = unsafe { self.to_array() };
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
            half /= 2;
        }
        lanes[0]
    }

    #[inline(always)]
    unsafe fn reduce_max(self) -> f32 {
        // SAFETY: the caller's contract.
        let mut lanes = unsafe { self.to_array() };
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                lanes[i] = if lanes[i] > lanes[i + half] { lanes[i] } else { lanes[i + half] };
            }
            half /= 2;
        }
        lanes[0]
    }

    /// Lane `j` of vector `i` goes to lane `i` of vector `j`.
    #[inline(always)]
    unsafe fn transpose(rows: &mut [Self; LANES]) {
        let mut from = [[0.0f32; LANES]; LANES];
        for i in 0..LANES {
            // SAFETY: each row has sixteen elements.
            unsafe { rows[i].store(from[i].as_mut_ptr()) };
        }
        for i in 0..LANES {
            let mut column = [0.0f32; LANES];
            for j in 0..LANES {
                column[j] = from[j][i];
            }
            // SAFETY: as above.
            rows[i] = unsafe { Self::load(column.as_ptr()) };
        }
    }
}

/// The body of a kernel, written once for all forms.
pub(crate) trait Body {
    /// What it computes.
    type Output;

    /// # Safety
    /// Only [`dispatch`] calls it, where the instructions of `L` are available.
    unsafe fn run<L: Lanes>(self) -> Self::Output;
}

/// Runs a body in a form; a form this machine lacks runs as the portable one.
#[inline]
pub(crate) fn dispatch<B: Body>(form: Form, body: B) -> B::Output {
    match form {
        // SAFETY: the form's instructions were detected; the wider forms have those of the narrower.
        #[cfg(target_arch = "x86_64")]
        Form::Amx | Form::Avx512Bf16 | Form::Avx512 if form.is_supported() => unsafe { avx512::run(body) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Form::Avx2 if form.is_supported() => unsafe { avx2::run(body) },
        // SAFETY: the portable form needs no instruction beyond the baseline.
        _ => unsafe { body.run::<portable::Portable>() },
    }
}
