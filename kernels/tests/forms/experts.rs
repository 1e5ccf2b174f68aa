use moetrail_kernels::{
    ExpertMatrix, Form, PackedExperts, WeightDtype, WeightFormat, WeightView, experts_rows, reference,
};
use proptest::prelude::*;

use crate::rows::{assert_close, check_rows, pick};
use crate::toss::{Toss, formats, ggml_type};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn expert_ffn_agrees(
        seed: u64, n in 1usize..60, hidden in 1usize..150, inter in 1usize..150, experts in 1usize..12,
        k in 1usize..5, (gate_up, block) in formats(), (down, down_block) in formats(),
    ) {
        let (hidden, inter) = (hidden.next_multiple_of(block), inter.next_multiple_of(down_block));
        check(seed, n, hidden, inter, experts, k.min(experts), [gate_up, down]);
    }
}

/// One expert has more rows than a task takes.
#[test]
fn a_crowded_expert_agrees() {
    check(3, 230, 70, 66, 2, 2, [WeightDtype::BF16.into(); 2]);
    check(3, 230, 70, 66, 2, 2, [WeightFormat::Int8; 2]);
    check(3, 230, 256, 256, 2, 2, [WeightFormat::Q4K, WeightFormat::Q8_0]);
    check(5, 230, 256, 66, 2, 2, [WeightFormat::Q4K, WeightDtype::BF16.into()]);
    check(6, 230, 70, 64, 2, 2, [WeightDtype::BF16.into(), WeightFormat::Int8]);
    check(4, 1100, 20, 10, 3, 1, [WeightDtype::F32.into(); 2]);
}

fn check(seed: u64, n: usize, hidden: usize, inter: usize, experts: usize, top_k: usize, formats: [WeightFormat; 2]) {
    let mut toss = Toss::new(seed);
    let packed = packed(&mut toss, hidden, inter, experts, formats);
    let x = toss.values(n * hidden);
    let ids: Vec<u32> =
        (0..n).flat_map(|_| toss.permutation(experts)[..top_k].to_vec()).map(|expert| expert as u32).collect();
    let weights: Vec<f32> = (0..n * top_k).map(|_| toss.value().abs()).collect();
    let mut expected = vec![0.0; n * hidden];
    reference::expert_ffn(&x, &ids, &weights, &packed, &mut expected);
    let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    // The middle is rounded, to bf16 or to eight bits: where the forms' values straddle a rounding point it differs by
    // one in 256, or in 127 of the largest beside it.
    let relative = match formats[1] {
        WeightFormat::Float(WeightDtype::F32 | WeightDtype::F16) => 2e-5,
        WeightFormat::Float(WeightDtype::BF16) => 4e-3,
        _ => 8e-3,
    };
    for form in Form::available() {
        let got = check_rows(n, &mut toss, |rows| {
            let ids: Vec<u32> = rows.iter().flat_map(|&row| ids[row * top_k..][..top_k].to_vec()).collect();
            let mut out = vec![f32::NAN; rows.len() * hidden];
            let weights = pick(&weights, top_k, rows);
            experts_rows(form, &pick(&x, hidden, rows), &ids, &weights, &packed, &mut out).unwrap();
            out
        });
        let how = format!("{form} {formats:?} n {n} hidden {hidden} inter {inter} experts {experts} k {top_k}");
        assert_close(&got, &expected, |_| relative * largest + 1e-6, &how);
    }
}

fn packed(toss: &mut Toss, hidden: usize, inter: usize, experts: usize, formats: [WeightFormat; 2]) -> PackedExperts {
    let [gate_up, down] = formats;
    let mut builder = PackedExperts::builder(experts, hidden, inter, gate_up, down);
    for expert in 0..experts {
        toss.stored(inter, hidden, gate_up).with(|rows| builder.put(expert, ExpertMatrix::Gate, rows)).unwrap();
        // Stacked checkpoints hold the transposed weights.
        let up = toss.stored(inter, hidden, gate_up);
        let turned = WeightView::transposed(&up.bytes, WeightDtype::F32, inter, hidden);
        let floats = ggml_type(gate_up).is_none();
        up.with(|rows| builder.put(expert, ExpertMatrix::Up, if floats { turned.into() } else { rows })).unwrap();
        toss.stored(hidden, inter, down).with(|rows| builder.put(expert, ExpertMatrix::Down, rows)).unwrap();
    }
    builder.finish()
}

#[test]
fn an_expert_outside_the_layer_is_refused() {
    let packed = packed(&mut Toss::new(1), 4, 4, 2, [WeightDtype::F32.into(); 2]);
    let error = experts_rows(Form::current(), &[0.0; 4], &[2], &[1.0], &packed, &mut [0.0; 4]).unwrap_err();
    assert!(error.to_string().contains("expert id 2 is not below 2"), "{error}");
}
