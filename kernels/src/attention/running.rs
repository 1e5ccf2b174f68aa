//! The softmax of attention as keys come in: a running maximum, and what was summed under it.

use super::piece::TILE;
use crate::simd::math::exp;
use crate::simd::{LANES, Lanes};

/// What is kept for every query of a task.
#[derive(Default)]
pub(super) struct Running {
    /// `[queries, 64 keys]`: scores of a tile, then weights.
    pub(super) scores: Vec<f32>,
    /// Weighted values, `[queries, panels(head_dim) * 64]`.
    pub(super) sums: Vec<f32>,
    /// Running maximum of each query.
    max: Vec<f32>,
    /// Sum of weights by lane, `[queries, 16]`.
    pub(super) total: Vec<f32>,
}

impl Running {
    /// Nothing seen yet; rows of sums have `width` elements.
    pub(super) fn prepare(&mut self, queries: usize, width: usize) {
        self.scores.resize(queries * TILE, 0.0);
        self.sums.clear();
        self.sums.resize(queries * width, 0.0);
        self.max.clear();
        self.max.resize(queries, f32::NEG_INFINITY);
        self.total.clear();
        self.total.resize(queries * LANES, 0.0);
    }

    /// Turns a row of scores into weights under the running maximum, and rescales what was summed under the old one.
    ///
    /// # Safety
    /// As the methods of [`Lanes`]; `scores` has 64 elements, `sums` `width`.
    #[inline(always)]
    pub(super) unsafe fn weigh<L: Lanes>(
        &mut self,
        scale: f32,
        query: usize,
        (from, to): (usize, usize),
        scores: *mut f32,
        sums: *mut f32,
        width: usize,
    ) {
        if from >= to {
            return;
        }
        // SAFETY: the caller's contract.
        unsafe {
            let low = L::splat(f32::NEG_INFINITY);
            let scale = L::splat(scale);
            let old = self.max[query];
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
            self.max[query] = new;
            let max = L::splat(new);
            let factor = exp(L::splat(old).sub(max));
            let total = self.total[query * LANES..(query + 1) * LANES].as_mut_ptr();
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
