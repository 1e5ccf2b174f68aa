//! The router: the only place where experts are chosen or given, and where the choice is written down.

use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use candle_core::{Device, Result, Tensor};

use crate::buffer::Shared;
use crate::error::{KernelError, check_index, check_shape};
use crate::form::Form;
use crate::packed::PackedMatrix;
use crate::pool;
use crate::product::linear_f32;
use crate::replay::ReplayRows;
use crate::simd::math::exp;
use crate::simd::{Body, LANES, Lanes, dispatch};
use crate::tensor::{unfilled, with_rows};
use crate::weights::WeightView;

const OP: &str = "route";

/// How experts are chosen: softmax over all logits, the `top_k` largest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouterConfig {
    /// Experts of a token.
    pub top_k: usize,
    /// Routed experts.
    pub num_experts: usize,
    /// Whether the weights of a token are divided by their sum.
    pub norm_topk_prob: bool,
}

/// The router's weights `[num_experts, hidden]`, as the checkpoint has them: never quantised, and multiplied in f32.
#[derive(Clone, Debug)]
pub struct RouterWeight {
    gate: PackedMatrix,
}

impl RouterWeight {
    /// Packs the gate in its own dtype.
    pub fn new(gate: WeightView<'_>) -> std::result::Result<RouterWeight, KernelError> {
        let mut builder = PackedMatrix::zeros(gate.rows, gate.cols, gate.dtype);
        builder.put_rows(0, gate)?;
        Ok(RouterWeight { gate: builder.finish() })
    }

    /// Says that the weights are read after the next job; threads that have to wait fetch them meanwhile.
    pub fn announce(&self) {
        self.gate.announce();
    }

    /// Routed experts.
    pub fn num_experts(&self) -> usize {
        self.gate.out_features()
    }

    /// Width of the residual stream.
    pub fn hidden(&self) -> usize {
        self.gate.in_features()
    }

    /// Size in memory.
    pub fn bytes(&self) -> usize {
        self.gate.bytes()
    }
}

/// The cells of the whole ring, `[num_slots, moe_layers, top_k]`.
pub enum RingCells<'a> {
    /// Up to 256 experts.
    U8(&'a mut [u8]),
    /// More experts.
    U16(&'a mut [u16]),
}

/// Where a call's choices go: row `i` to `ring[slots[i], moe_layer, ..]`.
pub struct RingWrite<'a> {
    /// The ring.
    pub cells: RingCells<'a>,
    /// MoE layers of the ring.
    pub moe_layers: usize,
    /// The layer that is routing.
    pub moe_layer: usize,
    /// Slot of each row.
    pub slots: &'a [u32],
}

/// Rows of a call that somebody has to hear of, each list ascending.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RowMarks {
    /// Rows that had a NaN logit; their requests fail.
    pub nan_rows: Vec<u32>,
    /// Replayed rows for which the free router would have chosen another set.
    pub changed_rows: Vec<u32>,
}

/// The chosen experts of a batch.
#[derive(Clone, Debug)]
pub struct Routing {
    /// Expert ids u32 `[n, top_k]`, descending by logit, ties lower id first; those of a replayed row as given.
    pub topk_ids: Tensor,
    /// Their weights f32 `[n, top_k]`.
    pub topk_weights: Tensor,
    /// What is to be told of the rows.
    pub marks: RowMarks,
}

/// Chooses the experts of each row of `x` f32 `[n, hidden]`, or takes those that `replay` gives for it, and writes them
/// to the ring when `capture` is given.
///
/// Logits are f32. The order is descending by logit, ties lower id first; NaN comes last, below -inf; ids are
/// distinct. Capturing changes no bit of the result.
///
/// A replayed row keeps the given ids in the given order, in the result and in the ring; their weights are gathered from
/// the live logits as those of chosen ids are, so that a row's own ids give its own bits. Other rows are not touched.
pub fn route(
    x: &Tensor,
    gate: &RouterWeight,
    cfg: &RouterConfig,
    capture: Option<RingWrite<'_>>,
    replay: Option<ReplayRows<'_>>,
) -> Result<Routing> {
    check_shape(OP, "gate", &[gate.num_experts()], &[cfg.num_experts])?;
    with_rows(OP, "x", x, gate.hidden(), |x, n| {
        let mut logits = unfilled(n * cfg.num_experts);
        linear_f32(Form::current(), x, &gate.gate, &mut logits);
        let mut ids = vec![0; n * cfg.top_k];
        let mut weights = vec![0.0; n * cfg.top_k];
        let marks = select(Form::current(), &logits, cfg, capture, replay, &mut ids, &mut weights)?;
        let shape = (n, cfg.top_k);
        Ok(Routing {
            topk_ids: Tensor::from_vec(ids, shape, &Device::Cpu)?,
            topk_weights: Tensor::from_vec(weights, shape, &Device::Cpu)?,
            marks,
        })
    })
}

