//! Attention over tiles of 64 absolute key positions, with a running maximum.
//!
//! What happens to a query depends on its position, its window and the keys alone: tiles start at multiples of 64
//! whatever the chunk, the block size or the other rows; a score is summed over the head in order; the weights of a
//! tile are summed by lane (`position % 16`), the values in order of position.

use std::cell::RefCell;
use std::ops::Range;

use crate::attention::{AttentionShape, SeqSpan};
use crate::buffer::{Plain, Shared, elements};
use crate::form::Form;
use crate::kv::LayerKv;
use crate::packed::PANEL;
use crate::pool;
use crate::simd::math::exp;
use crate::simd::stored::{Stored, StoredBf16, StoredF16, StoredF32};
use crate::simd::fused::{FUSED_ROWS, WidenF32, add_products};
use crate::simd::{Body, LANES, Lanes, dispatch};
use crate::weights::WeightDtype;

/// Key positions of a tile: one panel, as keys are the outputs of the score product.
const TILE: usize = PANEL;

/// Queries (rows times heads of a group) of a task, about: their sums stay in the cache beside a tile of keys.
const TASK_QUERIES: usize = 96;

const CACHE_LINE: usize = 64;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::default());
}

/// The attention of checked operands; see [`crate::attention()`].
pub(crate) fn attend(
    form: Form,
    q: &[f32],
    shape: &AttentionShape,
    seqs: &[SeqSpan<'_>],
    kv: &LayerKv<'_>,
    block_size: usize,
    out: &mut [f32],
) {
    match kv.dtype {
        WeightDtype::F32 => by_tasks::<StoredF32>(form, q, shape, seqs, kv, block_size, out),
        WeightDtype::BF16 => by_tasks::<StoredBf16>(form, q, shape, seqs, kv, block_size, out),
        WeightDtype::F16 => by_tasks::<StoredF16>(form, q, shape, seqs, kv, block_size, out),
    }
}

fn by_tasks<S: Stored>(
    form: Form,
    q: &[f32],
    shape: &AttentionShape,
    seqs: &[SeqSpan<'_>],
    kv: &LayerKv<'_>,
    block_size: usize,
    out: &mut [f32],
) {
    let chunk = (TASK_QUERIES / shape.group().max(1)).max(1);
    // The last rows of a sequence see the most keys: they come first, so that no thread starts them at the end.
    let chunks: Vec<(usize, usize)> = seqs
        .iter()
        .enumerate()
        .flat_map(|(seq, span)| (0..span.rows.len()).step_by(chunk).rev().map(move |first| (seq, first)))
        .collect();
    let shared = Shared::new(out);
    pool::run(chunks.len() * shape.kv_heads, &|task| {
        let ((seq, first), kv_head) = (chunks[task / shape.kv_heads], task % shape.kv_heads);
        let seq = &seqs[seq];
        SCRATCH.with_borrow_mut(|scratch| {
            let body = Task::<S> {
                q,
                shape,
                rows: seq.rows.start + first..seq.rows.end.min(seq.rows.start + first + chunk),
                first_position: seq.first_position as usize + first,
                keys: Keys {
                    k: elements(kv.k),
                    v: elements(kv.v),
                    block_table: seq.block_table,
                    block_size,
                    kv_heads: shape.kv_heads,
                    head: kv_head,
                    head_dim: shape.head_dim,
                },
                first_head: kv_head * shape.group(),
                scratch,
                out: shared,
            };
            dispatch(form, body);
        });
    });
}

/// The buffers of one thread, kept from call to call.
#[derive(Default)]
struct Scratch {
    /// `[head_dim, 64 keys]`
    keys: Vec<f32>,
    /// `[panels(head_dim), 64 keys, 64]`
    values: Vec<f32>,
    /// `[queries, 64 keys]`, rounded up to whole tiles of rows
    scores: Vec<f32>,
    /// `[queries, panels(head_dim) * 64]`
    sums: Vec<f32>,
    /// Running maximum of each query.
    max: Vec<f32>,
    /// Sum of weights by lane, `[queries, 16]`.
    total: Vec<f32>,
}

impl Scratch {
    fn prepare(&mut self, queries: usize, head_dim: usize) {
        let width = head_dim.next_multiple_of(PANEL);
        // Key and value lanes beyond the head or the sequence may hold anything finite or not: they are never mixed
        // with a lane that counts.
        self.keys.resize(head_dim * TILE, 0.0);
        self.values.resize(width * TILE, 0.0);
        self.scores.resize(queries * TILE, 0.0);
        self.sums.clear();
        self.sums.resize(queries * width, 0.0);
        self.max.clear();
        self.max.resize(queries, f32::NEG_INFINITY);
        self.total.clear();
        self.total.resize(queries * LANES, 0.0);
    }
}

/// The cached keys and values of one sequence and head.
struct Keys<'a, T: Plain> {
    k: &'a [T],
    v: &'a [T],
    block_table: &'a [u32],
    block_size: usize,
    kv_heads: usize,
    head: usize,
    head_dim: usize,
}

impl<T: Plain> Keys<'_, T> {
    /// Where the heads of the positions `tile..tile + 64` start; beyond `end` the last one stands again, as its lanes
    /// are masked.
    #[inline(always)]
    fn starts(&self, tile: usize, end: usize) -> [usize; TILE] {
        let mut starts = [0; TILE];
        let (mut block, mut offset) = (usize::MAX, self.block_size - 1);
        for (i, start) in starts.iter_mut().enumerate() {
            if tile + i < end {
                offset += 1;
                if offset >= self.block_size {
                    let position = tile + i;
                    offset = position % self.block_size;
                    block = self.block_table[position / self.block_size] as usize;
                }
            } else if block == usize::MAX {
                // A tile that is not there: nothing of it is read.
                break;
            }
            *start = ((block * self.kv_heads + self.head) * self.block_size + offset) * self.head_dim;
        }
        starts
    }
}

