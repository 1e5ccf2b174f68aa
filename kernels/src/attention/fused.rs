//! Attention in f32, over tiles of 64 absolute key positions, with a running maximum.
//!
//! What happens to a query depends on its position, its window and the keys alone: tiles start at multiples of 64
//! whatever the chunk, the block size or the other rows; a score is summed over the head in order; the weights of a
//! tile are summed by lane (`position % 16`), the values in order of position. Many rows share a tile that is turned and
//! widened once; a single row reads the cache as it lies.

use std::cell::RefCell;
use std::ops::Range;

use super::AttentionCall;
use super::piece::{Piece, TILE, in_pieces};
use super::running::Running;
use super::stream::{QUERIES, Tile, stream};
use crate::form::Form;
use crate::packed::PANEL;
use crate::simd::ahead::Ahead;
use crate::simd::fused::{FUSED_ROWS, add_products};
use crate::simd::stored::{Stored, StoredBf16, StoredF16, StoredF32};
use crate::simd::widen::WidenF32;
use crate::simd::{Body, LANES, Lanes, dispatch};
use crate::weights::WeightDtype;

/// Queries of a task, about: their sums stay in the cache beside a tile of keys.
const TASK_QUERIES: usize = 96;

const CACHE_LINE: usize = 64;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::default());
}

/// The attention of checked operands.
pub(super) fn attend(form: Form, call: &AttentionCall<'_>, q: &[f32], out: &mut [f32]) {
    match call.kv.dtype {
        WeightDtype::F32 => stored::<StoredF32>(form, call, q, out),
        WeightDtype::BF16 => stored::<StoredBf16>(form, call, q, out),
        WeightDtype::F16 => stored::<StoredF16>(form, call, q, out),
    }
}

fn stored<S: Stored>(form: Form, call: &AttentionCall<'_>, q: &[f32], out: &mut [f32]) {
    in_pieces(call, q, out, TASK_QUERIES, |piece| {
        SCRATCH.with_borrow_mut(|scratch| dispatch(form, Task::<S> { piece, scratch }));
    });
}

/// The buffers of one thread, kept from call to call.
#[derive(Default)]
struct Scratch {
    /// `[head_dim, 64 keys]`
    keys: Vec<f32>,
    /// `[panels(head_dim), 64 keys, 64]`
    values: Vec<f32>,
    running: Running,
}

impl Scratch {
    fn prepare(&mut self, queries: usize, head_dim: usize) {
        let width = head_dim.next_multiple_of(PANEL);
        // Key and value lanes beyond the head or the sequence may hold anything finite or not: they are never mixed
        // with a lane that counts.
        self.keys.resize(head_dim * TILE, 0.0);
        self.values.resize(width * TILE, 0.0);
        self.running.prepare(queries, width);
    }
}

struct Task<'a, S: Stored> {
    piece: Piece<'a, S::Bits>,
    scratch: &'a mut Scratch,
}

impl<S: Stored> Body for Task<'_, S> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(mut self) {
        let head_dim = self.piece.shape.head_dim;
        let queries = self.piece.queries();
        self.scratch.prepare(queries, head_dim);
        let end = self.piece.end();
        let mut tile = self.piece.first_tile();
        let mut starts = self.piece.keys.starts(tile, end);
        while tile < end {
            let next = self.piece.keys.starts(tile + TILE, end);
            // SAFETY: the form's instructions are available here.
            unsafe {
                if self.piece.rows.len() == 1 {
                    self.stream_tile::<L>(tile, &starts, &next);
                } else {
                    self.load_tile::<L>(end - tile, &starts, &next);
                    let mut query = 0;
                    while query < queries {
                        let count = (queries - query).min(FUSED_ROWS);
                        self.attend_tile::<L>(tile, query..query + count);
                        query += count;
                    }
                }
            }
            starts = next;
            tile += TILE;
        }
        for query in 0..queries {
            // SAFETY: this task alone writes this head of this row.
            let out = unsafe { self.piece.out.slice(self.piece.start(query), head_dim) };
            // SAFETY: the form's instructions are available here; the sums have `head_dim` elements.
            unsafe {
                let total = L::splat(L::load(self.scratch.running.total[query * LANES..].as_ptr()).reduce_add());
                let sums = self.scratch.running.sums[query * head_dim.next_multiple_of(PANEL)..].as_ptr();
                let mut at = 0;
                while at < head_dim {
                    let count = (head_dim - at).min(LANES);
                    L::load_part(sums.add(at), count).div(total).store_part(out.as_mut_ptr().add(at), count);
                    at += LANES;
                }
            }
        }
    }
}

