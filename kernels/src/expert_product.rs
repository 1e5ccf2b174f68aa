//! The experts' products: two jobs, gate and up with SwiGLU for every (expert, rows), then down and the weighted sum for
//! every part of the output's columns.
//!
//! A row's sum runs over its experts by ascending id, whatever the batch: the second job has no two tasks that add to
//! one element, and writes nothing but the result.

use std::cell::Cell;
use std::ops::Range;

use crate::acts::{acts_len, with_acts};
use crate::buffer::{Shared, elements};
use crate::expert_middle::{Layout, MiddleLayout, PutMiddle};
use crate::expert_plan::{ExpertPlan, Group};
use crate::experts::PackedExperts;
use crate::form::Form;
use crate::packed::{CHUNK, PANEL};
use crate::pool;
use crate::product::{ByKind, by_kind};
use crate::scratch::Scratch;
use crate::simd::ahead::Walk;
use crate::simd::kind::{Kind, Sums, chunk_at};
use crate::simd::math::silu_mul;
use crate::simd::{Body, LANES, Lanes};
use crate::upcoming::NextRead;

/// Bytes between the products, which bound the rows of one pass: a pass reads every expert's weights.
const PASS_BYTES: usize = 256 << 20;

/// Bytes of the sums of a task of the second job: they stay in its cache.
const COLUMN_BYTES: usize = 1 << 20;

thread_local! {
    static PLAN: Cell<ExpertPlan> = const { Cell::new(ExpertPlan::new()) };
    static MIDDLE: Cell<Scratch> = const { Cell::new(Scratch::new()) };
    static GATHERED: Cell<Scratch> = const { Cell::new(Scratch::new()) };
    static TOTALS: Cell<Scratch> = const { Cell::new(Scratch::new()) };
    static SUMS: Cell<Scratch> = const { Cell::new(Scratch::new()) };
}

/// `sum over the chosen experts of weight * down(silu(gate x) * (up x))`: `x` and `out` `[n, hidden]`, `ids` and
/// `weights` `[n, top_k]`; the operands were checked.
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
    let pass_rows = (PASS_BYTES / (4 * top_k * experts.inter().max(1))).max(1);
    let rows = x.chunks(pass_rows * hidden).zip(out.chunks_mut(pass_rows * hidden));
    let choices = ids.chunks(pass_rows * top_k).zip(weights.chunks(pass_rows * top_k));
    for ((x, out), (ids, weights)) in rows.zip(choices) {
        pass(form, x, ids, weights, top_k, experts, out);
    }
}

/// Some rows of a batch.
fn pass(form: Form, x: &[f32], ids: &[u32], weights: &[f32], top_k: usize, experts: &PackedExperts, out: &mut [f32]) {
    let mut plan = PLAN.take();
    let mut middle = MIDDLE.take();
    let [gate_up, down] = experts.formats();
    let layout = by_kind(form, down, Layout);
    plan.group(ids, top_k, experts.num_experts(), layout.block);
    let bytes = plan.rows(layout.block) * experts.down.shape().depth() * layout.act_bytes;
    let middle_bytes = middle.take::<u8>(bytes);
    // Tasks of the second job begin with the first group's expert.
    let first = experts.down_panel(plan.groups[0].expert, 0);
    let last = experts.down_panel(plan.groups[0].expert + 1, 0);
    let after = pool::announce(NextRead::of(experts.down.panels_bytes(first..last)));
    by_kind(form, gate_up, First { form, x, experts, plan: &plan, layout, middle: middle_bytes });
    pool::announce(after);
    by_kind(form, down, Second { form, weights, experts, plan: &plan, middle: middle_bytes, out });
    MIDDLE.set(middle);
    PLAN.set(plan);
}

/// The first job: fills the middle.
struct First<'a> {
    form: Form,
    x: &'a [f32],
    experts: &'a PackedExperts,
    plan: &'a ExpertPlan,
    layout: MiddleLayout,
    middle: &'a mut [u8],
}

impl ByKind for First<'_> {
    type Output = ();

    fn run<K: Kind>(self) {
        let First { form, x, experts, plan, layout, middle } = self;
        with_acts::<K, _>(form, x, experts.hidden(), 1, |x| gate_up::<K>(form, x, plan, experts, layout, middle));
    }
}

/// The second job: from the middle to the output.
struct Second<'a> {
    form: Form,
    weights: &'a [f32],
    experts: &'a PackedExperts,
    plan: &'a ExpertPlan,
    middle: &'a [u8],
    out: &'a mut [f32],
}

impl ByKind for Second<'_> {
    type Output = ();

    fn run<K: Kind>(self) {
        let Second { form, weights, experts, plan, middle, out } = self;
        down::<K>(form, elements(middle), weights, plan, experts, out);
    }
}

/// Tasks for every thread, so many that none waits long for another at the end.
fn enough_tasks() -> usize {
    16 * pool::threads()
}

