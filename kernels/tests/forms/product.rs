use moetrail_kernels::{Form, WeightDtype, linear, reference};
use proptest::prelude::*;

use crate::rows::{assert_close, check_rows, pick};
use crate::toss::{Toss, dtypes};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn linear_agrees(seed: u64, n in 1usize..40, ins in 1usize..150, outs in 1usize..200, dtype in dtypes(), biased: bool) {
        let mut toss = Toss::new(seed);
        let x = toss.values(n * ins);
        let weight = toss.matrix(outs, ins, dtype);
        let bias = biased.then(|| toss.values(outs));
        let bias = bias.as_deref();
        let mut expected = vec![0.0; n * outs];
        reference::linear(&x, &weight, bias, &mut expected);
        let magnitude = magnitudes(&x, &weight, n);
        for form in Form::available() {
            let got = check_rows(n, &mut toss, |rows| {
                let mut out = vec![f32::NAN; rows.len() * outs];
                linear(form, &pick(&x, ins, rows), &weight, bias, &mut out);
                out
            });
            // One rounding a term, in whatever order, relative to the sum of the terms' sizes.
            let bound = |i: usize| (ins + 2) as f32 * 1.2e-7 * (magnitude[i] + 2.0);
            assert_close(&got, &expected, bound, &format!("{form} {dtype} [{n}, {ins}] x [{outs}, {ins}]"));
        }
    }
}

/// `sum |x| |w|` of each output.
fn magnitudes(x: &[f32], weight: &moetrail_kernels::PackedMatrix, n: usize) -> Vec<f32> {
    let (outs, ins) = (weight.out_features(), weight.in_features());
    let mut row = vec![0.0; ins];
    let mut sums = vec![0.0; n * outs];
    for o in 0..outs {
        weight.unpack_row(o, &mut row);
        for i in 0..n {
            sums[i * outs + o] = row.iter().zip(&x[i * ins..]).map(|(w, x)| (w * x).abs()).sum();
        }
    }
    sums
}

/// Large enough that rows are split into blocks and panels over tasks.
#[test]
fn linear_agrees_on_a_large_shape() {
    let (n, ins, outs) = (500, 512, 256);
    for dtype in [WeightDtype::BF16, WeightDtype::F32] {
        let mut toss = Toss::new(7);
        let x = toss.values(n * ins);
        let weight = toss.matrix(outs, ins, dtype);
        let mut expected = vec![0.0; n * outs];
        reference::linear(&x, &weight, None, &mut expected);
        for form in Form::available() {
            let mut got = vec![0.0; n * outs];
            linear(form, &x, &weight, None, &mut got);
            assert_close(&got, &expected, |_| 5e-3, &format!("{form} {dtype}"));
            let mut alone = vec![0.0; outs];
            linear(form, &x[499 * ins..], &weight, None, &mut alone);
            assert_eq!(alone, got[499 * outs..]);
        }
    }
}
