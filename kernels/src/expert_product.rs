//! The grouped product of routed experts: every touched expert's weights are read once a pass, whatever the number of
//! rows that chose it.

use std::cell::Cell;
use std::ops::Range;

use crate::buffer::{Shared, elements};
use crate::experts::PackedExperts;
use crate::form::Form;
use crate::packed::PANEL;
use crate::pool;
use crate::product::with_acts;
use crate::simd::math::silu_mul;
use crate::simd::tile::{Kind, KindBf16, KindF16, KindF32, Sums, TILE_ROWS, add_products, round_row};
use crate::simd::{Body, LANES, Lanes, dispatch};
use crate::weights::WeightDtype;

/// Rows of one pass: bounds the buffers between the products.
const PASS_ROWS: usize = 1024;

/// Rows of one expert in one task: a large expert is split, so that it does not run alone at the end.
const TASK_ROWS: usize = 16 * TILE_ROWS;

/// `sum over k of weight_k * down(silu(gate x) * (up x))`: `x` and `out` `[n, hidden]`, `ids` and `weights`
/// `[n, top_k]`; the operands were checked.
pub(crate) fn expert_ffn(
    form: Form,
    x: &[f32],
    ids: &[u32],
    weights: &[f32],
    experts: &PackedExperts,
    out: &mut [f32],
) {
    let hidden = experts.hidden();
    let top_k = ids.len() / (x.len() / hidden).max(1);
    if top_k == 0 || hidden == 0 {
        return out.fill(0.0);
    }
    let rows = x.chunks(PASS_ROWS * hidden).zip(out.chunks_mut(PASS_ROWS * hidden));
    let choices = ids.chunks(PASS_ROWS * top_k).zip(weights.chunks(PASS_ROWS * top_k));
    for ((x, out), (ids, weights)) in rows.zip(choices) {
        let mut plan = PLAN.take();
        plan.group(ids, top_k, experts.num_experts());
        match experts.dtype() {
            WeightDtype::F32 => pass::<KindF32>(form, x, &mut plan, experts),
            WeightDtype::F16 => pass::<KindF16>(form, x, &mut plan, experts),
            WeightDtype::BF16 => {
                with_acts::<KindBf16, _>(form, x, hidden, |x| pass::<KindBf16>(form, x, &mut plan, experts));
            }
        }
        combine(form, weights, top_k, hidden, &plan.down, out);
        PLAN.set(plan);
    }
}

thread_local! {
    static PLAN: Cell<Plan> = const { Cell::new(Plan::new()) };
}

/// Which rows go to which expert, and the buffers between the products; kept from call to call.
struct Plan {
    /// (row, k) pairs `row * top_k + k`, grouped by expert, in row order within one.
    pairs: Vec<u32>,
    top_k: usize,
    /// Parts of `pairs` with one expert, of at most `TASK_ROWS` pairs.
    groups: Vec<Group>,
    /// Where each expert's next pair goes.
    cursor: Vec<u32>,
    /// `silu(gate x) * (up x)` as the down product reads it, `[pairs, depth(inter)]`.
    middle: Vec<f32>,
    /// `[row * top_k + k, hidden]`
    down: Vec<f32>,
}

#[derive(Clone)]
struct Group {
    expert: usize,
    pairs: Range<usize>,
}

impl Default for Plan {
    fn default() -> Self {
        Plan::new()
    }
}

impl Plan {
    const fn new() -> Plan {
        Plan {
            pairs: Vec::new(),
            top_k: 1,
            groups: Vec::new(),
            cursor: Vec::new(),
            middle: Vec::new(),
            down: Vec::new(),
        }
    }

    /// Counting sort of the pairs by expert.
    fn group(&mut self, ids: &[u32], top_k: usize, num_experts: usize) {
        self.top_k = top_k;
        self.cursor.clear();
        self.cursor.resize(num_experts, 0);
        for &id in ids {
            self.cursor[id as usize] += 1;
        }
        self.groups.clear();
        let mut start = 0;
        for (expert, cursor) in self.cursor.iter_mut().enumerate() {
            let count = std::mem::replace(cursor, start as u32) as usize;
            let end = start + count;
            for first in (start..end).step_by(TASK_ROWS) {
                self.groups.push(Group { expert, pairs: first..end.min(first + TASK_ROWS) });
            }
            start = end;
        }
        self.pairs.resize(ids.len(), 0);
        for (pair, &id) in ids.iter().enumerate() {
            let cursor = &mut self.cursor[id as usize];
            self.pairs[*cursor as usize] = pair as u32;
            *cursor += 1;
        }
    }
}