fn gate_up<K: Kind>(
    form: Form,
    acts: &[K::Act],
    plan: &ExpertPlan,
    experts: &PackedExperts,
    layout: MiddleLayout,
    middle: &mut [u8],
) {
    let panels = experts.inter().div_ceil(PANEL);
    let parts = enough_tasks().div_ceil(plan.groups.len().max(1)).min(panels);
    let together = panels.div_ceil(parts.max(1)).max(1);
    let parts = panels.div_ceil(together);
    let middle = Shared::new(middle);
    let work = |task: usize| {
        let group = plan.groups.get(task / parts)?;
        let first = task % parts * together;
        Some((group, first..panels.min(first + together)))
    };
    pool::run(plan.groups.len() * parts, &|task| {
        let Some((group, panels)) = work(task) else { return };
        let (mut gathered, mut sums) = (GATHERED.take(), SUMS.take());
        let body = GateUp::<K> {
            form,
            experts,
            acts,
            plan,
            group,
            panels,
            after: work(task + 1).map(|(group, panels)| (group.expert, panels.start)),
            gathered: gathered.take(acts_len::<K>(group.pairs.len(), experts.gate_up.shape().depth())),
            layout,
            middle,
            sums: sums.take(2),
        };
        K::dispatch(form, body);
        GATHERED.set(gathered);
        SUMS.set(sums);
    });
}

/// Some panels of gate and up for the pairs of one group.
struct GateUp<'a, K: Kind> {
    form: Form,
    experts: &'a PackedExperts,
    /// `[rows, depth(hidden)]`, row after row
    acts: &'a [K::Act],
    plan: &'a ExpertPlan,
    group: &'a Group,
    panels: Range<usize>,
    /// Expert and panel that this thread comes to next, most likely.
    after: Option<(usize, usize)>,
    /// The group's rows of `acts`.
    gathered: &'a mut [K::Act],
    layout: MiddleLayout,
    /// `[plan.rows, depth(inter)]`
    middle: Shared<u8>,
    /// Gate's and up's.
    sums: &'a mut [Sums],
}

impl<K: Kind> Body for GateUp<'_, K> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let GateUp { experts, group, .. } = self;
        let (depth, inter) = (experts.gate_up.shape().depth(), experts.inter());
        let middle_depth = experts.down.shape().depth();
        let pairs = &self.plan.pairs[group.pairs.clone()];
        for (i, &pair) in pairs.iter().enumerate() {
            let row = pair as usize / self.plan.top_k;
            for chunk in 0..depth / CHUNK {
                let from = &self.acts[chunk_at(1, depth, row, chunk)..][..CHUNK];
                self.gathered[chunk_at(K::BLOCK, depth, i, chunk)..][..CHUNK].copy_from_slice(from);
            }
        }
        // SAFETY: a group has its rows to itself, and every task of it writes other chunks of them.
        let middle = unsafe { self.middle.at(group.first_row * middle_depth * self.layout.act_bytes) };
        // SAFETY: the form's instructions are available here.
        let session = unsafe { K::begin() };
        let [gate, up] = self.sums else { unreachable!("gate and up have sums") };
        let weights = |(expert, panel)| -> &[K::Weight] {
            let first = experts.gate_panel(expert, panel);
            elements(experts.gate_up.panels_bytes(first..first + 2))
        };
        let mut walk = Walk::new();
        for panel in self.panels.clone() {
            let both = weights((group.expert, panel));
            assert!(both.len() == 2 * K::panel_len(depth), "a panel has the whole depth");
            let (gate_panel, up_panel) = both.split_at(K::panel_len(depth));
            let next =
                Some((group.expert, panel + 1)).filter(|next| next.1 < self.panels.end).or(self.after).map(weights);
            walk.begin::<K>(both, next, pairs.len());
            let width = (inter - panel * PANEL).min(PANEL);
            let mut done = 0;
            while done < pairs.len() {
                let count = (pairs.len() - done).min(K::ROWS);
                // SAFETY: the panels' lengths were checked; the gathered rows are whole blocks; a row's chunks lie
                // inside the buffer, and this task alone writes those of this panel.
                unsafe {
                    let acts = self.gathered.as_ptr().add(done * depth);
                    K::products::<L>(&session, gate_panel.as_ptr(), acts, depth, count, walk.ahead(done), gate);
                    K::products::<L>(&session, up_panel.as_ptr(), acts, depth, count, walk.ahead(done), up);
                    for i in 0..count {
                        swiglu::<L>(&mut gate.0[i], &up.0[i]);
                    }
                    let rows = &gate.0[..count];
                    let (depth, first_chunk) = (middle_depth, panel * PANEL / CHUNK);
                    let put = PutMiddle { rows, width, depth, first_row: done, first_chunk, to: middle };
                    (self.layout.put)(self.form, put);
                }
                done += count;
            }
        }
    }
}

/// `gate = silu(gate) * up`.
///
/// # Safety
/// As the methods of [`Lanes`].
#[inline(always)]
unsafe fn swiglu<L: Lanes>(gate: &mut [f32; PANEL], up: &[f32; PANEL]) {
    let mut lane = 0;
    while lane < PANEL {
        // SAFETY: the caller's contract.
        unsafe {
            let to = gate.as_mut_ptr().add(lane);
            silu_mul(L::load(to), L::load(up.as_ptr().add(lane))).store(to);
        }
        lane += LANES;
    }
}

