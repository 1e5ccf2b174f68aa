//! The product of a few rows with one panel of 64 outputs by fused multiply-adds in f32.
//!
//! Each output lane is summed over the inputs in order, whatever the number of rows, so all shapes give the same bits.

use super::ahead::Ahead;
use super::widen::Widen;
use super::{LANES, Lanes};
use crate::packed::{CHUNK, PANEL};

/// Rows of the tallest block: as many as leave the sums in registers.
pub(crate) const FUSED_ROWS: usize = 6;

/// Vectors of a panel.
const VECTORS: usize = PANEL / LANES;

/// Adds to `sums` (`rows.len() <= FUSED_ROWS` rows of `[64]`, `stride` elements apart) the products of each row's
/// first `depth` activations with the chunks.
///
/// # Safety
/// As the methods of [`Lanes`]; the chunks hold the weights of `depth` inputs, every row `depth` activations. Only chunks
/// of one weight an input may end before they are whole.
#[inline(always)]
pub(crate) unsafe fn add_products<L: Lanes, W: Widen>(
    chunks: *const W::Weight,
    rows: &[*const f32],
    depth: usize,
    ahead: &mut Ahead,
    sums: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller's contract.
    unsafe {
        match rows.len() {
            0 => {}
            1 => block::<L, W, 1, VECTORS>(0, chunks, rows.as_ptr(), depth, ahead, sums, stride),
            count if L::WHOLE_PANEL => match count {
                2 => block::<L, W, 2, VECTORS>(0, chunks, rows.as_ptr(), depth, ahead, sums, stride),
                3 => block::<L, W, 3, VECTORS>(0, chunks, rows.as_ptr(), depth, ahead, sums, stride),
                4 => block::<L, W, 4, VECTORS>(0, chunks, rows.as_ptr(), depth, ahead, sums, stride),
                5 => block::<L, W, 5, VECTORS>(0, chunks, rows.as_ptr(), depth, ahead, sums, stride),
                _ => block::<L, W, 6, VECTORS>(0, chunks, rows.as_ptr(), depth, ahead, sums, stride),
            },
            2 => {
                block::<L, W, 2, 2>(0, chunks, rows.as_ptr(), depth, ahead, sums, stride);
                block::<L, W, 2, 2>(2, chunks, rows.as_ptr(), depth, ahead, sums, stride);
            }
            count => {
                for vector in 0..VECTORS {
                    match count {
                        3 => block::<L, W, 3, 1>(vector, chunks, rows.as_ptr(), depth, ahead, sums, stride),
                        4 => block::<L, W, 4, 1>(vector, chunks, rows.as_ptr(), depth, ahead, sums, stride),
                        5 => block::<L, W, 5, 1>(vector, chunks, rows.as_ptr(), depth, ahead, sums, stride),
                        _ => block::<L, W, 6, 1>(vector, chunks, rows.as_ptr(), depth, ahead, sums, stride),
                    }
                }
            }
        }
    }
}

/// `M` rows by `V` vectors of outputs from `first` on, held in registers over the whole depth.
#[inline(always)]
unsafe fn block<L: Lanes, W: Widen, const M: usize, const V: usize>(
    first: usize,
    mut chunk: *const W::Weight,
    rows: *const *const f32,
    depth: usize,
    ahead: &mut Ahead,
    out: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller's contract; `rows` has `M` elements.
    unsafe {
        let rows = *rows.cast::<[*const f32; M]>();
        let out = out.add(first * LANES);
        let mut sums = [[L::splat(0.0); V]; M];
        for (m, sums) in sums.iter_mut().enumerate() {
            for (v, sum) in sums.iter_mut().enumerate() {
                *sum = L::load(out.add(m * stride + v * LANES));
            }
        }
        let mut at = 0;
        while at < depth {
            let count = (depth - at).min(CHUNK);
            let mut scales = [W::scale::<L>(chunk, first); V];
            for (v, scale) in scales.iter_mut().enumerate() {
                *scale = W::scale::<L>(chunk, first + v);
            }
            let mut pair = 0;
            while pair < count {
                // Many rows take longer than their weights, which the processor then fetches in time by itself.
                if M < FUSED_ROWS && pair % (CHUNK / 4) == 0 {
                    ahead.ask::<L, 4>();
                }
                // Neighbouring inputs may lie in one register; their weights are never in registers together.
                for input in pair..pair + 2 {
                    if input < count {
                        let mut w = [L::splat(0.0); V];
                        for (v, w) in w.iter_mut().enumerate() {
                            *w = W::load::<L>(chunk, input, first + v, scales[v]);
                        }
                        for (row, sums) in rows.iter().zip(&mut sums) {
                            let act = L::splat(*row.add(at + input));
                            for (sum, w) in sums.iter_mut().zip(w) {
                                *sum = w.mul_add(act, *sum);
                            }
                        }
                    }
                }
                pair += 2;
            }
            chunk = chunk.add(W::CHUNK_LEN);
            at += CHUNK;
        }
        for (m, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                sum.store(out.add(m * stride + v * LANES));
            }
        }
    }
}
