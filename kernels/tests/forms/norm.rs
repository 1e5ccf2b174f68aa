use moetrail_kernels::{Form, add_rms_norm_rows, reference, rms_norm_rows, silu_and_mul_rows};
use proptest::prelude::*;

use crate::rows::{assert_bits, assert_close, check_rows, pick};
use crate::toss::Toss;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn rms_norm_agrees(seed: u64, n in 1usize..40, width in 1usize..1500) {
        let mut toss = Toss::new(seed);
        let x = toss.values(n * width);
        let weight = toss.values(width);
        let mut expected = vec![0.0; n * width];
        for (x, out) in x.chunks(width).zip(expected.chunks_mut(width)) {
            reference::rms_norm(x, &weight, 1e-6, out);
        }
        for form in Form::available() {
            let got = check_rows(n, &mut toss, |rows| {
                let mut out = vec![f32::NAN; rows.len() * width];
                rms_norm_rows(form, &pick(&x, width, rows), &weight, 1e-6, &mut out);
                out
            });
            assert_close(&got, &expected, |i| 1e-4 * expected[i].abs() + 1e-7, &format!("{form} [{n}, {width}]"));
        }
    }

    #[test]
    fn add_rms_norm_is_the_sum_and_its_norm(seed: u64, n in 1usize..40, width in 1usize..1500) {
        let mut toss = Toss::new(seed);
        let (x, y, weight) = (toss.values(n * width), toss.values(n * width), toss.values(width));
        let sum: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
        for form in Form::available() {
            let mut expected = vec![f32::NAN; n * width];
            rms_norm_rows(form, &sum, &weight, 1e-6, &mut expected);
            let both = check_rows(n, &mut toss, |rows| {
                let (x, y) = (pick(&x, width, rows), pick(&y, width, rows));
                let (mut sum, mut out) = (vec![f32::NAN; x.len()], vec![f32::NAN; x.len()]);
                add_rms_norm_rows(form, (&x, &y), &weight, 1e-6, &mut sum, &mut out);
                sum.chunks(width).zip(out.chunks(width)).flat_map(|(sum, out)| [sum, out].concat()).collect()
            });
            for (row, both) in both.chunks(2 * width).enumerate() {
                assert_bits(&both[..width], &sum[row * width..][..width], &format!("{form} sum"));
                assert_bits(&both[width..], &expected[row * width..][..width], &format!("{form} norm"));
            }
        }
    }

    #[test]
    fn silu_and_mul_agrees(seed: u64, n in 1usize..40, inter in 1usize..700) {
        let mut toss = Toss::new(seed);
        let gate_up: Vec<f32> = toss.values(n * 2 * inter).iter().map(|value| value * 20.0).collect();
        let mut expected = vec![0.0; n * inter];
        for (row, out) in gate_up.chunks(2 * inter).zip(expected.chunks_mut(inter)) {
            reference::silu_and_mul(&row[..inter], &row[inter..], out);
        }
        for form in Form::available() {
            let got = check_rows(n, &mut toss, |rows| {
                let mut out = vec![f32::NAN; rows.len() * inter];
                silu_and_mul_rows(form, &pick(&gate_up, 2 * inter, rows), inter, &mut out);
                out
            });
            assert_close(&got, &expected, |i| 1e-6 * expected[i].abs() + 1e-12, &format!("{form} [{n}, {inter}]"));
        }
    }
}
