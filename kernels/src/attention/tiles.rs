//! Attention on matrix tiles, for a bf16 cache: tiles of 64 absolute key positions, with a running maximum.
//!
//! Scores are computed turned, `[keys, queries]`: a lane is a query, so that maximum, weights and sums go down the lanes
//! of sixteen queries at once and no lane depends on another. A query's result depends on its position, its window and
//! the keys alone: masked keys weigh exactly zero, and a tile in which a query sees nothing leaves it as it was.

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

use super::AttentionCall;
use super::piece::{Piece, TILE, in_pieces};
use super::tile_products::{ELEMENTS, four_by_one, one_by_two, two_by_two};
use crate::form::Form;
use crate::scratch::Scratch;
use crate::simd::amx::{TILE_DEPTH, TILE_ROWS, Tiles};
use crate::simd::avx512::Avx512;
use crate::simd::kind::Kind;
use crate::simd::tile::Tile;
use crate::simd::{Body, LANES, Lanes};

/// Queries of a task, about: their sums stay in the cache beside a tile of keys.
const TASK_QUERIES: usize = 256;

/// Matrix tiles of a tile of keys, by sixteen keys and by the thirty-two that one product sums over.
const KEY_ROWS: usize = TILE / TILE_ROWS;
const KEY_STEPS: usize = TILE / TILE_DEPTH;

/// Queries whose scores are held at once.
const SCORES: usize = 2 * LANES;

thread_local! {
    static SCRATCH: RefCell<Buffers> = const { RefCell::new(Buffers::new()) };
}

/// The attention of checked operands over a bf16 cache.
pub(super) fn attend(call: &AttentionCall<'_>, q: &[f32], out: &mut [f32]) {
    in_pieces(call, q, out, TASK_QUERIES, |piece| {
        SCRATCH.with_borrow_mut(|buffers| {
            Tile::dispatch(Form::Amx, Task { parts: buffers.take(&piece), piece });
        });
    });
}

/// The buffers of one thread, kept from call to call.
struct Buffers {
    words: Scratch,
    floats: Scratch,
    visible: Vec<Visible>,
}

impl Buffers {
    const fn new() -> Buffers {
        Buffers { words: Scratch::new(), floats: Scratch::new(), visible: Vec::new() }
    }

    fn take(&mut self, piece: &Piece<'_, u16>) -> Parts<'_> {
        let (queries, head_dim) = (piece.queries(), piece.shape.head_dim);
        let (blocks, steps) = (queries.div_ceil(LANES), head_dim.div_ceil(TILE_DEPTH));
        let lengths = [2 * blocks * steps, KEY_ROWS * steps, 2 * steps * KEY_STEPS, 4 * KEY_STEPS];
        let words = self.words.take(lengths.iter().sum::<usize>() * ELEMENTS);
        let (queries, words) = words.split_at_mut(lengths[0] * ELEMENTS);
        let (keys, words) = words.split_at_mut(lengths[1] * ELEMENTS);
        let (values, weights) = words.split_at_mut(lengths[2] * ELEMENTS);
        let lanes = blocks * LANES;
        let floats = self.floats.take(TILE * SCORES + lanes * (steps * TILE_DEPTH + 2));
        let (scores, floats) = floats.split_at_mut(TILE * SCORES);
        let (sums, floats) = floats.split_at_mut(lanes * steps * TILE_DEPTH);
        let (max, total) = floats.split_at_mut(lanes);
        sums.fill(0.0);
        max.fill(f32::NEG_INFINITY);
        total.fill(0.0);
        self.visible.clear();
        self.visible.extend((0..blocks).map(|block| Visible::of(piece, block)));
        let visible = &self.visible;
        Parts { blocks, steps, visible, queries, keys, values, weights, scores, sums, max, total }
    }
}

/// The positions that each query of a block sees, first and last. Lanes beyond the last query repeat it.
struct Visible {
    first: [i32; LANES],
    last: [i32; LANES],
}

impl Visible {
    fn of(piece: &Piece<'_, u16>, block: usize) -> Visible {
        let query = |lane: usize| (block * LANES + lane).min(piece.queries() - 1);
        // A cache of 2^31 slots would not fit any memory.
        let last: [usize; LANES] = std::array::from_fn(|lane| piece.position(query(lane)));
        Visible { first: last.map(|last| piece.shape.first_visible(last) as i32), last: last.map(|last| last as i32) }
    }
}

/// What a task works on, in matrix tiles: `[16, 16, 2]` pairs of bf16 (or `[16, 32]` elements, the same bytes).
struct Parts<'a> {
    /// Blocks of sixteen queries.
    blocks: usize,
    /// Steps of thirty-two elements through a head.
    steps: usize,
    /// `[blocks]`
    visible: &'a [Visible],
    /// `[upper and lower halves, blocks, steps, pairs of elements, queries, 2]`: a query is the sum of two bf16.
    queries: &'a mut [u16],
    /// `[sixteens of keys, steps, keys, elements]`
    keys: &'a mut [u16],
    /// `[sixteens of elements, thirty-twos of keys, pairs of keys, elements, 2]`
    values: &'a mut [u16],
    /// `[two blocks, upper and lower halves, thirty-twos of keys, queries, keys]`
    weights: &'a mut [u16],
    /// `[keys, queries of two blocks]`
    scores: &'a mut [f32],
    /// `[queries, elements]`
    sums: &'a mut [f32],
    /// Running maximum of each query's scores, times scale and log2 e.
    max: &'a mut [f32],
    total: &'a mut [f32],
}