fn down<K: Kind>(
    form: Form,
    middle: &[K::Act],
    weights: &[f32],
    plan: &ExpertPlan,
    experts: &PackedExperts,
    out: &mut [f32],
) {
    let hidden = experts.hidden();
    let panels = hidden.div_ceil(PANEL);
    let n = out.len() / hidden;
    // Wide parts read the middle less often, narrow ones keep their output in the cache and every thread busy.
    let cached = COLUMN_BYTES / (n * PANEL * 4);
    let shared_out = panels / (2 * pool::threads());
    let together = cached.min(shared_out).max(1);
    let out = Shared::new(out);
    pool::run(panels.div_ceil(together), &|task| {
        let panels = task * together..panels.min((task + 1) * together);
        let (mut totals, mut sums) = (TOTALS.take(), SUMS.take());
        let body = Down::<K> {
            experts,
            middle,
            weights,
            plan,
            totals: totals.take(n * panels.len() * PANEL),
            panels,
            sums: &mut sums.take(1)[0],
            out,
        };
        K::dispatch(form, body);
        TOTALS.set(totals);
        SUMS.set(sums);
    });
}

/// Some columns of the output, for all rows.
struct Down<'a, K: Kind> {
    experts: &'a PackedExperts,
    /// `[plan.rows, depth(inter)]`
    middle: &'a [K::Act],
    /// By pair.
    weights: &'a [f32],
    plan: &'a ExpertPlan,
    panels: Range<usize>,
    /// `[n, 64 * panels]`: side by side, as the output's rows are so far apart that they would share few sets of a cache.
    totals: &'a mut [f32],
    sums: &'a mut Sums,
    /// `[n, hidden]`
    out: Shared<f32>,
}

impl<K: Kind> Body for Down<'_, K> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Down { experts, plan, .. } = self;
        let (hidden, depth) = (experts.hidden(), experts.down.shape().depth());
        let stride = self.panels.len() * PANEL;
        self.totals.fill(0.0);
        // SAFETY: the form's instructions are available here.
        let session = unsafe { K::begin() };
        let sums = self.sums;
        let weights = |group: &Group, panels: &Range<usize>| -> &[K::Weight] {
            let first = experts.down_panel(group.expert, panels.start);
            elements(experts.down.panels_bytes(first..first + panels.len()))
        };
        // After the last group, most likely, this thread begins anew with the columns beside these.
        let beside = self.panels.end..self.panels.end + self.panels.len();
        let beside =
            Some(&plan.groups[0]).filter(|_| beside.end * PANEL <= hidden).map(|first| weights(first, &beside));
        let mut walk = Walk::new();
        for (index, group) in plan.groups.iter().enumerate() {
            let pairs = &plan.pairs[group.pairs.clone()];
            let middle = &self.middle[group.first_row * depth..][..acts_len::<K>(pairs.len(), depth)];
            let stretch = weights(group, &self.panels);
            assert!(stretch.len() == self.panels.len() * K::panel_len(depth), "a panel has the whole depth");
            let next = plan.groups.get(index + 1).map(|group| weights(group, &self.panels)).or(beside);
            walk.begin::<K>(stretch, next, pairs.len());
            for (panel, weights) in stretch.chunks_exact(K::panel_len(depth)).enumerate() {
                let mut done = 0;
                while done < pairs.len() {
                    let count = (pairs.len() - done).min(K::ROWS);
                    // SAFETY: the panel's length was checked; the group's rows are whole blocks.
                    unsafe {
                        let acts = middle.as_ptr().add(done * depth);
                        K::products::<L>(&session, weights.as_ptr(), acts, depth, count, walk.ahead(done), sums);
                    }
                    for i in 0..count {
                        let pair = pairs[done + i] as usize;
                        let to = &mut self.totals[pair / plan.top_k * stride + panel * PANEL..][..PANEL];
                        // SAFETY: the form's instructions are available here.
                        unsafe { add_weighted::<L>(to, self.weights[pair], &sums.0[i]) };
                    }
                    done += count;
                }
            }
        }
        let first = self.panels.start * PANEL;
        let width = stride.min(hidden - first);
        for (row, totals) in self.totals.chunks_exact(stride).enumerate() {
            // SAFETY: this task alone writes these columns, inside the output.
            unsafe { self.out.slice(row * hidden + first, width) }.copy_from_slice(&totals[..width]);
        }
    }
}

/// `to += weight * from`.
///
/// # Safety
/// As the methods of [`Lanes`].
#[inline(always)]
unsafe fn add_weighted<L: Lanes>(to: &mut [f32], weight: f32, from: &[f32; PANEL]) {
    for lane in (0..PANEL).step_by(LANES) {
        let to = to[lane..lane + LANES].as_mut_ptr();
        // SAFETY: sixteen elements are there.
        unsafe { L::load(from.as_ptr().add(lane)).mul_add(L::splat(weight), L::load(to)).store(to) };
    }
}
