//! Pairs of bf16 activations by pairs of bf16 weights, on matrix tiles.

use super::ahead::Ahead;
use super::amx::{TILE_DEPTH, TILE_ROWS, Tiles};
use super::avx512;
use super::dot::put_bf16;
use super::kind::{Kind, Sums};
use super::{Body, LANES, Lanes};
use crate::form::Form;
use crate::packed::PANEL;

/// Blocks of sixteen rows.
pub(crate) struct Tile;

impl Kind for Tile {
    type Weight = u16;
    type Act = u16;
    const HEAD_LEN: usize = 0;
    const CHUNK_LEN: usize = WEIGHTS;
    const ROWS: usize = 2 * TILE_ROWS;
    const BLOCK: usize = TILE_ROWS;
    type Session = Tiles;

    fn passes(rows: usize) -> usize {
        // Two halves of the panel where rows fill two tiles.
        rows.div_ceil(TILE_ROWS)
    }

    fn dispatch<B: Body>(_: Form, body: B) -> B::Output {
        // SAFETY: the form that chooses this kind was detected.
        unsafe { avx512::run_dots(body) }
    }

    #[inline(always)]
    unsafe fn begin() -> Tiles {
        // SAFETY: the form that chooses this kind was granted tiles.
        unsafe { Tiles::take() }
    }

    #[inline(always)]
    unsafe fn put<L: Lanes>(from: *const f32, count: usize, to: *mut u16) {
        // SAFETY: the caller's contract.
        unsafe { put_bf16(from, count, to) }
    }

    #[inline(always)]
    unsafe fn products<L: Lanes>(
        tiles: &Tiles,
        panel: *const u16,
        acts: *const u16,
        depth: usize,
        rows: usize,
        ahead: &mut Ahead,
        sums: &mut Sums,
    ) {
        let to = sums.0.as_mut_ptr().cast::<f32>();
        // SAFETY: the caller's contract.
        unsafe {
            if rows <= TILE_ROWS {
                return one_by_four::<L>(tiles, panel, acts, depth, ahead, to);
            }
            for half in [0, PANEL / 2] {
                two_by_two::<L>(tiles, panel.add(2 * half), acts, depth, ahead, to.add(half));
            }
        }
    }
}

/// Elements from one pair of inputs to the next in a panel.
const STEP: usize = 2 * PANEL;
/// Elements of one block of activations in one chunk.
const ACTS: usize = TILE_ROWS * TILE_DEPTH;
/// Elements of a panel in one chunk.
const WEIGHTS: usize = TILE_DEPTH * PANEL;
const ROW_BYTES: usize = 2 * STEP;
const ACT_BYTES: usize = 2 * TILE_DEPTH;
const SUM_BYTES: usize = 4 * PANEL;

/// Sixteen rows by a panel.
#[inline(always)]
unsafe fn one_by_four<L: Lanes>(
    tiles: &Tiles,
    panel: *const u16,
    acts: *const u16,
    depth: usize,
    ahead: &mut Ahead,
    sums: *mut f32,
) {
    tiles.zero_sums();
    // SAFETY: the caller's contract.
    unsafe {
        for chunk in 0..depth / TILE_DEPTH {
            chunk_by_four::<L>(tiles, panel.add(chunk * WEIGHTS), acts.add(chunk * ACTS), ahead);
        }
        store_row_of_tiles(tiles, sums);
    }
}

/// Adds a chunk of sixteen rows by a panel.
#[inline(always)]
unsafe fn chunk_by_four<L: Lanes>(tiles: &Tiles, panel: *const u16, acts: *const u16, ahead: &mut Ahead) {
    // SAFETY: the caller's contract.
    unsafe {
        tiles.load::<4, _>(acts, ACT_BYTES);
        ahead.ask::<L, 4>();
        tiles.load::<5, _>(panel, ROW_BYTES);
        tiles.dot::<0, 4, 5>();
        ahead.ask::<L, 4>();
        tiles.load::<6, _>(panel.add(2 * LANES), ROW_BYTES);
        tiles.dot::<1, 4, 6>();
        ahead.ask::<L, 4>();
        tiles.load::<7, _>(panel.add(4 * LANES), ROW_BYTES);
        tiles.dot::<2, 4, 7>();
        ahead.ask::<L, 4>();
        tiles.load::<5, _>(panel.add(6 * LANES), ROW_BYTES);
        tiles.dot::<3, 4, 5>();
    }
}

/// Tiles 0 to 3 side by side.
#[inline(always)]
unsafe fn store_row_of_tiles(tiles: &Tiles, sums: *mut f32) {
    // SAFETY: the caller's contract.
    unsafe {
        tiles.store::<0>(sums, SUM_BYTES);
        tiles.store::<1>(sums.add(LANES), SUM_BYTES);
        tiles.store::<2>(sums.add(2 * LANES), SUM_BYTES);
        tiles.store::<3>(sums.add(3 * LANES), SUM_BYTES);
    }
}

/// Thirty-two rows by half a panel.
#[inline(always)]
unsafe fn two_by_two<L: Lanes>(
    tiles: &Tiles,
    mut panel: *const u16,
    mut acts: *const u16,
    depth: usize,
    ahead: &mut Ahead,
    sums: *mut f32,
) {
    tiles.zero_sums();
    // SAFETY: the caller's contract.
    unsafe {
        for _ in 0..depth / TILE_DEPTH {
            tiles.load::<4, _>(acts, ACT_BYTES);
            tiles.load::<6, _>(panel, ROW_BYTES);
            tiles.dot::<0, 4, 6>();
            ahead.ask::<L, 2>();
            tiles.load::<7, _>(panel.add(2 * LANES), ROW_BYTES);
            tiles.dot::<1, 4, 7>();
            ahead.ask::<L, 2>();
            tiles.load::<5, _>(acts.add(TILE_ROWS * depth), ACT_BYTES);
            tiles.dot::<2, 5, 6>();
            tiles.dot::<3, 5, 7>();
            panel = panel.add(WEIGHTS);
            acts = acts.add(ACTS);
        }
        tiles.store_square(sums, PANEL);
    }
}
