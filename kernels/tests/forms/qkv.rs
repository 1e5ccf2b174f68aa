use half::{bf16, f16};
use moetrail_kernels::{AttentionShape, Form, KvPool, QkNorm, QkvCall, RopeTable, WeightDtype, reference};
use proptest::prelude::*;

use crate::rows::{assert_close, check_rows, pick};
use crate::toss::{Toss, dtypes};

#[derive(Clone, Copy, Debug)]
enum Norm {
    None,
    PerHead,
    Whole,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn qkv_rope_store_agrees(
        seed: u64, n in 1usize..40, kv_heads in 1usize..4, group in 1usize..4, half in 1usize..40, pass in 0usize..5,
        dtype in dtypes(), clip: bool, norm in prop_oneof![Just(Norm::None), Just(Norm::PerHead), Just(Norm::Whole)],
    ) {
        let head_dim = 2 * half + pass;
        let clip_qkv = clip.then_some(0.75);
        let heads = kv_heads * group;
        let shape = AttentionShape { heads, kv_heads, head_dim, scale: 1.0, window: None, clip_qkv };
        let (q_width, kv_width) = (heads * head_dim, kv_heads * head_dim);
        let width = q_width + 2 * kv_width;
        let mut toss = Toss::new(seed);
        let qkv = toss.values(n * width);
        let rope = RopeTable::new((0..half).map(|i| 0.9f32.powi(i as i32)).collect(), 1.25, 3000);
        let norm = match norm {
            Norm::None => None,
            Norm::PerHead => Some((head_dim, head_dim)),
            Norm::Whole => Some((q_width, kv_width)),
        };
        let norm = norm.map(|(q, k)| QkNorm {
            q_weight: toss.values(q), k_weight: toss.values(k), eps: 1e-5, per_head: q == head_dim && k == head_dim,
        });
        let positions: Vec<u32> = (0..n).map(|_| toss.below(3000) as u32).collect();
        let slots: Vec<u32> = toss.permutation(2 * n)[..n].iter().map(|&slot| slot as u32).collect();

        let mut expected = qkv.clone();
        for (row, &position) in expected.chunks_mut(width).zip(&positions) {
            reference::qkv_rope(row, &shape, norm.as_ref(), &rope, position);
        }
        for form in Form::available() {
            let got = check_rows(n, &mut toss, |rows| {
                let choose = |from: &[u32]| -> Vec<u32> { rows.iter().map(|&row| from[row]).collect() };
                let (positions, slots) = (choose(&positions), choose(&slots));
                let mut kv = KvPool::new(1, 2 * n, 1, kv_heads, head_dim, dtype);
                let mut q = vec![f32::NAN; rows.len() * q_width];
                let call = QkvCall {
                    shape: &shape, norm: norm.as_ref(), rope: &rope, positions: &positions, slots: &slots,
                };
                call.run(form, &pick(&qkv, width, rows), &mut q, kv.layer_mut(0)).unwrap();
                q.chunks(q_width).zip(&slots).flat_map(|(q, &slot)| [q.to_vec(), stored(&kv, slot)].concat()).collect()
            });
            // A cached value is within half a unit in its last place, plus the forms' own difference.
            let unit = match dtype {
                WeightDtype::F32 => 0.0,
                WeightDtype::BF16 => 1.0 / 256.0,
                WeightDtype::F16 => 1.0 / 2048.0,
            };
            let bound = |i: usize| {
                let unit = if i % width < q_width { 0.0 } else { unit };
                expected[i].abs() * unit + 2e-5
            };
            assert_close(&got, &expected, bound, &format!("{form} {dtype} {shape:?}"));
        }
    }
}

/// K then V of a slot (blocks of one slot) as f32.
fn stored(kv: &KvPool, slot: u32) -> Vec<f32> {
    let mut bytes = vec![0; kv.bytes() / kv.num_blocks()];
    kv.read_block(slot, &mut bytes);
    let pair = |pair: &[u8]| u16::from_le_bytes([pair[0], pair[1]]);
    match kv.dtype() {
        WeightDtype::F32 => bytes.chunks(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        WeightDtype::BF16 => bytes.chunks(2).map(|b| bf16::from_bits(pair(b)).to_f32()).collect(),
        WeightDtype::F16 => bytes.chunks(2).map(|b| f16::from_bits(pair(b)).to_f32()).collect(),
    }
}

#[test]
fn bad_slots_and_positions_are_refused() {
    let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim: 2, scale: 1.0, window: None, clip_qkv: None };
    let rope = RopeTable::new(vec![1.0], 1.0, 4);
    let refuse = |positions: &[u32], slots: &[u32]| {
        let mut kv = KvPool::new(1, 2, 4, 1, 2, WeightDtype::F32);
        let call = QkvCall { shape: &shape, norm: None, rope: &rope, positions, slots };
        call.run(Form::current(), &[0.0; 12], &mut [0.0; 4], kv.layer_mut(0)).unwrap_err().to_string()
    };
    assert!(refuse(&[0, 4], &[0, 1]).contains("position 4 is not below 4"));
    assert!(refuse(&[0, 1], &[0, 8]).contains("slot 8 is not below 8"));
    assert!(refuse(&[0, 1], &[3, 3]).contains("slot 3 is written by two rows"));
    assert!(refuse(&[0], &[3, 2]).contains("positions"));
}