impl<S: Stored> Task<'_, S> {
    /// Scores, weights and weighted values of one row over one tile, without a copy of the tile.
    ///
    /// # Safety
    /// As the methods of [`Lanes`].
    #[inline(always)]
    unsafe fn stream_tile<L: Lanes>(&mut self, tile: usize, starts: &[usize; TILE], next: &[usize; TILE]) {
        let (from, to) = self.visible(tile, 0);
        let (keys, head_dim) = (&self.piece.keys, self.piece.shape.head_dim);
        let tile = Tile { keys, head_dim, starts, next, seen: from..to };
        let queries = self.piece.queries();
        let mut first = 0;
        while first < queries {
            let end = queries.min(first + QUERIES);
            // SAFETY: the caller's contract.
            unsafe {
                match end - first {
                    1 => stream::<L, S, 1>(&self.piece, &mut self.scratch.running, &tile, first..end),
                    2 => stream::<L, S, 2>(&self.piece, &mut self.scratch.running, &tile, first..end),
                    3..=4 => stream::<L, S, 4>(&self.piece, &mut self.scratch.running, &tile, first..end),
                    _ => stream::<L, S, QUERIES>(&self.piece, &mut self.scratch.running, &tile, first..end),
                }
            }
            first = end;
        }
    }

    /// The first `len` positions of a tile from the cache: keys turned to `[head_dim, 64]`, values to panels of 64
    /// elements. Asks for the next tile's lines meanwhile: the processor does not foresee the next block.
    ///
    /// # Safety
    /// As the methods of [`Lanes`].
    #[inline(always)]
    unsafe fn load_tile<L: Lanes>(&mut self, len: usize, starts: &[usize; TILE], next: &[usize; TILE]) {
        let head_dim = self.piece.shape.head_dim;
        let (k, v) = (self.piece.keys.k, self.piece.keys.v);
        let Scratch { keys, values, .. } = &mut *self.scratch;
        assert!(keys.len() >= head_dim * TILE && values.len() >= head_dim.next_multiple_of(PANEL) * TILE);
        let mut first = 0;
        while first < len.min(TILE) {
            let mut at = 0;
            while at < head_dim {
                let count = (head_dim - at).min(LANES);
                // SAFETY: `at + count` stays inside the heads, which slicing checks; `first + 16` inside the tile.
                unsafe {
                    let mut rows = [L::splat(0.0); LANES];
                    for i in 0..LANES {
                        let start = starts[first + i] + at;
                        rows[i] = S::load_part(k[start..start + count].as_ptr(), count);
                        let value: L = S::load_part(v[start..start + count].as_ptr(), count);
                        let to = at / PANEL * PANEL * TILE + (first + i) * PANEL + at % PANEL;
                        value.store(values.as_mut_ptr().add(to));
                        if at * size_of::<S::Bits>() % CACHE_LINE == 0 {
                            L::prefetch(k.as_ptr().wrapping_add(next[first + i] + at));
                            L::prefetch(v.as_ptr().wrapping_add(next[first + i] + at));
                        }
                    }
                    L::transpose(&mut rows);
                    for i in 0..count {
                        rows[i].store(keys.as_mut_ptr().add((at + i) * TILE + first));
                    }
                }
                at += LANES;
            }
            first += LANES;
        }
    }

    /// What the query sees of the tile, as offsets into it.
    #[inline(always)]
    fn visible(&self, tile: usize, query: usize) -> (usize, usize) {
        let position = self.piece.position(query);
        let from = self.piece.shape.first_visible(position).max(tile) - tile;
        let to = (position + 1).min(tile + TILE).saturating_sub(tile);
        (from.min(to), to)
    }

    /// Scores, weights and weighted values of a few queries over one tile.
    ///
    /// # Safety
    /// As the methods of [`Lanes`]; the tile is loaded.
    #[inline(always)]
    unsafe fn attend_tile<L: Lanes>(&mut self, tile: usize, queries: Range<usize>) {
        let head_dim = self.piece.shape.head_dim;
        let count = queries.len();
        let mut rows = [self.piece.q.as_ptr(); FUSED_ROWS];
        let mut seen = [(0, 0); FUSED_ROWS];
        // The part all of them see is multiplied at once, the rest one query at a time, each in order of position.
        let (mut from, mut to) = (0, TILE);
        let mut any = false;
        for i in 0..count {
            let query = queries.start + i;
            let at = self.piece.start(query);
            rows[i] = self.piece.q[at..at + head_dim].as_ptr();
            seen[i] = self.visible(tile, query);
            from = from.max(seen[i].0);
            to = to.min(seen[i].1);
            any |= seen[i].0 < seen[i].1;
        }
        if !any {
            return;
        }
        let width = head_dim.next_multiple_of(PANEL);
        let scores = self.scratch.running.scores[queries.start * TILE..queries.end * TILE].as_mut_ptr();
        let sums = self.scratch.running.sums[queries.start * width..queries.end * width].as_mut_ptr();
        assert!(self.scratch.keys.len() >= head_dim * TILE && self.scratch.values.len() >= width * TILE);
        // SAFETY: scores and sums have `count` rows, keys and values were checked; offsets stay below 64.
        unsafe {
            for i in 0..count * TILE {
                *scores.add(i) = 0.0;
            }
            add_products::<L, WidenF32>(
                self.scratch.keys.as_ptr(),
                &rows[..count],
                head_dim,
                &mut Ahead::nothing(),
                scores,
                TILE,
            );
            let mut weights = [scores.cast_const(); FUSED_ROWS];
            for i in 0..count {
                weights[i] = scores.add(i * TILE);
                let (scores, sums) = (scores.add(i * TILE), sums.add(i * width));
                self.scratch.running.weigh::<L>(
                    self.piece.shape.scale,
                    queries.start + i,
                    seen[i],
                    scores,
                    sums,
                    width,
                );
            }
            let mut panel = 0;
            while panel < width {
                let values = self.scratch.values.as_ptr().add(panel * TILE);
                if from < to {
                    for i in 0..count {
                        add_values::<L>(values, weights[i], seen[i].0, from, sums.add(i * width + panel));
                    }
                    let mut common = weights;
                    for i in 0..count {
                        common[i] = weights[i].add(from);
                    }
                    let values = values.add(from * PANEL);
                    add_products::<L, WidenF32>(
                        values,
                        &common[..count],
                        to - from,
                        &mut Ahead::nothing(),
                        sums.add(panel),
                        width,
                    );
                }
                for i in 0..count {
                    let first = if from < to { to } else { seen[i].0 };
                    add_values::<L>(values, weights[i], first, seen[i].1, sums.add(i * width + panel));
                }
                panel += PANEL;
            }
        }
    }
}

/// Adds weighted values `from..to` of a tile to one query's sums over one panel.
///
/// # Safety
/// As the methods of [`Lanes`]; `values` has `to` rows of 64, `sums` 64 elements.
#[inline(always)]
unsafe fn add_values<L: Lanes>(values: *const f32, weights: *const f32, from: usize, to: usize, sums: *mut f32) {
    if from < to {
        // SAFETY: the caller's contract.
        unsafe {
            let rows = [weights.add(from)];
            add_products::<L, WidenF32>(values.add(from * PANEL), &rows, to - from, &mut Ahead::nothing(), sums, PANEL);
        }
    }
}
