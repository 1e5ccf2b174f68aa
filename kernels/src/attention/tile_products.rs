//! Products of small matrices that lie in matrix tiles one after the other, summed in f32.

use crate::simd::LANES;
use crate::simd::amx::{TILE_DEPTH, TILE_ROWS, Tiles};

/// Elements of a matrix tile.
pub(super) const ELEMENTS: usize = TILE_ROWS * TILE_DEPTH;

/// Bytes of a matrix tile's row.
const ROW_BYTES: usize = 2 * TILE_DEPTH;

/// `c = sum of a b over the terms`, or `c += ..` where `ADD`: two by two matrix tiles, summed over `steps` neighbouring
/// ones.
///
/// # Safety
/// Every `a` and `b` has `steps` matrix tiles, `c` the rows of four, `stride` elements apart.
#[inline(always)]
pub(super) unsafe fn two_by_two<const ADD: bool, const TERMS: usize>(
    tiles: &Tiles,
    terms: [([*const u16; 2], [*const u16; 2]); TERMS],
    steps: usize,
    c: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller's contract.
    unsafe {
        if ADD {
            let below = c.add(TILE_ROWS * stride);
            tiles.load::<0, _>(c, 4 * stride);
            tiles.load::<1, _>(c.add(LANES), 4 * stride);
            tiles.load::<2, _>(below, 4 * stride);
            tiles.load::<3, _>(below.add(LANES), 4 * stride);
        } else {
            tiles.zero_sums();
        }
        for step in 0..steps {
            let at = step * ELEMENTS;
            for (a, b) in terms {
                tiles.load::<4, _>(a[0].add(at), ROW_BYTES);
                tiles.load::<6, _>(b[0].add(at), ROW_BYTES);
                tiles.dot::<0, 4, 6>();
                tiles.load::<7, _>(b[1].add(at), ROW_BYTES);
                tiles.dot::<1, 4, 7>();
                tiles.load::<5, _>(a[1].add(at), ROW_BYTES);
                tiles.dot::<2, 5, 6>();
                tiles.dot::<3, 5, 7>();
            }
        }
        tiles.store_square(c, stride);
    }
}

/// As [`two_by_two`] for one by two matrix tiles, always adding.
#[inline(always)]
pub(super) unsafe fn one_by_two<const TERMS: usize>(
    tiles: &Tiles,
    terms: [(*const u16, [*const u16; 2]); TERMS],
    steps: usize,
    c: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller's contract.
    unsafe {
        tiles.load::<0, _>(c, 4 * stride);
        tiles.load::<1, _>(c.add(LANES), 4 * stride);
        for step in 0..steps {
            let at = step * ELEMENTS;
            for (a, b) in terms {
                tiles.load::<4, _>(a.add(at), ROW_BYTES);
                tiles.load::<6, _>(b[0].add(at), ROW_BYTES);
                tiles.dot::<0, 4, 6>();
                tiles.load::<7, _>(b[1].add(at), ROW_BYTES);
                tiles.dot::<1, 4, 7>();
            }
        }
        tiles.store::<0>(c, 4 * stride);
        tiles.store::<1>(c.add(LANES), 4 * stride);
    }
}

/// As [`two_by_two`] for four by one matrix tiles and two terms of one `a`, never adding; the rows of `a` are `next`
/// elements apart.
#[inline(always)]
pub(super) unsafe fn four_by_one(
    tiles: &Tiles,
    a: *const u16,
    next: usize,
    halves: [*const u16; 2],
    steps: usize,
    c: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller's contract.
    unsafe {
        tiles.zero_sums();
        for step in 0..steps {
            let at = step * ELEMENTS;
            for b in halves {
                tiles.load::<4, _>(b.add(at), ROW_BYTES);
                tiles.load::<5, _>(a.add(at), ROW_BYTES);
                tiles.dot::<0, 5, 4>();
                tiles.load::<6, _>(a.add(next + at), ROW_BYTES);
                tiles.dot::<1, 6, 4>();
                tiles.load::<7, _>(a.add(2 * next + at), ROW_BYTES);
                tiles.dot::<2, 7, 4>();
                tiles.load::<5, _>(a.add(3 * next + at), ROW_BYTES);
                tiles.dot::<3, 5, 4>();
            }
        }
        let rows = TILE_ROWS * stride;
        tiles.store::<0>(c, 4 * stride);
        tiles.store::<1>(c.add(rows), 4 * stride);
        tiles.store::<2>(c.add(2 * rows), 4 * stride);
        tiles.store::<3>(c.add(3 * rows), 4 * stride);
    }
}
