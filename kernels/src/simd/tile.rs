//! Pairs of bf16 activations by pairs of bf16 weights, on matrix tiles.

use std::arch::x86_64::*;
use std::cell::{Cell, RefCell};
use std::marker::PhantomData;

use super::ahead::Ahead;
use super::amx::{TILE_DEPTH, TILE_ROWS, Tiles};
use super::avx512;
use super::dot::{put_bf16, scales};
use super::kind::{Kind, Sums, finish};
use super::widen::{Pairs, WidenBf16};
use super::{Body, LANES, Lanes};
use crate::form::Form;
use crate::packed::PANEL;
use crate::scratch::Scratch;

/// Blocks of sixteen rows.
pub(crate) struct Tile<W>(PhantomData<W>);

/// bf16 weights as they are.
pub(crate) type TileBf16 = Tile<WidenBf16<true>>;

/// The tiles, and the panels that were widened to bf16 while they were taken.
pub(crate) struct Session {
    tiles: Tiles,
    wide: RefCell<Wide>,
}

impl<W: Pairs> Kind for Tile<W> {
    type Weight = W::Weight;
    type Act = u16;
    const HEAD_LEN: usize = W::HEAD_LEN;
    const CHUNK_LEN: usize = W::CHUNK_LEN;
    const ROWS: usize = 2 * TILE_ROWS;
    const BLOCK: usize = TILE_ROWS;
    type Session = Session;

    fn passes(rows: usize) -> usize {
        // Two halves of the panel where rows fill two tiles.
        rows.div_ceil(TILE_ROWS)
    }

    fn dispatch<B: Body>(_: Form, body: B) -> B::Output {
        // SAFETY: the form that chooses this kind was detected.
        unsafe { avx512::run_bf16(body) }
    }

    #[inline(always)]
    unsafe fn begin() -> Session {
        let wide = RefCell::new(if W::PLAIN { Wide::default() } else { Wide::take() });
        // SAFETY: the form that chooses this kind was granted tiles.
        Session { tiles: unsafe { Tiles::take() }, wide }
    }

    #[inline(always)]
    unsafe fn put<L: Lanes>(from: *const f32, count: usize, to: *mut u16) {
        // SAFETY: the caller's contract.
        unsafe { put_bf16(from, count, to) }
    }