struct Task<'a> {
    piece: Piece<'a, u16>,
    parts: Parts<'a>,
}

// SAFETY (every block below): bodies run inside the form's instructions with tiles granted; the parts have the lengths
// that `Buffers::take` gives them, and every index stays inside the tiles that the comments name.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Body for Task<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(mut self) {
        let end = self.piece.end();
        unsafe {
            let tiles = Tiles::take();
            self.turn_queries();
            let mut tile = self.piece.first_tile();
            let mut starts = self.piece.keys.starts(tile, end);
            while tile < end {
                let next = self.piece.keys.starts(tile + TILE, end);
                self.load_tile(end - tile, &starts, &next);
                let seeing = self.seeing(tile);
                for first in seeing.clone().step_by(2) {
                    let blocks = first..seeing.end.min(first + 2);
                    self.score(&tiles, blocks.clone());
                    for block in blocks.clone() {
                        let ahead = (block == seeing.start).then_some(&next);
                        self.weigh(tile, block, block - first, ahead);
                    }
                    self.add_values(&tiles, blocks);
                }
                starts = next;
                tile += TILE;
            }
            self.finish::<L>(&tiles);
        }
    }
}

#[allow(clippy::undocumented_unsafe_blocks)]
impl Task<'_> {
    /// The queries, pairs of elements down and queries across. Lanes beyond the last query repeat it.
    #[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
    unsafe fn turn_queries(&mut self) {
        let (last, head_dim) = (self.piece.queries() - 1, self.piece.shape.head_dim);
        let (blocks, steps) = (self.parts.blocks, self.parts.steps);
        for block in 0..blocks {
            for step in 0..steps {
                let at = step * TILE_DEPTH;
                let mask = u32::MAX >> (TILE_DEPTH - (head_dim - at).min(TILE_DEPTH));
                let mut halves = [[Avx512(_mm512_setzero_ps()); LANES]; 2];
                for lane in 0..LANES {
                    let start = self.piece.start((block * LANES + lane).min(last));
                    let query = self.piece.q[start..start + head_dim].as_ptr();
                    let (low, high) = unsafe {
                        (
                            _mm512_maskz_loadu_ps(mask as __mmask16, query.add(at)),
                            _mm512_maskz_loadu_ps((mask >> LANES) as __mmask16, query.wrapping_add(at + LANES)),
                        )
                    };
                    let upper = _mm512_cvtne2ps_pbh(high, low);
                    let (low, high) = (_mm512_sub_ps(low, first_half(upper)), _mm512_sub_ps(high, second_half(upper)));
                    halves[0][lane].0 = words(upper);
                    halves[1][lane].0 = words(_mm512_cvtne2ps_pbh(high, low));
                }
                for (half, mut rows) in halves.into_iter().enumerate() {
                    let to = ((half * blocks + block) * steps + step) * ELEMENTS;
                    let to = self.parts.queries[to..to + ELEMENTS].as_mut_ptr();
                    unsafe {
                        Avx512::transpose(&mut rows);
                        for (pair, row) in rows.iter().enumerate() {
                            row.store(to.add(pair * TILE_DEPTH).cast());
                        }
                    }
                }
            }
        }
    }

    /// The first `len` positions of a tile from the cache, zeros beyond; asks for the first half of the next tile.
    #[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
    unsafe fn load_tile(&mut self, len: usize, starts: &[usize; TILE], next: &[usize; TILE]) {
        let (steps, head_dim) = (self.parts.steps, self.piece.shape.head_dim);
        let (k, v) = (self.piece.keys.k, self.piece.keys.v);
        let (keys, values) = (self.parts.keys.as_mut_ptr(), self.parts.values.as_mut_ptr());
        let len = len.min(TILE);
        assert!(
            starts[..len].iter().all(|start| start + head_dim <= k.len().min(v.len())),
            "heads lie inside the cache"
        );
        // Of two rows of words: the pairs of their first halves, and of their second halves.
        let (low, high) = unsafe { (interleaved(0), interleaved(LANES as i16)) };
        for pair in 0..TILE / 2 {
            self.ask(next[pair]);
            for step in 0..steps {
                let at = step * TILE_DEPTH;
                let mask = (u32::MAX >> (TILE_DEPTH - (head_dim - at).min(TILE_DEPTH))) as __mmask32;
                let (mut key, mut value) = ([_mm512_setzero_si512(); 2], [_mm512_setzero_si512(); 2]);
                for i in 0..2 {
                    let position = 2 * pair + i;
                    if position < len {
                        let start = starts[position] + at;
                        unsafe {
                            key[i] = _mm512_maskz_loadu_epi16(mask, k.as_ptr().add(start).cast());
                            value[i] = _mm512_maskz_loadu_epi16(mask, v.as_ptr().add(start).cast());
                        }
                    }
                }
                let row = 2 * pair;
                let to = (row / TILE_ROWS * steps + step) * ELEMENTS + row % TILE_ROWS * TILE_DEPTH;
                let values_to = (2 * step * KEY_STEPS + pair / LANES) * ELEMENTS + pair % LANES * TILE_DEPTH;
                unsafe {
                    _mm512_store_si512(keys.add(to).cast(), key[0]);
                    _mm512_store_si512(keys.add(to + TILE_DEPTH).cast(), key[1]);
                    let pairs = _mm512_permutex2var_epi16(value[0], low, value[1]);
                    _mm512_store_si512(values.add(values_to).cast(), pairs);
                    let pairs = _mm512_permutex2var_epi16(value[0], high, value[1]);
                    _mm512_store_si512(values.add(values_to + KEY_STEPS * ELEMENTS).cast(), pairs);
                }
            }
        }
    }

    /// Asks for the key and value that start there: the processor does not foresee the next block. The lines are asked
    /// for a few at a time between other work, as only so many can be on their way.
    #[inline(always)]
    fn ask(&self, start: usize) {
        for at in (0..self.piece.shape.head_dim).step_by(32) {
            for rows in [self.piece.keys.k, self.piece.keys.v] {
                // SAFETY: a prefetch may name any address.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(rows.as_ptr().wrapping_add(start + at).cast()) };
            }
        }
    }

    /// The blocks of queries of which any sees a key of the tile.
    #[inline(always)]
    fn seeing(&self, tile: usize) -> Range<usize> {
        let (first, end) = (tile as i32, (tile + TILE) as i32);
        let visible = self.parts.visible;
        let from = visible.partition_point(|block| block.last[LANES - 1] < first);
        from..visible.partition_point(|block| block.first[0] < end).max(from)
    }

    /// Scores of one or two blocks' queries, keys down and queries across.
    #[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
    unsafe fn score(&mut self, tiles: &Tiles, blocks: Range<usize>) {
        let steps = self.parts.steps;
        let (keys, queries) = (self.parts.keys.as_ptr(), self.parts.queries.as_ptr());
        let scores = self.parts.scores.as_mut_ptr();
        let of = |index: usize| index * steps * ELEMENTS;
        unsafe {
            let halves = [0, self.parts.blocks].map(|half| queries.add(of(half + blocks.start)));
            if blocks.len() == 1 {
                return four_by_one(tiles, keys, of(1), halves, steps, scores, SCORES);
            }
            for row in (0..KEY_ROWS).step_by(2) {
                let a = [keys.add(of(row)), keys.add(of(row + 1))];
                let to = scores.add(row * TILE_ROWS * SCORES);
                let terms = halves.map(|b| (a, [b, b.add(of(1))]));
                two_by_two::<false, 2>(tiles, terms, steps, to, SCORES);
            }
        }
    }

    /// Turns a block's scores, the first or second of those held, into weights under the running maximum, and rescales
    /// what was summed under the old one. Asks for the second half of the tile ahead.
    #[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
    unsafe fn weigh(&mut self, tile: usize, block: usize, place: usize, ahead: Option<&[usize; TILE]>) {
        let visible = &self.parts.visible[block];
        unsafe {
            let scores = self.parts.scores.as_mut_ptr().add(place * LANES);
            let low = _mm512_set1_ps(f32::NEG_INFINITY);
            let tile = _mm512_set1_epi32(tile as i32);
            let first = _mm512_sub_epi32(_mm512_loadu_si512(visible.first.as_ptr().cast()), tile);
            let last = _mm512_sub_epi32(_mm512_loadu_si512(visible.last.as_ptr().cast()), tile);
            let whole = _mm512_cmple_epi32_mask(first, _mm512_setzero_si512())
                & _mm512_cmpge_epi32_mask(last, _mm512_set1_epi32(TILE as i32 - 1));
            if whole != __mmask16::MAX {
                for key in 0..TILE {
                    let at = _mm512_set1_epi32(key as i32);
                    let seen = _mm512_cmple_epi32_mask(first, at) & _mm512_cmple_epi32_mask(at, last);
                    let to = scores.add(key * SCORES);
                    _mm512_store_ps(to, _mm512_mask_blend_ps(seen, low, _mm512_load_ps(to)));
                }
            }
            let mut best = [low; 4];
            for keys in (0..TILE).step_by(4) {
                for (i, best) in best.iter_mut().enumerate() {
                    *best = _mm512_max_ps(*best, _mm512_load_ps(scores.add((keys + i) * SCORES)));
                }
            }
            let best = _mm512_max_ps(_mm512_max_ps(best[0], best[1]), _mm512_max_ps(best[2], best[3]));
            let scale = _mm512_set1_ps(self.piece.shape.scale * std::f32::consts::LOG2_E);
            let max = self.parts.max.as_mut_ptr().add(block * LANES);
            let old = _mm512_load_ps(max);
            let new = _mm512_max_ps(old, _mm512_mul_ps(best, scale));
            _mm512_store_ps(max, new);
            // A query that has seen nothing yet has no maximum to subtract.
            let none = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(new, low);
            let new = _mm512_mask_blend_ps(none, new, _mm512_setzero_ps());
            let factor = exp2(_mm512_sub_ps(old, new));

            let mut totals = [_mm512_setzero_ps(); 4];
            for step in 0..KEY_STEPS {
                let mut halves = [[Avx512(_mm512_setzero_ps()); LANES]; 2];
                for pairs in 0..LANES / 2 {
                    if let Some(next) = ahead {
                        let half = TILE / 2 + step * LANES + 2 * pairs;
                        self.ask(next[half]);
                        self.ask(next[half + 1]);
                    }
                    let mut bits = [[_mm512_setzero_ps(); 4]; 2];
                    for i in 0..4 {
                        let score = _mm512_load_ps(scores.add((step * TILE_DEPTH + 4 * pairs + i) * SCORES));
                        let weight = exp2(_mm512_fmsub_ps(score, scale, new));
                        totals[i] = _mm512_add_ps(totals[i], weight);
                        let upper = upper_half(weight);
                        bits[0][i] = upper;
                        bits[1][i] = _mm512_sub_ps(weight, upper);
                    }
                    for (rows, bits) in halves.iter_mut().zip(bits) {
                        rows[2 * pairs].0 = pair(bits[0], bits[1]);
                        rows[2 * pairs + 1].0 = pair(bits[2], bits[3]);
                    }
                }
                for (half, mut rows) in halves.into_iter().enumerate() {
                    Avx512::transpose(&mut rows);
                    let to = ((2 * place + half) * KEY_STEPS + step) * ELEMENTS;
                    let to = self.parts.weights.as_mut_ptr().add(to);
                    for (query, row) in rows.iter().enumerate() {
                        row.store(to.add(query * TILE_DEPTH).cast());
                    }
                }
            }
            let sum = _mm512_add_ps(_mm512_add_ps(totals[0], totals[1]), _mm512_add_ps(totals[2], totals[3]));
            let total = self.parts.total.as_mut_ptr().add(block * LANES);
            _mm512_store_ps(total, _mm512_fmadd_ps(_mm512_load_ps(total), factor, sum));

            let mut factors = [0f32; LANES];
            _mm512_storeu_ps(factors.as_mut_ptr(), factor);
            let depth = self.parts.steps * TILE_DEPTH;
            for (query, factor) in factors.into_iter().enumerate() {
                if factor == 1.0 {
                    continue;
                }
                let sums = self.parts.sums.as_mut_ptr().add((block * LANES + query) * depth);
                let factor = _mm512_set1_ps(factor);
                let mut at = 0;
                while at < depth {
                    _mm512_store_ps(sums.add(at), _mm512_mul_ps(_mm512_load_ps(sums.add(at)), factor));
                    at += LANES;
                }
            }
        }
    }

    /// Adds the weighted values of the tile to the sums of one or two blocks.
    #[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
    unsafe fn add_values(&mut self, tiles: &Tiles, blocks: Range<usize>) {
        let depth = self.parts.steps * TILE_DEPTH;
        let (weights, values) = (self.parts.weights.as_ptr(), self.parts.values.as_ptr());
        let of = |index: usize| index * KEY_STEPS * ELEMENTS;
        for part in (0..depth / LANES).step_by(2) {
            unsafe {
                let b = [values.add(of(part)), values.add(of(part + 1))];
                let to = self.parts.sums.as_mut_ptr().add(blocks.start * LANES * depth + part * LANES);
                let halves = [weights, weights.add(of(1))];
                match blocks.len() {
                    1 => one_by_two(tiles, halves.map(|a| (a, b)), KEY_STEPS, to, depth),
                    _ => {
                        let terms = halves.map(|a| ([a, a.add(of(2))], b));
                        two_by_two::<true, 2>(tiles, terms, KEY_STEPS, to, depth);
                    }
                }
            }
        }
    }

    /// Divides by the totals.
    ///
    /// A product with zero weights comes first: it turns -0 and denormals, which a tile without a visible key would have
    /// left alone, into 0 for everyone.
    #[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
    unsafe fn finish<L: Lanes>(&mut self, tiles: &Tiles) {
        let (head_dim, depth) = (self.piece.shape.head_dim, self.parts.steps * TILE_DEPTH);
        self.parts.weights[..ELEMENTS].fill(0);
        unsafe {
            let zeros = self.parts.weights.as_ptr();
            for block in 0..self.parts.blocks {
                for part in (0..depth / LANES).step_by(2) {
                    let to = self.parts.sums.as_mut_ptr().add(block * LANES * depth + part * LANES);
                    one_by_two(tiles, [(zeros, [zeros, zeros])], 1, to, depth);
                }
            }
            for query in 0..self.piece.queries() {
                let out = self.piece.out.slice(self.piece.start(query), head_dim);
                let total = L::splat(self.parts.total[query]);
                let mut at = 0;
                while at < head_dim {
                    let count = (head_dim - at).min(LANES);
                    let sums = L::load(self.parts.sums.as_ptr().add(query * depth + at));
                    sums.div(total).store_part(out.as_mut_ptr().add(at), count);
                    at += LANES;
                }
            }
        }
    }
}

