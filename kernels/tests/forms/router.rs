use std::collections::BTreeSet;

use candle_core::{Device, Tensor};
use moetrail_kernels::{
    Form, ReplayRows, RingCells, RingWrite, RouterConfig, RouterWeight, WeightDtype, WeightView, reference, route,
    select,
};
use proptest::prelude::*;

use crate::replay::{Given, Replay, logits};
use crate::rows::{assert_bits, assert_close, check_rows, pick};
use crate::toss::{Toss, le_bytes};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(80))]

    #[test]
    fn select_agrees(seed: u64, n in 1usize..80, experts in 1usize..200, k in 1usize..40, normalise: bool, odd: bool) {
        let top_k = k.min(experts);
        let cfg = RouterConfig { top_k, num_experts: experts, norm_topk_prob: normalise };
        let mut toss = Toss::new(seed);
        let logits = logits(&mut toss, n * experts, odd);
        for form in Form::available() {
            let run = |rows: &[usize]| {
                let (mut ids, mut weights) = (vec![u32::MAX; rows.len() * top_k], vec![0.0; rows.len() * top_k]);
                select(form, &pick(&logits, experts, rows), &cfg, None, None, &mut ids, &mut weights).unwrap();
                ids.iter().zip(weights).flat_map(|(&id, weight)| [id as f32, weight]).collect()
            };
            let got = check_rows(n, &mut toss, run);
            for (row, got) in got.chunks(2 * top_k).enumerate() {
                let logits = &logits[row * experts..][..experts];
                let ids: Vec<u32> = got.chunks(2).map(|pair| pair[0] as u32).collect();
                assert_eq!(ids, naive(logits)[..top_k], "{form} {logits:?}");
                if logits.iter().all(|logit| !logit.is_nan()) {
                    let mut expected = vec![0.0; top_k];
                    reference::softmax_weights(logits, &ids, normalise, &mut expected);
                    let weights: Vec<f32> = got.chunks(2).map(|pair| pair[1]).collect();
                    assert_close(&weights, &expected, |i| 3e-6 * expected[i] + 1e-30, &format!("{form}"));
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn replay_agrees(seed: u64, n in 1usize..40, experts in 1usize..320, k in 1usize..40, normalise: bool, odd: bool) {
        let top_k = k.min(experts);
        let cfg = RouterConfig { top_k, num_experts: experts, norm_topk_prob: normalise };
        let mut toss = Toss::new(seed);
        let logits = logits(&mut toss, n * experts, odd);
        let own: Vec<Vec<u32>> = logits.chunks(experts).map(|logits| naive(logits)[..top_k].to_vec()).collect();
        let Replay { kinds, given, row_of, ids, moe_layers, moe_layer } = Replay::new(&mut toss, &own, experts);
        for form in Form::available() {
            let run = |rows: &[usize], replay: bool| -> Vec<f32> {
                let row_of: Vec<u32> = rows.iter().map(|&row| row_of[row]).collect();
                let replay = replay.then_some(ReplayRows { row_of: &row_of, ids: &ids, moe_layers, moe_layer });
                let (mut ids, mut weights) = (vec![u32::MAX; rows.len() * top_k], vec![0.0; rows.len() * top_k]);
                let mut ring = vec![u16::MAX; ids.len()];
                let slots: Vec<u32> = (0..rows.len() as u32).collect();
                let write = RingWrite { cells: RingCells::U16(&mut ring), moe_layers: 1, moe_layer: 0, slots: &slots };
                let logits = pick(&logits, experts, rows);
                let marks = select(form, &logits, &cfg, Some(write), replay, &mut ids, &mut weights).unwrap();
                assert!(ring.iter().zip(&ids).all(|(&cell, &id)| u32::from(cell) == id), "the ring has other ids");
                let mark = |rows: &[u32], row: usize| f32::from(u8::from(rows.contains(&(row as u32))));
                let row = |row: usize| {
                    let ids = ids[row * top_k..][..top_k].iter().map(|&id| id as f32);
                    let marks = [mark(&marks.nan_rows, row), mark(&marks.changed_rows, row)];
                    ids.chain(weights[row * top_k..][..top_k].iter().copied()).chain(marks).collect::<Vec<f32>>()
                };
                (0..rows.len()).flat_map(row).collect()
            };
            let free = run(&(0..n).collect::<Vec<_>>(), false);
            let got = check_rows(n, &mut toss, |rows| run(rows, true));
            let width = 2 * top_k + 2;
            for (row, got) in got.chunks(width).enumerate() {
                let (how, own) = (format!("{form} row {row} {:?}", kinds[row]), &free[row * width..][..width]);
                if matches!(kinds[row], Given::Nothing | Given::Own) {
                    assert_bits(got, own, &how);
                    assert_eq!(got[2 * top_k + 1], 0.0, "{how}");
                    continue;
                }
                assert_eq!(got[..top_k].iter().map(|&id| id as u32).collect::<Vec<_>>(), given[row], "{how}");
                assert_eq!(got[2 * top_k], own[2 * top_k], "{how}: NaN logits are reported as without a replay");
                let set = |ids: &[f32]| ids.iter().map(|&id| id as u32).collect::<BTreeSet<_>>();
                let changed = set(&own[..top_k]) != set(&got[..top_k]);
                assert_eq!(got[2 * top_k + 1] == 1.0, changed, "{how}");
                assert!(!changed || kinds[row] == Given::Others, "{how}");
                let logits = &logits[row * experts..][..experts];
                if logits.iter().all(|logit| !logit.is_nan()) {
                    let mut expected = vec![0.0; top_k];
                    reference::softmax_weights(logits, &given[row], normalise, &mut expected);
                    assert_close(&got[top_k..2 * top_k], &expected, |i| 3e-6 * expected[i] + 1e-30, &how);
                }
            }
        }
    }
}

#[test]
fn a_replay_that_does_not_fit_is_refused_before_any_write() {
    let cfg = RouterConfig { top_k: 2, num_experts: 4, norm_topk_prob: true };
    let logits = [0.0, 1.0, 2.0, 3.0, 3.0, 2.0, 1.0, 0.0];
    // Two layers; what the other one holds is not this call's to judge.
    let good = ReplayRows { row_of: &[ReplayRows::FREE, 0], ids: &[9, 9, 3, 1], moe_layers: 2, moe_layer: 1 };
    let (mut ids, mut weights, mut ring) = ([7; 4], [0.5; 4], [9; 4]);
    let mut run = |replay: ReplayRows<'_>| {
        let write = RingWrite { cells: RingCells::U8(&mut ring), moe_layers: 1, moe_layer: 0, slots: &[0, 1] };
        let marks = select(Form::current(), &logits, &cfg, Some(write), Some(replay), &mut ids, &mut weights);
        let untouched = ids == [7; 4] && weights == [0.5; 4] && ring == [9; 4];
        (marks.map_err(|error| error.to_string()), untouched)
    };
    let wrong = [
        (ReplayRows { row_of: &[0], ..good }, "rows of the replay is [1], expected [2]"),
        (ReplayRows { row_of: &[0, 0, 0], ..good }, "rows of the replay is [3], expected [2]"),
        (ReplayRows { row_of: &[0, 1], ..good }, "replayed row 1 is not below 1"),
        (ReplayRows { row_of: &[0, u32::MAX - 1], ..good }, "replayed row 4294967294 is not below 1"),
        (ReplayRows { ids: &[9, 9, 3], ..good }, "replayed ids is [3], expected [0]"),
        (ReplayRows { ids: &[9, 9, 3, 1, 0], ..good }, "replayed ids is [5], expected [4]"),
        (ReplayRows { ids: &[], ..good }, "replayed row 0 is not below 0"),
        (ReplayRows { ids: &[9, 9, 3, 4], ..good }, "replayed expert id 4 is not below 4"),
        (ReplayRows { ids: &[9, 9, 3, u16::MAX], ..good }, "replayed expert id 65535 is not below 4"),
        (ReplayRows { ids: &[9, 9, 3, 3], ..good }, "expert 3 is given twice for row 1"),
        (ReplayRows { moe_layer: 2, ..good }, "replayed MoE layer 2 is not below 2"),
        (ReplayRows { moe_layer: 0, moe_layers: 0, ..good }, "replayed MoE layer 0 is not below 0"),
        (ReplayRows { moe_layers: usize::MAX, ..good }, "replayed ids is [4], expected [0]"),
    ];
    for (replay, expected) in wrong {
        let (marks, untouched) = run(replay);
        let error = marks.unwrap_err();
        assert!(error.contains(expected) && untouched, "{replay:?}: {error}");
    }
    let marks = run(good).0.unwrap();
    assert_eq!((marks.nan_rows, marks.changed_rows), (vec![], vec![1]));
    assert_eq!((ids, ring), ([3, 2, 3, 1], [3, 2, 3, 1]));
}

/// Ids sorted by the definition.
fn naive(logits: &[f32]) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    ids.sort_by(|&a, &b| {
        let (x, y) = (logits[a as usize], logits[b as usize]);
        x.is_nan().cmp(&y.is_nan()).then(y.partial_cmp(&x).unwrap_or(std::cmp::Ordering::Equal)).then(a.cmp(&b))
    });
    ids
}

/// The tensor-level call: logits from the gate, ids in the ring at the slots of this layer and nowhere else, and the
/// same result without a ring.
#[test]
fn route_writes_the_ring_and_changes_nothing_else() {
    let (n, hidden, experts, top_k, layers, slots) = (37, 48, 20, 4, 3, 64);
    let mut toss = Toss::new(11);
    let mut x = toss.values(n * hidden);
    x[5 * hidden] = f32::NAN;
    let gate_bytes = le_bytes(&toss.values(experts * hidden));
    let gate = RouterWeight::new(WeightView::row_major(&gate_bytes, WeightDtype::F32, experts, hidden)).unwrap();
    let cfg = RouterConfig { top_k, num_experts: experts, norm_topk_prob: true };
    let x = Tensor::from_vec(x, (n, hidden), &Device::Cpu).unwrap();
    let written: Vec<u32> = toss.permutation(slots)[..n].iter().map(|&slot| slot as u32).collect();
    for layer in 0..layers {
        let mut ring = vec![0xa5u8; slots * layers * top_k];
        let write =
            RingWrite { cells: RingCells::U8(&mut ring), moe_layers: layers, moe_layer: layer, slots: &written };
        let captured = route(&x, &gate, &cfg, Some(write), None).unwrap();
        let free = route(&x, &gate, &cfg, None, None).unwrap();
        let ids: Vec<u32> = captured.topk_ids.flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(ids, free.topk_ids.flatten_all().unwrap().to_vec1::<u32>().unwrap());
        let weights = |weights: &Tensor| -> Vec<u32> {
            weights.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|weight| weight.to_bits()).collect()
        };
        assert_eq!(weights(&captured.topk_weights), weights(&free.topk_weights));
        assert_eq!(captured.marks.nan_rows, [5]);
        // The same ids given back, to all rows but the first.
        let given: Vec<u16> = ids.iter().map(|&id| id as u16).collect();
        let mut row_of: Vec<u32> = (0..n as u32).collect();
        row_of[0] = ReplayRows::FREE;
        let replay = ReplayRows { row_of: &row_of, ids: &given, moe_layers: 1, moe_layer: 0 };
        let replayed = route(&x, &gate, &cfg, None, Some(replay)).unwrap();
        assert_eq!(ids, replayed.topk_ids.flatten_all().unwrap().to_vec1::<u32>().unwrap());
        assert_eq!(weights(&replayed.topk_weights), weights(&free.topk_weights));
        assert_eq!(replayed.marks, free.marks);
        let mut expected = vec![0xa5u8; ring.len()];
        for (row, &slot) in written.iter().enumerate() {
            for k in 0..top_k {
                expected[(slot as usize * layers + layer) * top_k + k] = ids[row * top_k + k] as u8;
            }
        }
        assert_eq!(ring, expected);
    }
}