    #[inline(always)]
    unsafe fn products<L: Lanes>(
        session: &Session,
        panel: *const W::Weight,
        acts: *const u16,
        depth: usize,
        rows: usize,
        ahead: &mut Ahead,
        sums: &mut Sums,
    ) {
        let tiles = &session.tiles;
        let to = sums.0.as_mut_ptr().cast::<f32>();
        // SAFETY: the caller's contract.
        unsafe {
            let weights = if W::PLAIN {
                panel.cast()
            } else {
                let mut wide = session.wide.borrow_mut();
                match wide.find::<L, W>(panel, depth, rows, ahead) {
                    Some(weights) => weights,
                    None => {
                        one_by_four_in_chunks::<L, W>(tiles, panel, wide.chunks(), acts, depth, ahead, to);
                        return finish::<L, W>(panel, &mut sums.0[..rows]);
                    }
                }
            };
            if rows <= TILE_ROWS {
                one_by_four::<L>(tiles, weights, acts, depth, ahead, to);
            } else {
                for half in [0, PANEL / 2] {
                    two_by_two::<L>(tiles, weights.add(2 * half), acts, depth, ahead, to.add(half));
                }
            }
            finish::<L, W>(panel, &mut sums.0[..rows]);
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

thread_local! {
    static SCRATCH: Cell<Scratch> = const { Cell::new(Scratch::new()) };
}

/// Room for weights as pairs of bf16: two chunks, then two whole panels.
///
/// A block of rows that nobody follows widens chunk by chunk, in the first-level cache. More rows widen their panels
/// once; two of them, as gate and up take turns.
#[derive(Default)]
struct Wide {
    scratch: Scratch,
    /// Addresses of the panels that are there.
    panels: [usize; 2],
    /// Where the next one goes.
    next: usize,
}

impl Wide {
    fn take() -> Wide {
        Wide { scratch: SCRATCH.take(), ..Wide::default() }
    }

    fn chunks(&mut self) -> *mut u16 {
        self.scratch.take::<u16>(2 * WEIGHTS).as_mut_ptr()
    }

    /// The panel as bf16, widened now if these are more rows than a tile has; none if it should be widened by chunks.
    ///
    /// # Safety
    /// As [`Kind::products`].
    #[inline(always)]
    unsafe fn find<L: Lanes, W: Pairs>(
        &mut self,
        panel: *const W::Weight,
        depth: usize,
        rows: usize,
        ahead: &mut Ahead,
    ) -> Option<*const u16> {
        let found = self.panels.iter().position(|&there| there == panel.addr());
        if found.is_none() && rows <= TILE_ROWS {
            return None;
        }
        let slot = found.unwrap_or(self.next);
        let room = self.scratch.take::<u16>(2 * WEIGHTS + 2 * depth * PANEL);
        let to = room[2 * WEIGHTS + slot * depth * PANEL..].as_mut_ptr();
        if found.is_none() {
            for chunk in 0..depth / TILE_DEPTH {
                // SAFETY: the caller's contract; the panel has its room.
                unsafe { widen_chunk::<L, W>(panel, chunk, to.add(chunk * WEIGHTS), ahead) };
            }
            self.panels[slot] = panel.addr();
            self.next = 1 - slot;
        }
        Some(to)
    }
}

impl Drop for Wide {
    #[inline(always)]
    fn drop(&mut self) {
        if !self.scratch.is_empty() {
            SCRATCH.set(std::mem::take(&mut self.scratch));
        }
    }
}

/// A chunk of a panel as pairs of bf16.
///
/// # Safety
/// As [`Kind::products`]; `to` has room for a chunk.
#[inline(always)]
unsafe fn widen_chunk<L: Lanes, W: Pairs>(panel: *const W::Weight, chunk: usize, to: *mut u16, ahead: &mut Ahead) {
    // SAFETY: the caller's contract.
    unsafe {
        let chunk = panel.add(W::HEAD_LEN + chunk * W::CHUNK_LEN);
        let scales = scales::<W>(chunk);
        for pair in 0..TILE_DEPTH / 2 {
            if pair % 4 == 0 {
                ahead.ask::<L, 4>();
            }
            for (v, &scale) in scales.iter().enumerate() {
                let to = to.add(pair * STEP + v * 2 * LANES);
                _mm512_storeu_si512(to.cast(), W::pair(chunk, pair, v, scale));
            }
        }
    }
}

/// Sixteen rows by a panel that is widened on the way.
#[inline(always)]
unsafe fn one_by_four_in_chunks<L: Lanes, W: Pairs>(
    tiles: &Tiles,
    panel: *const W::Weight,
    room: *mut u16,
    acts: *const u16,
    depth: usize,
    ahead: &mut Ahead,
    sums: *mut f32,
) {
    tiles.zero_sums();
    let chunks = depth / TILE_DEPTH;
    // SAFETY: the caller's contract; `room` has two chunks.
    unsafe {
        widen_chunk::<L, W>(panel, 0, room, ahead);
        for chunk in 0..chunks {
            // One chunk ahead: a tile would wait for what was stored just now.
            if chunk + 1 < chunks {
                widen_chunk::<L, W>(panel, chunk + 1, room.add((chunk + 1) % 2 * WEIGHTS), ahead);
            }
            let weights = room.add(chunk % 2 * WEIGHTS);
            chunk_by_four::<L>(tiles, weights, acts.add(chunk * ACTS), &mut Ahead::nothing());
        }
        store_row_of_tiles(tiles, sums);
    }
}

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