/// Both products of every pair: leaves `plan.down`.
fn pass<K: Kind>(form: Form, acts: &[f32], plan: &mut Plan, experts: &PackedExperts) {
    let (hidden, inter) = (experts.hidden(), experts.inter());
    let count = plan.pairs.len();
    let depth = hidden.next_multiple_of(K::PER_STEP);
    let middle_depth = inter.next_multiple_of(K::PER_STEP);
    grow(&mut plan.middle, count * middle_depth);
    grow(&mut plan.down, count * hidden);

    let inter_panels = inter.div_ceil(PANEL);
    let middle = Shared::new(&mut plan.middle);
    let (pairs, top_k, groups) = (&plan.pairs, plan.top_k, &plan.groups);
    pool::run(groups.len() * inter_panels, &|task| {
        let (group, panel) = (&groups[task / inter_panels], task % inter_panels);
        let first = experts.gate_panel(group.expert, panel);
        let body = GateUp::<K> {
            gate: elements(experts.gate_up.panel_bytes(first)),
            up: elements(experts.gate_up.panel_bytes(first + 1)),
            acts,
            depth,
            pairs: &pairs[group.pairs.clone()],
            top_k,
            middle,
            first: group.pairs.start,
            middle_depth,
            panel,
            width: (inter - panel * PANEL).min(PANEL),
        };
        dispatch(form, body);
    });

    // A few panels a task where experts have few rows: a down panel is small.
    let hidden_panels = hidden.div_ceil(PANEL);
    let together = if count / groups.len().max(1) < 2 * TILE_ROWS { 4 } else { 1 };
    let tasks = hidden_panels.div_ceil(together);
    let down = Shared::new(&mut plan.down);
    let middle = &plan.middle;
    pool::run(groups.len() * tasks, &|task| {
        let (group, part) = (&groups[task / tasks], task % tasks);
        for panel in part * together..hidden_panels.min((part + 1) * together) {
            let body = Down::<K> {
                panel: elements(experts.down.panel_bytes(experts.down_panel(group.expert, panel))),
                middle: &middle[group.pairs.start * middle_depth..group.pairs.end * middle_depth],
                depth: middle_depth,
                pairs: &pairs[group.pairs.clone()],
                down,
                hidden,
                first_out: panel * PANEL,
                width: (hidden - panel * PANEL).min(PANEL),
            };
            dispatch(form, body);
        }
    });
}

fn grow<T: Clone + Default>(buffer: &mut Vec<T>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
}

/// One panel of gate and up for the pairs of one group.
struct GateUp<'a, K: Kind> {
    gate: &'a [K::Weight],
    up: &'a [K::Weight],
    /// `[rows, depth]`
    acts: &'a [f32],
    depth: usize,
    pairs: &'a [u32],
    top_k: usize,
    /// `[all pairs, middle_depth]`
    middle: Shared<f32>,
    /// Index of this group's first pair.
    first: usize,
    middle_depth: usize,
    panel: usize,
    /// Lanes that are outputs.
    width: usize,
}

impl<K: Kind> Body for GateUp<'_, K> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let len = self.depth * PANEL;
        assert!(self.gate.len() >= len && self.up.len() >= len, "a panel has the whole depth");
        let mut done = 0;
        while done < self.pairs.len() {
            let count = (self.pairs.len() - done).min(TILE_ROWS);
            let mut rows = [self.acts.as_ptr(); TILE_ROWS];
            for i in 0..count {
                let row = self.pairs[done + i] as usize / self.top_k;
                rows[i] = self.acts[row * self.depth..(row + 1) * self.depth].as_ptr();
            }
            let mut gate: [Sums; TILE_ROWS] = [[0.0; PANEL]; TILE_ROWS];
            let mut up: [Sums; TILE_ROWS] = [[0.0; PANEL]; TILE_ROWS];
            // SAFETY: the panels' lengths were checked, every row has `depth` activations, the sums have `count` rows.
            unsafe {
                let rows = &rows[..count];
                add_products::<L, K>(self.gate.as_ptr(), rows, self.depth, gate.as_mut_ptr().cast(), PANEL);
                add_products::<L, K>(self.up.as_ptr(), rows, self.depth, up.as_mut_ptr().cast(), PANEL);
            }
            for i in 0..count {
                let row = (self.first + done + i) * self.middle_depth;
                let at = row + self.panel * PANEL;
                // SAFETY: this task alone writes this pair's part of this panel, inside the buffer.
                let to = unsafe { self.middle.slice(at, self.width.next_multiple_of(K::PER_STEP)) };
                // SAFETY: the form's instructions are available here; `to` holds `width` activations.
                unsafe {
                    let mut lane = 0;
                    while lane < PANEL {
                        let (g, u) = (L::load(gate[i].as_ptr().add(lane)), L::load(up[i].as_ptr().add(lane)));
                        silu_mul(g, u).store(gate[i].as_mut_ptr().add(lane));
                        lane += LANES;
                    }
                    round_row::<L, K>(gate[i].as_ptr(), self.width, to.as_mut_ptr());
                }
            }
            done += count;
        }
    }
}