/// As [`route`], for given `logits` `[n, num_experts]`: fills `ids` and `weights`, `[n, top_k]`.
///
/// # Errors
/// Nothing is written when a shape, a slot, or a given id does not fit, or a row is given an id twice.
pub fn select(
    form: Form,
    logits: &[f32],
    cfg: &RouterConfig,
    capture: Option<RingWrite<'_>>,
    replay: Option<ReplayRows<'_>>,
    ids: &mut [u32],
    weights: &mut [f32],
) -> std::result::Result<RowMarks, KernelError> {
    let (experts, top_k) = (cfg.num_experts, cfg.top_k);
    check_index(OP, "top_k", top_k.wrapping_sub(1), experts)?;
    let n = logits.len() / experts;
    check_shape(OP, "logits", &[logits.len()], &[n * experts])?;
    check_shape(OP, "ids", &[ids.len()], &[n * top_k])?;
    check_shape(OP, "weights", &[weights.len()], &[n * top_k])?;
    let ring = capture.map(|write| Ring::new(write, cfg, n)).transpose()?;
    if let Some(replay) = &replay {
        replay.check(OP, n, cfg)?;
    }

    const ROWS: usize = 32;
    let mut changed = vec![false; if replay.is_some() { n } else { 0 }];
    let (all_ids, all_weights, all_changed) = (Shared::new(ids), Shared::new(weights), Shared::new(&mut changed));
    pool::run(n.div_ceil(ROWS), &|task| {
        for row in task * ROWS..n.min((task + 1) * ROWS) {
            // SAFETY: each row is taken by one task, and its part lies inside the checked lengths.
            let (ids, weights) = unsafe { (all_ids.slice(row * top_k, top_k), all_weights.slice(row * top_k, top_k)) };
            let logits = &logits[row * experts..][..experts];
            top_k_ids(logits, ids);
            if let Some(replay) = &replay {
                // SAFETY: as above; with a replay there is a flag for every row.
                unsafe { all_changed.slice(row, 1)[0] = replay.put(row, ids) };
            }
            if let Some(ring) = &ring {
                ring.store(row, ids);
            }
            dispatch(form, SoftmaxWeights { logits, ids, normalise: cfg.norm_topk_prob, weights });
        }
    });
    let has_nan = |row: usize| logits[row * experts..][..experts].iter().any(|logit| logit.is_nan());
    Ok(RowMarks { nan_rows: marked(n, has_nan), changed_rows: marked(changed.len(), |row| changed[row]) })
}

/// The rows of `0..n` that have a mark.
fn marked(n: usize, has_mark: impl Fn(usize) -> bool) -> Vec<u32> {
    (0..n).filter(|&row| has_mark(row)).map(|row| row as u32).collect()
}

/// Sorts as the router does when compared as an integer: larger logit first, then lower id, NaN last.
fn sort_key(logit: f32, id: usize) -> u64 {
    // Adding zero turns -0.0 into 0.0: they are equal, so the lower id must win.
    let bits = (logit + 0.0).to_bits();
    let rank = match bits >> 31 {
        _ if logit.is_nan() => 0,
        0 => bits | 1 << 31,
        _ => !bits,
    };
    u64::from(rank) << 32 | u64::from(!(id as u32))
}

