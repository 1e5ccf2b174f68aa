//! Scores and weighted values of a few queries that see the same keys, straight from the cache: each key and value is
//! used as it comes from memory, and what comes half a tile later is asked for meanwhile, line by line.
//!
//! Sums run over the same values in the same order as those of [`add_products`](crate::simd::fused::add_products).

use std::ops::Range;

use super::piece::{Keys, Piece, TILE};
use super::running::Running;
use crate::buffer::Plain;
use crate::packed::PANEL;
use crate::simd::stored::Stored;
use crate::simd::{LANES, Lanes};

/// Queries whose sums stay in registers.
pub(super) const QUERIES: usize = 8;

/// How many positions ahead of its use a line is asked for: of 16 to 64 the one that never was much slower than the best.
const AHEAD: usize = TILE / 2;

const LINE: usize = 64;

/// One tile of a sequence's keys and values, and the one that is read next.
pub(super) struct Tile<'a, T: Plain> {
    pub(super) keys: &'a Keys<'a, T>,
    pub(super) head_dim: usize,
    pub(super) starts: &'a [usize; TILE],
    pub(super) next: &'a [usize; TILE],
    /// The positions that are seen, as offsets into the tile.
    pub(super) seen: Range<usize>,
}

impl<T: Plain> Tile<'_, T> {
    /// Scores of `M` queries, to rows of 64; those of sixteens that nobody sees are left alone.
    ///
    /// # Safety
    /// As the methods of [`Lanes`]; every query has `head_dim` elements.
    #[inline(always)]
    pub(super) unsafe fn score<L: Lanes, S: Stored<Bits = T>, const M: usize>(
        &self,
        queries: [*const f32; M],
        scores: [*mut f32; M],
    ) {
        let step = LANES * S::PER_WORD;
        let mut first = self.seen.start / LANES * LANES;
        while first < self.seen.end {
            // SAFETY: the caller's contract; heads lie inside the cache, which slicing checks.
            unsafe {
                let mut sums = [L::splat(0.0); M];
                let mut at = 0;
                while at < self.head_dim {
                    let count = (self.head_dim - at).min(step);
                    let mut words = [L::splat(0.0); LANES];
                    for i in 0..LANES {
                        let start = self.starts[first + i] + at;
                        let key = self.keys.k[start..start + count].as_ptr();
                        words[i] = if count == step { S::load_words(key) } else { S::load_words_part(key, count) };
                        self.ask::<L>(self.keys.k, first + i, at);
                    }
                    L::transpose(&mut words);
                    if count == step {
                        for i in 0..LANES {
                            for index in 0..S::PER_WORD {
                                let key: L = S::value(words[i], index);
                                for m in 0..M {
                                    let query = L::splat(*queries[m].add(at + i * S::PER_WORD + index));
                                    sums[m] = key.mul_add(query, sums[m]);
                                }
                            }
                        }
                    } else {
                        for i in 0..count {
                            let key: L = S::value(words[i / S::PER_WORD], i % S::PER_WORD);
                            for m in 0..M {
                                sums[m] = key.mul_add(L::splat(*queries[m].add(at + i)), sums[m]);
                            }
                        }
                    }
                    at += step;
                }
                for m in 0..M {
                    sums[m].store(scores[m].add(first));
                }
            }
            first += LANES;
        }
    }

    /// Adds the values, weighted by `M` rows of 64, to as many rows of sums.
    ///
    /// # Safety
    /// As the methods of [`Lanes`]; the sums have `head_dim` elements, rounded up to whole vectors.
    #[inline(always)]
    pub(super) unsafe fn add_values<L: Lanes, S: Stored<Bits = T>, const M: usize>(
        &self,
        weights: [*mut f32; M],
        sums: [*mut f32; M],
    ) {
        let mut at = 0;
        // SAFETY: the caller's contract.
        unsafe {
            while at + 4 * LANES <= self.head_dim && M <= QUERIES / 2 {
                self.add_columns::<L, S, M, 4>(at, weights, sums);
                at += 4 * LANES;
            }
            while at + 2 * LANES <= self.head_dim {
                self.add_columns::<L, S, M, 2>(at, weights, sums);
                at += 2 * LANES;
            }
            while at < self.head_dim {
                self.add_columns::<L, S, M, 1>(at, weights, sums);
                at += LANES;
            }
        }
    }

    /// `V` vectors of every value from element `at` on; a single one may be cut off by the head's end.
    ///
    /// # Safety
    /// As [`Tile::add_values`].
    #[inline(always)]
    unsafe fn add_columns<L: Lanes, S: Stored<Bits = T>, const M: usize, const V: usize>(
        &self,
        at: usize,
        weights: [*mut f32; M],
        to: [*mut f32; M],
    ) {
        let count = (self.head_dim - at).min(V * LANES);
        // SAFETY: the caller's contract; heads lie inside the cache, which slicing checks.
        unsafe {
            let mut sums = [[L::splat(0.0); V]; M];
            for m in 0..M {
                for v in 0..V {
                    sums[m][v] = L::load(to[m].add(at + v * LANES));
                }
            }
            for position in self.seen.clone() {
                let start = self.starts[position] + at;
                let from = self.keys.v[start..start + count].as_ptr();
                let mut values = [L::splat(0.0); V];
                for v in 0..V {
                    values[v] = match V {
                        1 => S::load_part(from, count),
                        _ => S::load(from.add(v * LANES)),
                    };
                    self.ask::<L>(self.keys.v, position, at + v * LANES);
                }
                for m in 0..M {
                    let weight = L::splat(*weights[m].add(position));
                    for v in 0..V {
                        sums[m][v] = values[v].mul_add(weight, sums[m][v]);
                    }
                }
            }
            for m in 0..M {
                for v in 0..V {
                    sums[m][v].store(to[m].add(at + v * LANES));
                }
            }
        }
    }

    /// When element `at` of a position begins a line: asks for the same line of the position ahead.
    ///
    /// # Safety
    /// As the methods of [`Lanes`].
    #[inline(always)]
    unsafe fn ask<L: Lanes>(&self, rows: &[T], position: usize, at: usize) {
        if (at * size_of::<T>()).is_multiple_of(LINE) {
            let ahead = position + AHEAD;
            let start = if ahead < TILE { self.starts[ahead] } else { self.next[ahead - TILE] };
            // SAFETY: a prefetch may name any address.
            unsafe { L::prefetch(rows.as_ptr().wrapping_add(start + at)) };
        }
    }
}

