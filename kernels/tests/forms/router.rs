use candle_core::{Device, Tensor};
use moetrail_kernels::{
    Form, RingCells, RingWrite, RouterConfig, RouterWeight, WeightDtype, WeightView, reference, route, select,
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
                select(form, &pick(&logits, experts, rows), &cfg, None, &mut ids, &mut weights).unwrap();
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
        let captured = route(&x, &gate, &cfg, Some(write)).unwrap();
        let free = route(&x, &gate, &cfg, None).unwrap();
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
