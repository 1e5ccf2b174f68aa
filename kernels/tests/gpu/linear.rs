use moetrail_kernels::gpu::{Arena, DeviceMatrix, DeviceMatrixBuilder, Gpu, LinearTiling, linear, linear_tiled};
use moetrail_kernels::{PackedMatrix, WeightDtype, WeightView, reference};
use proptest::prelude::*;

use crate::device::{assert_close, buffer, gpu, operand_of, round};
use crate::toss::{Toss, dtypes, le_bytes};

/// The same random weights on the device and on the host; they are what memory of the type holds.
struct Weights {
    device: DeviceMatrix,
    host: PackedMatrix,
    values: Vec<f32>,
}

fn weights(gpu: &Gpu, toss: &mut Toss, outs: usize, ins: usize, dtype: WeightDtype) -> Weights {
    let values: Vec<f32> = toss.values(outs * ins).iter().map(|&value| round(value, dtype)).collect();
    let bytes = le_bytes(&values);
    let rows = WeightView::row_major(&bytes, WeightDtype::F32, outs, ins);
    let mut device = DeviceMatrixBuilder::zeros(gpu, outs, ins, dtype).unwrap();
    device.put_rows(0, rows.into()).unwrap();
    let mut host = PackedMatrix::zeros(outs, ins, dtype);
    host.put_rows(0, rows).unwrap();
    Weights { device: device.finish(), host: host.finish(), values }
}

fn activations(toss: &mut Toss, n: usize, ins: usize, dtype: WeightDtype) -> Vec<f32> {
    toss.values(n * ins).iter().map(|&value| round(value, dtype)).collect()
}

/// Fails unless `got` is `x` times the weights, but for the rounding of sums of f32.
fn assert_product(got: &[f32], x: &[f32], w: &Weights, bias: Option<&[f32]>, what: &str) {
    let (outs, ins) = (w.host.out_features(), w.host.in_features());
    let mut expected = vec![0.0; got.len()];
    reference::linear(x, &w.host, bias, &mut expected);
    let magnitude = |i: usize| -> f32 {
        let (x, w) = (&x[i / outs * ins..][..ins], &w.values[i % outs * ins..][..ins]);
        x.iter().zip(w).map(|(x, w)| (x * w).abs()).sum::<f32>() + bias.map_or(0.0, |bias| bias[i % outs].abs())
    };
    // One rounding a term and one a sum, of both, relative to the sum of the terms' sizes.
    assert_close(got, &expected, |i| (ins + 2) as f32 * 1.2e-7 * magnitude(i), what);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn products_agree(
        seed: u64, n in 1usize..150, ins in 1usize..300, outs in 1usize..150, biased: bool, dtype in dtypes(),
    ) {
        let Some(gpu) = gpu(seed) else { return Ok(()) };
        let (arena, mut toss) = (Arena::new(&gpu), Toss::new(seed));
        let w = weights(&gpu, &mut toss, outs, ins, dtype);
        let x = activations(&mut toss, n, ins, dtype);
        let bias = biased.then(|| toss.values(outs));
        let on_device = bias.as_ref().map(|bias| buffer(&gpu, bias));
        let out = linear(&arena, &operand_of(&arena, &x, ins, dtype), &w.device, on_device.as_ref()).unwrap();
        let what = format!("{dtype} [{n}, {ins}] x [{outs}, {ins}]");
        assert_product(&out.to_host(0, n).unwrap(), &x, &w, bias.as_deref(), &what);
    }
}

/// Every tiling gives the same bits, whether K is one segment, some, or as many as there can be; the last is shorter.
#[test]
fn tilings_do_not_show() {
    let Some(gpu) = gpu(1) else { return };
    for (dtype, n, outs, ins) in [
        (WeightDtype::BF16, 66, 40, 70),
        (WeightDtype::F16, 9, 150, 300),
        (WeightDtype::BF16, 70, 17, 1100),
        (WeightDtype::F32, 65, 33, 300),
        (WeightDtype::F32, 3, 20, 1060),
    ] {
        let (arena, mut toss) = (Arena::new(&gpu), Toss::new(ins as u64));
        let w = weights(&gpu, &mut toss, outs, ins, dtype);
        let x = activations(&mut toss, n, ins, dtype);
        let on_device = operand_of(&arena, &x, ins, dtype);
        let mut first: Option<Vec<f32>> = None;
        for tiling in LinearTiling::ALL {
            let out = linear_tiled(&arena, &on_device, &w.device, None, tiling).unwrap().to_host(0, n).unwrap();
            let first = first.get_or_insert_with(|| {
                assert_product(&out, &x, &w, None, &format!("{dtype} [{n}, {ins}] x [{outs}, {ins}]"));
                out.clone()
            });
            assert!(bits(&out).eq(bits(first)), "{tiling:?} of {dtype} [{n}, {ins}] x [{outs}, {ins}]");
        }
    }
}

/// The bits of a row do not depend on what else is in the call.
#[test]
fn batches_do_not_show() {
    let Some(gpu) = gpu(2) else { return };
    for (dtype, outs, ins) in [(WeightDtype::BF16, 130, 280), (WeightDtype::F16, 24, 600), (WeightDtype::F32, 20, 140)]
    {
        let (arena, mut toss) = (Arena::new(&gpu), Toss::new(3));
        let w = weights(&gpu, &mut toss, outs, ins, dtype);
        let most = 260;
        let x = activations(&mut toss, most, ins, dtype);
        let product = |first: usize, n: usize| {
            let x = operand_of(&arena, &x[first * ins..][..n * ins], ins, dtype);
            linear(&arena, &x, &w.device, None).unwrap().to_host(0, n).unwrap()
        };
        let all = product(0, most);
        for n in [1, 7, 8, 9, 16, 17, 32, 33, 64, 65, 130] {
            let first = toss.below(most - n + 1);
            let some = product(first, n);
            assert!(bits(&some).eq(bits(&all[first * outs..][..n * outs])), "{n} of {dtype} rows from {first}");
        }
    }
}

fn bits(values: &[f32]) -> impl Iterator<Item = u32> {
    values.iter().map(|value| value.to_bits())
}

#[test]
fn other_shapes_are_refused() {
    let Some(gpu) = gpu(0) else { return };
    let (arena, mut toss) = (Arena::new(&gpu), Toss::new(0));
    let w = weights(&gpu, &mut toss, 5, 40, WeightDtype::BF16).device;
    let rows = |width: usize, dtype| operand_of(&arena, &vec![1.0; 2 * width], width, dtype);
    assert_eq!(linear(&arena, &rows(40, WeightDtype::BF16), &w, None).unwrap().width(), 5);
    let error = linear(&arena, &rows(41, WeightDtype::BF16), &w, None).unwrap_err().to_string();
    assert!(error.contains("linear: x is [2, 41, 64], expected [2, 40, 64]"), "{error}");
    let bias = buffer(&gpu, &[0.0; 4]);
    linear(&arena, &rows(40, WeightDtype::BF16), &w, Some(&bias)).unwrap_err();
}
