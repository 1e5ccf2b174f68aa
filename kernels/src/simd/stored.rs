//! The element types of the KV cache as lanes see them.

use super::{LANES, Lanes};
use crate::buffer::Plain;

/// How an f32 value is kept in the cache.
pub(crate) trait Stored: 'static {
    /// Its bits.
    type Bits: Plain + Default;
    /// Neighbouring values in a lane of [`Stored::load_words`].
    const PER_WORD: usize = 1;

    /// # Safety
    /// As the methods of [`Lanes`].
    unsafe fn load<L: Lanes>(from: *const Self::Bits) -> L;

    /// Rounds to nearest even.
    ///
    /// # Safety
    /// As the methods of [`Lanes`].
    unsafe fn store<L: Lanes>(lanes: L, to: *mut Self::Bits);

    /// `16 * PER_WORD` values, as lanes may be moved about before they are widened.
    ///
    /// # Safety
    /// As the methods of [`Lanes`].
    #[inline(always)]
    unsafe fn load_words<L: Lanes>(from: *const Self::Bits) -> L {
        // SAFETY: the caller's contract.
        unsafe { Self::load(from) }
    }

    /// Value `index < PER_WORD` of each lane.
    ///
    /// # Safety
    /// As the methods of [`Lanes`].
    #[inline(always)]
    unsafe fn value<L: Lanes>(words: L, _index: usize) -> L {
        words
    }

    /// As [`Stored::load_words`] of the first `count` values, zero elsewhere.
    ///
    /// # Safety
    /// As the methods of [`Lanes`].
    #[inline(always)]
    unsafe fn load_words_part<L: Lanes>(from: *const Self::Bits, count: usize) -> L {
        // SAFETY: the caller's contract; the copy has as many values as are loaded.
        unsafe {
            let mut bits = [Self::Bits::default(); 2 * LANES];
            std::ptr::copy_nonoverlapping(from, bits.as_mut_ptr(), count);
            Self::load_words(bits.as_ptr())
        }
    }

    /// The first `count <= 16` elements, zero elsewhere.
    ///
    /// # Safety
    /// As the methods of [`Lanes`].
    #[inline(always)]
    unsafe fn load_part<L: Lanes>(from: *const Self::Bits, count: usize) -> L {
        // SAFETY: the caller's contract; the copy has sixteen elements.
        unsafe {
            if count == LANES {
                return Self::load(from);
            }
            let mut bits = [Self::Bits::default(); LANES];
            std::ptr::copy_nonoverlapping(from, bits.as_mut_ptr(), count);
            Self::load(bits.as_ptr())
        }
    }

    /// Stores the first `count <= 16` lanes.
    ///
    /// # Safety
    /// As the methods of [`Lanes`].
    #[inline(always)]
    unsafe fn store_part<L: Lanes>(lanes: L, to: *mut Self::Bits, count: usize) {
        // SAFETY: as above.
        unsafe {
            if count == LANES {
                return Self::store(lanes, to);
            }
            let mut bits = [Self::Bits::default(); LANES];
            Self::store(lanes, bits.as_mut_ptr());
            std::ptr::copy_nonoverlapping(bits.as_ptr(), to, count);
        }
    }
}

/// 32-bit floats.
pub(crate) struct StoredF32;
/// bfloat16.
pub(crate) struct StoredBf16;
/// IEEE half precision.
pub(crate) struct StoredF16;

impl Stored for StoredF32 {
    type Bits = f32;
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const f32) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::load(from) }
    }
    #[inline(always)]
    unsafe fn store<L: Lanes>(lanes: L, to: *mut f32) {
        // SAFETY: the caller's contract.
        unsafe { lanes.store(to) }
    }
}

impl Stored for StoredBf16 {
    type Bits = u16;
    const PER_WORD: usize = 2;
    #[inline(always)]
    unsafe fn load_words<L: Lanes>(from: *const u16) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::load(from.cast()) }
    }
    #[inline(always)]
    unsafe fn value<L: Lanes>(words: L, index: usize) -> L {
        // SAFETY: the caller's contract.
        unsafe { if index == 0 { words.first_bf16() } else { words.second_bf16() } }
    }
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const u16) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::load_bf16(from) }
    }
    #[inline(always)]
    unsafe fn store<L: Lanes>(lanes: L, to: *mut u16) {
        // SAFETY: the caller's contract.
        unsafe { lanes.store_bf16(to) }
    }
}

impl Stored for StoredF16 {
    type Bits = u16;
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const u16) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::load_f16(from) }
    }
    #[inline(always)]
    unsafe fn store<L: Lanes>(lanes: L, to: *mut u16) {
        // SAFETY: the caller's contract.
        unsafe { lanes.store_f16(to) }
    }
}