/// Some queries of one row, in registers for `M`; those that are too many repeat the last one.
///
/// # Safety
/// As the methods of [`Lanes`]; there is at least one query.
#[inline(always)]
pub(super) unsafe fn stream<L: Lanes, S: Stored, const M: usize>(
    piece: &Piece<'_, S::Bits>,
    running: &mut Running,
    tile: &Tile<'_, S::Bits>,
    queries: Range<usize>,
) {
    let (count, head_dim) = (queries.len(), piece.shape.head_dim);
    let width = head_dim.next_multiple_of(PANEL);
    let all_scores = running.scores[queries.start * TILE..queries.end * TILE].as_mut_ptr();
    let all_sums = running.sums[queries.start * width..queries.end * width].as_mut_ptr();
    let (mut scores, mut sums, mut rows) = ([all_scores; M], [all_sums; M], [piece.q.as_ptr(); M]);
    // SAFETY: scores and sums have rows for `count` queries, and every query `head_dim` elements, which slicing checks.
    unsafe {
        for m in 0..M {
            let query = m.min(count - 1);
            let start = piece.start(queries.start + query);
            rows[m] = piece.q[start..start + head_dim].as_ptr();
            (scores[m], sums[m]) = (all_scores.add(query * TILE), all_sums.add(query * width));
        }
        tile.score::<L, S, M>(rows, scores);
        let seen = (tile.seen.start, tile.seen.end);
        for i in 0..count {
            running.weigh::<L>(piece.shape.scale, queries.start + i, seen, scores[i], sums[i], width);
        }
        // By now they are weights.
        tile.add_values::<L, S, M>(scores, sums);
    }
}
