use candle_core::{Device, Tensor};
use moetrail_kernels::{
    FREE, Form, RingCells, RingWrite, RouterConfig, RouterReplay, RouterSeam, RouterWeight, WeightDtype, WeightView,
    reference, route, select,
};
use proptest::prelude::*;

use crate::rows::{assert_close, check_rows, pick};
use crate::toss::{Toss, le_bytes};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(80))]

    #[test]
    fn select_agrees(seed: u64, n in 1usize..80, experts in 1usize..200, k in 1usize..40, normalise: bool, odd: bool) {
        let top_k = k.min(experts);
        let cfg = RouterConfig { top_k, num_experts: experts, norm_topk_prob: normalise };
        let mut toss = Toss::new(seed);
        // Few distinct values give ties; odd ones are infinite or not a number.
        let specials = [f32::NAN, f32::NEG_INFINITY, 0.0, -0.0, 1.0, 1.5];
        let logits: Vec<f32> = (0..n * experts)
            .map(|_| match toss.below(4) {
                0 if odd => specials[toss.below(specials.len())],
                1 => toss.below(3) as f32,
                _ => toss.value() * 8.0,
            })
            .collect();
        for form in Form::available() {
            let run = |rows: &[usize]| {
                let (mut ids, mut weights) = (vec![u32::MAX; rows.len() * top_k], vec![0.0; rows.len() * top_k]);
                select(form, &pick(&logits, experts, rows), &cfg, RouterSeam::default(), &mut ids, &mut weights).unwrap();
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
        let captured = route(&x, &gate, &cfg, RouterSeam { capture: Some(write), replay: None }).unwrap();
        let free = route(&x, &gate, &cfg, RouterSeam::default()).unwrap();
        let ids: Vec<u32> = captured.topk_ids.flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(ids, free.topk_ids.flatten_all().unwrap().to_vec1::<u32>().unwrap());
        let weights = |weights: &Tensor| -> Vec<u32> {
            weights.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|weight| weight.to_bits()).collect()
        };
        assert_eq!(weights(&captured.topk_weights), weights(&free.topk_weights));
        assert_eq!(captured.nan_rows, [5]);
        let mut expected = vec![0xa5u8; ring.len()];
        for (row, &slot) in written.iter().enumerate() {
            for k in 0..top_k {
                expected[(slot as usize * layers + layer) * top_k + k] = ids[row * top_k + k] as u8;
            }
        }
        assert_eq!(ring, expected);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Replayed rows have the given experts and the live weights; free rows between them are as ever; the ring holds
    /// what was used.
    #[test]
    fn given_experts_take_the_place_of_chosen_ones(
        seed: u64, n in 1usize..80, experts in 2usize..120, k in 1usize..12, normalise: bool, layer in 0usize..3,
    ) {
        let top_k = k.min(experts);
        let cfg = RouterConfig { top_k, num_experts: experts, norm_topk_prob: normalise };
        let mut toss = Toss::new(seed);
        let logits: Vec<f32> = (0..n * experts).map(|_| toss.value() * 8.0).collect();
        // Each row is free, keeps its own experts, has them in another order, or has any others.
        let (mut row_of, mut given) = (Vec::new(), Vec::new());
        for logits in logits.chunks(experts) {
            let own = &naive(logits)[..top_k];
            let cell: Vec<u32> = match toss.below(4) {
                0 => {
                    row_of.push(FREE);
                    continue;
                }
                1 => own.to_vec(),
                2 => own.iter().rev().copied().collect(),
                _ => toss.permutation(experts)[..top_k].iter().map(|id| *id as u32).collect(),
            };
            row_of.push((given.len() / (3 * top_k)) as u32);
            for other in 0..3 {
                let ids = if other == layer { cell.clone() } else { (0..top_k as u32).collect() };
                given.extend(ids.iter().map(|id| *id as u16));
            }
        }
        for form in Form::available() {
            let run = |replayed: bool| {
                let (mut ids, mut weights) = (vec![u32::MAX; n * top_k], vec![0.0; n * top_k]);
                let mut ring = vec![u8::MAX; n * top_k];
                let slots: Vec<u32> = (0..n as u32).collect();
                let capture =
                    RingWrite { cells: RingCells::U8(&mut ring), moe_layers: 1, moe_layer: 0, slots: &slots };
                let replay = RouterReplay { row_of: &row_of, ids: &given, moe_layers: 3 };
                let seam = RouterSeam { capture: Some(capture), replay: replayed.then_some((replay, layer)) };
                let notes = select(form, &logits, &cfg, seam, &mut ids, &mut weights).unwrap();
                assert!(ring.iter().zip(&ids).all(|(cell, id)| u32::from(*cell) == *id), "the ring holds what was used");
                (ids, weights, notes.changed_rows)
            };
            let (free_ids, free_weights, none_changed) = run(false);
            assert_eq!(none_changed, Vec::<u32>::new());
            let (ids, weights, changed_rows) = run(true);
            let mut expect_changed = Vec::new();
            for row in 0..n {
                let span = row * top_k..(row + 1) * top_k;
                let bits = |weights: &[f32]| weights.iter().map(|weight| weight.to_bits()).collect::<Vec<_>>();
                let (ids, weights) = (&ids[span.clone()], &weights[span.clone()]);
                if row_of[row] == FREE {
                    assert_eq!(ids, &free_ids[span.clone()]);
                    assert_eq!(bits(weights), bits(&free_weights[span]));
                    continue;
                }
                let first = (row_of[row] as usize * 3 + layer) * top_k;
                let expect: Vec<u32> = given[first..first + top_k].iter().map(|id| (*id).into()).collect();
                assert_eq!(ids, expect);
                let mut sorted = [expect.clone(), free_ids[span.clone()].to_vec()];
                sorted.iter_mut().for_each(|ids| ids.sort_unstable());
                if sorted[0] != sorted[1] {
                    expect_changed.push(row as u32);
                } else if expect == free_ids[span.clone()] {
                    assert_eq!(bits(weights), bits(&free_weights[span]), "one's own experts change no bit");
                }
                let mut expected = vec![0.0; top_k];
                reference::softmax_weights(&logits[row * experts..][..experts], &expect, normalise, &mut expected);
                assert_close(weights, &expected, |i| 3e-6 * expected[i] + 1e-30, &format!("{form}"));
            }
            assert_eq!(changed_rows, expect_changed);
        }
    }
}
