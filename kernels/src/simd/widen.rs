//! How the weights of a format lie in a panel and come to be f32.

use super::{LANES, Lanes};
use crate::buffer::Plain;
use crate::format::WeightFormat;
use crate::packed::{CENTRE, CHUNK, PANEL, PackedShape};

/// The weights of one format.
pub(crate) trait Widen: 'static {
    /// An element of a panel.
    type Weight: Plain;
    /// What is done to activations.
    const ROUNDING: Rounding = Rounding::None;
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

/// What is done to activations before a product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rounding {
    None,
    /// Rounded to bf16.
    Bf16,
    /// Rounded to whole numbers of -127 to 127, under one scale for every chunk.
    Bytes,
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
    const ROUNDING: Rounding = if ROUNDS { Rounding::Bf16 } else { Rounding::None };
    type Scale<L: Lanes> = ();
    #[inline(always)]
    unsafe fn scale<L: Lanes>(_: *const u16, _: usize) {}
    #[inline(always)]
    unsafe fn load<L: Lanes>(chunk: *const u16, input: usize, vector: usize, (): ()) -> L {
        // SAFETY: the caller's contract.
        unsafe {
            let pairs = L::load(chunk.add((input / 2 * PANEL + vector * LANES) * 2).cast());
            if input.is_multiple_of(2) { pairs.first_bf16() } else { pairs.second_bf16() }
        }
    }
}

/// Codes of a byte as they are stored, with [`CENTRE`] added.
///
/// # Safety
/// As [`Widen::load`].
#[inline(always)]
unsafe fn load_byte<L: Lanes>(codes: *const u8, input: usize, vector: usize) -> L {
    // SAFETY: the caller's contract.
    unsafe {
        L::load_bits(codes.add(PackedShape::code_position(vector * LANES, input / 4 * 4)), 8 * (input % 4) as u32, 0xff)
    }
}

impl Widen for WidenInt8 {
    type Weight = u8;
    const ROUNDING: Rounding = Rounding::Bytes;
    const HEAD_LEN: usize = WeightFormat::Int8.head_bytes();
    type Scale<L: Lanes> = ();
    #[inline(always)]
    unsafe fn scale<L: Lanes>(_: *const u8, _: usize) {}
    #[inline(always)]
    unsafe fn load<L: Lanes>(chunk: *const u8, input: usize, vector: usize, (): ()) -> L {
        // SAFETY: the caller's contract.
        unsafe { load_byte::<L>(chunk, input, vector).sub(L::splat(f32::from(CENTRE))) }
    }
    #[inline(always)]
    unsafe fn finish<L: Lanes>(head: *const u8, vector: usize, sums: L) -> L {
        // SAFETY: the caller's contract.
        unsafe { sums.mul(L::load(head.cast::<f32>().add(vector * LANES))) }
    }
}

impl Widen for WidenQ8 {
    type Weight = u8;
    const ROUNDING: Rounding = Rounding::Bytes;
    const CHUNK_LEN: usize = WeightFormat::Q8_0.chunk_bytes();
    type Scale<L: Lanes> = L;
    #[inline(always)]
    unsafe fn scale<L: Lanes>(chunk: *const u8, vector: usize) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::load_f16(chunk.cast::<u16>().add(vector * LANES)) }
    }
    #[inline(always)]
    unsafe fn load<L: Lanes>(chunk: *const u8, input: usize, vector: usize, scale: L) -> L {
        // SAFETY: the caller's contract.
        unsafe {
            let codes = chunk.add(WeightFormat::Q8_0.scale_bytes());
            load_byte::<L>(codes, input, vector).sub(L::splat(f32::from(CENTRE))).mul(scale)
        }
    }
}

impl Widen for WidenQ4 {
    type Weight = u8;
    const ROUNDING: Rounding = Rounding::Bytes;
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
        // SAFETY: the caller's contract.
        unsafe {
            let from = chunk
                .add(WeightFormat::Q4K.scale_bytes())
                .add(PackedShape::code_position(vector * LANES, input % HALF / 4 * 4));
            let shift = 8 * (input % 4) + if input < HALF { 0 } else { 4 };
            L::load_bits(from, shift as u32, 0xf).mul_add(scale, addition)
        }
    }
}