/// Writes the ids of the `ids.len()` largest logits in the router's order.
fn top_k_ids(logits: &[f32], ids: &mut [u32]) {
    const STACK: usize = 32;
    let mut stack = [0u64; STACK];
    let mut heap = Vec::new();
    let best: &mut [u64] = if ids.len() <= STACK {
        &mut stack[..ids.len()]
    } else {
        heap.resize(ids.len(), 0);
        &mut heap
    };
    let last = best.len() - 1;
    for (id, &logit) in logits.iter().enumerate() {
        let key = sort_key(logit, id);
        if key <= best[last] {
            continue;
        }
        let mut place = last;
        while place > 0 && best[place - 1] < key {
            best[place] = best[place - 1];
            place -= 1;
        }
        best[place] = key;
    }
    for (id, &key) in ids.iter_mut().zip(&*best) {
        *id = !(key as u32);
    }
}

/// Softmax over all logits of one row, gathered at the chosen ids.
struct SoftmaxWeights<'a> {
    logits: &'a [f32],
    ids: &'a [u32],
    normalise: bool,
    weights: &'a mut [f32],
}

impl Body for SoftmaxWeights<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        // SAFETY: every load and store covers `count` elements inside its slice.
        unsafe {
            let experts = self.logits.len();
            let low = L::splat(f32::NEG_INFINITY);
            let mut max = low;
            let mut at = 0;
            while at < experts {
                let count = (experts - at).min(LANES);
                let logits = L::load_part(self.logits.as_ptr().add(at), count);
                max = max.max(logits.keep(0, count, low));
                at += LANES;
            }
            let max = L::splat(max.reduce_max());
            let mut sum = L::splat(0.0);
            at = 0;
            while at < experts {
                let count = (experts - at).min(LANES);
                let terms = exp(L::load_part(self.logits.as_ptr().add(at), count).sub(max));
                sum = sum.add(terms.keep(0, count, L::splat(0.0)));
                at += LANES;
            }
            let mut total = sum.reduce_add();
            at = 0;
            while at < self.ids.len() {
                let count = (self.ids.len() - at).min(LANES);
                let mut chosen = [0.0; LANES];
                for i in 0..count {
                    chosen[i] = self.logits[self.ids[at + i] as usize];
                }
                exp(L::load(chosen.as_ptr()).sub(max)).store_part(self.weights.as_mut_ptr().add(at), count);
                at += LANES;
            }
            if self.normalise {
                // The softmax's own sum cancels.
                total = 0.0;
                for &weight in &*self.weights {
                    total += weight;
                }
            }
            for weight in self.weights {
                *weight /= total;
            }
        }
    }
}

/// A checked ring, shared by the tasks of one call.
struct Ring<'a> {
    cells: Cells<'a>,
    stride: usize,
    offset: usize,
    slots: &'a [u32],
}