/// Indices that interleave sixteen words of one register from `first` with those of another.
#[inline(always)]
unsafe fn interleaved(first: i16) -> __m512i {
    let mut words = [0i16; TILE_DEPTH];
    for (i, word) in words.iter_mut().enumerate() {
        *word = first + i as i16 / 2 + if i % 2 == 0 { 0 } else { TILE_DEPTH as i16 };
    }
    // SAFETY: the array has 64 bytes; the instructions are available in every body.
    unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
}

/// `2^x` for `x` up to 127, relative error 3e-6: weights keep sixteen bits. Zero below -100, as denormals, also in the
/// lower half of a weight, would take a hundred times longer; NaN stays NaN.
#[inline(always)]
unsafe fn exp2(x: __m512) -> __m512 {
    // SAFETY: the instructions are available in every body.
    unsafe {
        // The bound comes first, so that a NaN, the second operand, passes.
        let normal = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(-100.0));
        let x = _mm512_max_ps(_mm512_set1_ps(-100.0), x);
        let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
        let r = _mm512_sub_ps(x, n);
        // The Taylor series of e^(r ln 2), for r within one half.
        let mut p = _mm512_set1_ps(1.333_355_8e-3);
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.618_129e-3));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.550_411e-2));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402_265e-1));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(std::f32::consts::LN_2));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0));
        _mm512_maskz_scalef_ps(normal, p, n)
    }
}