/// Some consecutive rows of a sequence, and the query heads of one key and value head.
struct Task<'a, S: Stored> {
    q: &'a [f32],
    shape: &'a AttentionShape,
    rows: Range<usize>,
    first_position: usize,
    keys: Keys<'a, S::Bits>,
    first_head: usize,
    scratch: &'a mut Scratch,
    out: Shared<f32>,
}

impl<S: Stored> Body for Task<'_, S> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(mut self) {
        let (group, head_dim) = (self.shape.group(), self.shape.head_dim);
        let queries = self.rows.len() * group;
        self.scratch.prepare(queries, head_dim);
        let end = self.first_position + self.rows.len();
        let mut tile = self.shape.first_visible(self.first_position) / TILE * TILE;
        let mut starts = self.keys.starts(tile, end);
        while tile < end {
            let next = self.keys.starts(tile + TILE, end);
            // SAFETY: the form's instructions are available here.
            unsafe {
                self.load_tile::<L>(end - tile, &starts, &next);
                let mut query = 0;
                while query < queries {
                    let count = (queries - query).min(FUSED_ROWS);
                    self.attend_tile::<L>(tile, query..query + count);
                    query += count;
                }
            }
            starts = next;
            tile += TILE;
        }
        for query in 0..queries {
            let (row, head) = (query / group, self.first_head + query % group);
            let at = (self.rows.start + row) * self.shape.q_width() + head * head_dim;
            // SAFETY: this task alone writes this head of this row.
            let out = unsafe { self.out.slice(at, head_dim) };
            // SAFETY: the form's instructions are available here; the sums have `head_dim` elements.
            unsafe {
                let total = L::splat(L::load(self.scratch.total[query * LANES..].as_ptr()).reduce_add());
                let sums = self.scratch.sums[query * head_dim.next_multiple_of(PANEL)..].as_ptr();
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
    /// The first `len` positions of a tile from the cache: keys turned to `[head_dim, 64]`, values to panels of 64
    /// elements. Asks for the next tile's lines meanwhile: the processor does not foresee the next block.
    ///
    /// # Safety
    /// As the methods of [`Lanes`].
    #[inline(always)]
    unsafe fn load_tile<L: Lanes>(&mut self, len: usize, starts: &[usize; TILE], next: &[usize; TILE]) {
        let head_dim = self.keys.head_dim;
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
                        rows[i] = S::load_part(self.keys.k[start..start + count].as_ptr(), count);
                        let value: L = S::load_part(self.keys.v[start..start + count].as_ptr(), count);
                        let to = at / PANEL * PANEL * TILE + (first + i) * PANEL + at % PANEL;
                        value.store(values.as_mut_ptr().add(to));
                        if at * size_of::<S::Bits>() % CACHE_LINE == 0 {
                            L::prefetch(self.keys.k.as_ptr().wrapping_add(next[first + i] + at));
                            L::prefetch(self.keys.v.as_ptr().wrapping_add(next[first + i] + at));
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
        let position = self.first_position + query / self.shape.group();
        let from = self.shape.first_visible(position).max(tile) - tile;
        let to = (position + 1).min(tile + TILE).saturating_sub(tile);
        (from.min(to), to)
    }

    /// Scores, weights and weighted values of a few queries over one tile.
    ///
    /// # Safety
    /// As the methods of [`Lanes`]; the tile is loaded.
    #[inline(always)]
    unsafe fn attend_tile<L: Lanes>(&mut self, tile: usize, queries: Range<usize>) {
        let (group, head_dim) = (self.shape.group(), self.shape.head_dim);
        let count = queries.len();
        let mut rows = [self.q.as_ptr(); FUSED_ROWS];
        let mut seen = [(0, 0); FUSED_ROWS];
        // The part all of them see is multiplied at once, the rest one query at a time, each in order of position.
        let (mut from, mut to) = (0, TILE);
        let mut any = false;
        for i in 0..count {
            let query = queries.start + i;
            let row = self.rows.start + query / group;
            let at = row * self.shape.q_width() + (self.first_head + query % group) * head_dim;
            rows[i] = self.q[at..at + head_dim].as_ptr();
            seen[i] = self.visible(tile, query);
            from = from.max(seen[i].0);
            to = to.min(seen[i].1);
            any |= seen[i].0 < seen[i].1;
        }
        if !any {
            return;
        }
        let width = head_dim.next_multiple_of(PANEL);
        let scores = self.scratch.scores[queries.start * TILE..queries.end * TILE].as_mut_ptr();
        let sums = self.scratch.sums[queries.start * width..queries.end * width].as_mut_ptr();
        assert!(self.scratch.keys.len() >= head_dim * TILE && self.scratch.values.len() >= width * TILE);
        // SAFETY: scores and sums have `count` rows, keys and values were checked; offsets stay below 64.
        unsafe {
            for i in 0..count * TILE {
                *scores.add(i) = 0.0;
            }
            add_products::<L, WidenF32>(self.scratch.keys.as_ptr(), &rows[..count], head_dim, scores, TILE);
            let mut weights = [scores.cast_const(); FUSED_ROWS];
            for i in 0..count {
                weights[i] = scores.add(i * TILE);
                self.weigh::<L>(scores.add(i * TILE), queries.start + i, seen[i], sums.add(i * width), width);
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
                    add_products::<L, WidenF32>(values, &common[..count], to - from, sums.add(panel), width);
                }
                for i in 0..count {
                    let first = if from < to { to } else { seen[i].0 };
                    add_values::<L>(values, weights[i], first, seen[i].1, sums.add(i * width + panel));
                }
                panel += PANEL;
            }
        }
    }

    /// Turns a row of scores into weights under the running maximum, and rescales what was summed under the old one.
    ///
    /// # Safety
    /// As the methods of [`Lanes`]; `scores` has 64 elements, `sums` `width`.
    #[inline(always)]
    unsafe fn weigh<L: Lanes>(
        &mut self,
        scores: *mut f32,
        query: usize,
        (from, to): (usize, usize),
        sums: *mut f32,
        width: usize,
    ) {
        if from >= to {
            return;
        }
        // SAFETY: the caller's contract.
        unsafe {
            let low = L::splat(f32::NEG_INFINITY);
            let scale = L::splat(self.shape.scale);
            let old = self.scratch.max[query];
            let mut max = L::splat(old);
            let mut lane = 0;
            while lane < TILE {
                let score = L::load(scores.add(lane)).mul(scale);
                let score = keep_seen(score, lane, from, to, low);
                score.store(scores.add(lane));
                max = max.max(score);
                lane += LANES;
            }
            let new = max.reduce_max();
            self.scratch.max[query] = new;
            let max = L::splat(new);
            let factor = exp(L::splat(old).sub(max));
            let total = self.scratch.total[query * LANES..(query + 1) * LANES].as_mut_ptr();
            let mut sum = L::load(total).mul(factor);
            lane = 0;
            while lane < TILE {
                let weight = exp(L::load(scores.add(lane)).sub(max));
                let weight = keep_seen(weight, lane, from, to, L::splat(0.0));
                weight.store(scores.add(lane));
                sum = sum.add(weight);
                lane += LANES;
            }
            sum.store(total);
            if old != new {
                lane = 0;
                while lane < width {
                    L::load(sums.add(lane)).mul(factor).store(sums.add(lane));
                    lane += LANES;
                }
            }
        }
    }
}

/// Lanes `lane..lane + 16` of a tile: those outside `from..to` become `other`.
///
/// # Safety
/// As the methods of [`Lanes`].
#[inline(always)]
unsafe fn keep_seen<L: Lanes>(lanes: L, lane: usize, from: usize, to: usize, other: L) -> L {
    if from <= lane && lane + LANES <= to {
        return lanes;
    }
    let clamp = |at: usize| at.saturating_sub(lane).min(LANES);
    // SAFETY: the caller's contract.
    unsafe { lanes.keep(clamp(from), clamp(to), other) }
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
            add_products::<L, WidenF32>(values.add(from * PANEL), &rows, to - from, sums, PANEL);
        }
    }
}