/// Atomic cells: two rows that name one slot (a caller's mistake) then race without undefined behaviour.
enum Cells<'a> {
    U8(&'a [AtomicU8]),
    U16(&'a [AtomicU16]),
}

impl<'a> Ring<'a> {
    fn new(write: RingWrite<'a>, cfg: &RouterConfig, n: usize) -> std::result::Result<Ring<'a>, KernelError> {
        let stride = write.moe_layers * cfg.top_k;
        let (len, max_experts) = match &write.cells {
            RingCells::U8(cells) => (cells.len(), 1 << 8),
            RingCells::U16(cells) => (cells.len(), 1 << 16),
        };
        check_shape(OP, "slots", &[write.slots.len()], &[n])?;
        check_index(OP, "MoE layer", write.moe_layer, write.moe_layers)?;
        check_index(OP, "largest expert id", cfg.num_experts - 1, max_experts)?;
        let num_slots = len / stride;
        check_shape(OP, "ring", &[len], &[num_slots * stride])?;
        for &slot in write.slots {
            check_index(OP, "slot", slot as usize, num_slots)?;
        }
        let cells = match write.cells {
            // SAFETY: an exclusive borrow of plain cells may be seen as shared atomic ones of the same size.
            RingCells::U8(cells) => Cells::U8(unsafe { &*(std::ptr::from_mut(cells) as *const [AtomicU8]) }),
            // SAFETY: as above.
            RingCells::U16(cells) => Cells::U16(unsafe { &*(std::ptr::from_mut(cells) as *const [AtomicU16]) }),
        };
        Ok(Ring { cells, stride, offset: write.moe_layer * cfg.top_k, slots: write.slots })
    }

    fn store(&self, row: usize, ids: &[u32]) {
        let start = self.slots[row] as usize * self.stride + self.offset;
        match self.cells {
            Cells::U8(cells) => {
                for (cell, &id) in cells[start..].iter().zip(ids) {
                    cell.store(id as u8, Ordering::Relaxed);
                }
            }
            Cells::U16(cells) => {
                for (cell, &id) in cells[start..].iter().zip(ids) {
                    cell.store(id as u16, Ordering::Relaxed);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(logits: &[f32], top_k: usize) -> (Vec<u32>, Vec<u32>) {
        let cfg = RouterConfig { top_k, num_experts: logits.len(), norm_topk_prob: true };
        let (mut ids, mut weights) = (vec![0; top_k], vec![0.0; top_k]);
        let marks = select(Form::current(), logits, &cfg, None, None, &mut ids, &mut weights).unwrap();
        (ids, marks.nan_rows)
    }

    #[test]
    fn order_is_by_logit_then_id_with_nan_last() {
        let (inf, nan) = (f32::INFINITY, f32::NAN);
        let check = |logits: &[f32], top_k: usize, ids: &[u32]| {
            let (got, nan_rows) = choose(logits, top_k);
            assert_eq!(got, ids, "{logits:?}");
            assert_eq!(nan_rows.is_empty(), !logits.iter().any(|logit| logit.is_nan()));
        };
        check(&[1.0, 3.0, 2.0], 2, &[1, 2]);
        check(&[1.0, 1.0, 1.0, 1.0], 3, &[0, 1, 2]);
        check(&[-0.0, 0.0, -1.0], 2, &[0, 1]);
        check(&[0.0, -0.0, 1e-40], 3, &[2, 0, 1]);
        check(&[nan, -inf, -5.0, nan], 4, &[2, 1, 0, 3]);
        check(&[nan, -nan, nan], 3, &[0, 1, 2]);
        check(&[-inf, inf, -inf, inf], 4, &[1, 3, 0, 2]);
    }

    #[test]
    fn the_ring_is_written_at_the_slots_and_nowhere_else() {
        let cfg = RouterConfig { top_k: 2, num_experts: 4, norm_topk_prob: false };
        let logits = [0.0, 1.0, 2.0, 3.0, 3.0, 2.0, 1.0, 0.0];
        let (mut ids, mut weights) = (vec![0; 4], vec![0.0; 4]);
        let mut bytes = vec![0xee; 5 * 3 * 2];
        let mut words = vec![0xeeeeu16; 5 * 3 * 2];
        for wide in [false, true] {
            let cells = if wide { RingCells::U16(&mut words) } else { RingCells::U8(&mut bytes) };
            let write = RingWrite { cells, moe_layers: 3, moe_layer: 1, slots: &[4, 1] };
            select(Form::current(), &logits, &cfg, Some(write), None, &mut ids, &mut weights).unwrap();
        }
        let mut expected = vec![0xee; 30];
        expected[26..28].copy_from_slice(&[3, 2]);
        expected[8..10].copy_from_slice(&[0, 1]);
        assert_eq!(bytes, expected);
        let widened: Vec<u16> = expected.iter().map(|&byte| if byte == 0xee { 0xeeee } else { byte.into() }).collect();
        assert_eq!(words, widened);
    }

    #[test]
    fn a_ring_that_does_not_fit_is_refused_before_any_write() {
        let cfg = RouterConfig { top_k: 1, num_experts: 300, norm_topk_prob: false };
        let (mut ids, mut weights) = (vec![0; 1], vec![0.0; 1]);
        let logits = vec![0.0; 300];
        let mut bytes = vec![9; 4];
        let mut words = vec![9; 4];
        let mut refuse = |cells: RingCells<'_>, moe_layer, slots: &[u32]| {
            let write = RingWrite { cells, moe_layers: 2, moe_layer, slots };
            select(Form::current(), &logits, &cfg, Some(write), None, &mut ids, &mut weights).unwrap_err().to_string()
        };
        assert!(refuse(RingCells::U8(&mut bytes), 0, &[0]).contains("largest expert id 299"));
        assert!(refuse(RingCells::U16(&mut words), 2, &[0]).contains("MoE layer 2"));
        assert!(refuse(RingCells::U16(&mut words), 0, &[2]).contains("slot 2"));
        assert!(refuse(RingCells::U16(&mut words), 0, &[0, 1]).contains("slots"));
        assert_eq!((bytes, words), (vec![9; 4], vec![9; 4]));
    }
}