/// One panel of down for the pairs of one group.
struct Down<'a, K: Kind> {
    panel: &'a [K::Weight],
    /// `[pairs of the group, depth]`
    middle: &'a [f32],
    depth: usize,
    pairs: &'a [u32],
    /// `[all pairs in row order, hidden]`
    down: Shared<f32>,
    hidden: usize,
    first_out: usize,
    /// Lanes that are outputs.
    width: usize,
}

impl<K: Kind> Body for Down<'_, K> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        assert!(self.panel.len() >= self.depth * PANEL, "a panel has the whole depth");
        let mut done = 0;
        while done < self.pairs.len() {
            let count = (self.pairs.len() - done).min(TILE_ROWS);
            let mut rows = [self.middle.as_ptr(); TILE_ROWS];
            for i in 0..count {
                rows[i] = self.middle[(done + i) * self.depth..(done + i + 1) * self.depth].as_ptr();
            }
            let mut sums: [Sums; TILE_ROWS] = [[0.0; PANEL]; TILE_ROWS];
            // SAFETY: the panel's length was checked, every row has `depth` activations, the sums have `count` rows.
            unsafe {
                let panel = self.panel.as_ptr();
                add_products::<L, K>(panel, &rows[..count], self.depth, sums.as_mut_ptr().cast(), PANEL);
            }
            for i in 0..count {
                let at = self.pairs[done + i] as usize * self.hidden + self.first_out;
                // SAFETY: a pair belongs to one group, and this task alone writes this panel of it.
                let to = unsafe { self.down.slice(at, self.width) };
                to.copy_from_slice(&sums[i][..self.width]);
            }
            done += count;
        }
    }
}

/// `out[row] = sum over k, in order, of weights[row, k] * down[row, k]`.
fn combine(form: Form, weights: &[f32], top_k: usize, hidden: usize, down: &[f32], out: &mut [f32]) {
    let n = out.len() / hidden;
    let rows = (32768 / (top_k * hidden)).max(1);
    let shared = Shared::new(out);
    pool::run(n.div_ceil(rows), &|task| {
        let range = task * rows..n.min((task + 1) * rows);
        dispatch(
            form,
            Combine {
                weights: &weights[range.start * top_k..range.end * top_k],
                top_k,
                down: &down[range.start * top_k * hidden..range.end * top_k * hidden],
                hidden,
                // SAFETY: each task has rows of its own.
                out: unsafe { shared.slice(range.start * hidden, range.len() * hidden) },
            },
        );
    });
}

struct Combine<'a> {
    /// `[rows, top_k]`
    weights: &'a [f32],
    top_k: usize,
    /// `[rows, top_k, hidden]`
    down: &'a [f32],
    hidden: usize,
    /// `[rows, hidden]`
    out: &'a mut [f32],
}

impl Body for Combine<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let rows = self.out.len() / self.hidden;
        assert!(self.down.len() >= rows * self.top_k * self.hidden, "every pair was computed");
        for row in 0..rows {
            let weights = &self.weights[row * self.top_k..][..self.top_k];
            let mut at = 0;
            while at < self.hidden {
                let count = (self.hidden - at).min(LANES);
                // SAFETY: the lengths were checked; `at + count` stays inside a row.
                unsafe {
                    let mut sum = L::splat(0.0);
                    let mut from = self.down.as_ptr().add(row * self.top_k * self.hidden + at);
                    for k in 0..self.top_k {
                        sum = L::load_part(from, count).mul_add(L::splat(weights[k]), sum);
                        from = from.wrapping_add(self.hidden);
                    }
                    sum.store_part(self.out.as_mut_ptr().add(row * self.hidden + at), count);
                }
                at += LANES;
            }
        }
    }
}