/// The words of sixteen pairs as lanes.
#[target_feature(enable = "avx512f")]
#[inline]
fn words(pairs: __m512bh) -> __m512 {
    // SAFETY: both are 64 bytes of any value.
    unsafe { std::mem::transmute(pairs) }
}

/// The first sixteen of thirty-two bf16 as f32.
#[target_feature(enable = "avx512f")]
#[inline]
fn first_half(values: __m512bh) -> __m512 {
    let words = _mm512_castps_si512(words(values));
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(words))))
}

/// The last sixteen of thirty-two bf16 as f32.
#[target_feature(enable = "avx512f")]
#[inline]
fn second_half(values: __m512bh) -> __m512 {
    let words = _mm512_castps_si512(words(values));
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64::<1>(words))))
}

/// What of a value fits a bf16: its upper half.
#[inline(always)]
unsafe fn upper_half(value: __m512) -> __m512 {
    // SAFETY: the instructions are available in every body.
    unsafe {
        let high = _mm512_set1_epi32(0xffff_0000u32 as i32);
        _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(value), high))
    }
}

/// The upper halves of two registers' lanes beside each other, the first one's below.
#[inline(always)]
unsafe fn pair(first: __m512, second: __m512) -> __m512 {
    // SAFETY: the instructions are available in every body.
    unsafe {
        let first = _mm512_srli_epi32::<16>(_mm512_castps_si512(first));
        _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaa_aaaa, first, _mm512_castps_si512(second)))
    }
}
