use moetrail_kernels::gpu::{Arena, DeviceMatrix, DeviceMatrixBuilder, Gpu, LinearTiling, linear, linear_tiled};
use moetrail_kernels::{PackedMatrix, WeightDtype, WeightView, reference};
use proptest::prelude::*;

use crate::device::{assert_close, buffer, gpu, is_cuda, operand_of, round, wgmma_gpu};
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

    #[test]
    fn wgmma_products_agree(
        seed: u64, n in 1usize..400, ins in 1usize..500, outs in 1usize..300, biased: bool, half: bool, tiling in 0usize..3,
    ) {
        let Some(gpu) = wgmma_gpu(seed) else { return Ok(()) };
        let (arena, mut toss) = (Arena::new(&gpu), Toss::new(seed));
        let dtype = if half { WeightDtype::F16 } else { WeightDtype::BF16 };
        let w = weights(&gpu, &mut toss, outs, ins, dtype);
        let x = activations(&mut toss, n, ins, dtype);
        let bias = biased.then(|| toss.values(outs));
        let on_device = bias.as_ref().map(|bias| buffer(&gpu, bias));
        let x_on_device = operand_of(&arena, &x, ins, dtype);
        let tiling = WGMMA[tiling];
        let out = linear_tiled(&arena, &x_on_device, &w.device, on_device.as_ref(), tiling).unwrap();
        let what = format!("{tiling:?} of {dtype} [{n}, {ins}] x [{outs}, {ins}]");
        assert_product(&out.to_host(0, n).unwrap(), &x, &w, bias.as_deref(), &what);
    }
}

const WGMMA: [LinearTiling; 3] =
    [LinearTiling::Wgmma { tokens: 64 }, LinearTiling::Wgmma { tokens: 128 }, LinearTiling::Wgmma { tokens: 160 }];

fn is_wgmma(tiling: LinearTiling) -> bool {
    matches!(tiling, LinearTiling::Wgmma { .. })
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
        for tiling in LinearTiling::ALL.into_iter().filter(|&tiling| !is_wgmma(tiling)) {
            let out = linear_tiled(&arena, &on_device, &w.device, None, tiling).unwrap().to_host(0, n).unwrap();
            let first = first.get_or_insert_with(|| {
                assert_product(&out, &x, &w, None, &format!("{dtype} [{n}, {ins}] x [{outs}, {ins}]"));
                out.clone()
            });
            assert!(bits(&out).eq(bits(first)), "{tiling:?} of {dtype} [{n}, {ins}] x [{outs}, {ins}]");
        }
    }
}

/// The same of Hopper's tilings: what they promise is to agree with one another. Whether the chip gives the bits of the
/// other tilings too is only told.
#[test]
fn wgmma_tilings_do_not_show() {
    let Some(gpu) = wgmma_gpu(1) else { return };
    for (dtype, n, outs, ins) in [
        (WeightDtype::BF16, 166, 140, 70),
        (WeightDtype::F16, 9, 150, 300),
        (WeightDtype::BF16, 330, 17, 1100),
        (WeightDtype::F16, 64, 129, 1024),
        (WeightDtype::BF16, 1, 1, 1),
    ] {
        let (arena, mut toss) = (Arena::new(&gpu), Toss::new(ins as u64));
        let w = weights(&gpu, &mut toss, outs, ins, dtype);
        let x = activations(&mut toss, n, ins, dtype);
        let on_device = operand_of(&arena, &x, ins, dtype);
        let run = |tiling| linear_tiled(&arena, &on_device, &w.device, None, tiling).unwrap().to_host(0, n).unwrap();
        let shape = format!("{dtype} [{n}, {ins}] x [{outs}, {ins}]");
        let first = run(WGMMA[0]);
        assert_product(&first, &x, &w, None, &shape);
        for tiling in WGMMA {
            assert!(bits(&run(tiling)).eq(bits(&first)), "{tiling:?} of {shape}");
        }
        let other = run(LinearTiling::Tile { tokens: 64 });
        let unequal = bits(&other).zip(bits(&first)).filter(|(other, wgmma)| other != wgmma).count();
        println!("{shape}: {unequal} of {} sums by wgmma have other bits than by mma", first.len());
        // A row alone, and among others.
        for tiling in WGMMA {
            let (first_row, rows) = (toss.below(n), toss.below(n));
            let rows = rows.min(n - first_row - 1) + 1;
            let x = operand_of(&arena, &x[first_row * ins..][..rows * ins], ins, dtype);
            let some = linear_tiled(&arena, &x, &w.device, None, tiling).unwrap().to_host(0, rows).unwrap();
            assert!(
                bits(&some).eq(bits(&first[first_row * outs..][..rows * outs])),
                "{rows} rows of {shape}, {tiling:?}"
            );
        }
    }
}

/// Hopper's tilings are chosen for many rows, and never on a deterministic device.
#[test]
fn determinism_excludes_wgmma() {
    if is_cuda() {
        return;
    }
    let Some(gpu) = wgmma_gpu(4) else { return };
    let mut toss = Toss::new(8);
    let (n, outs, ins, dtype) = (300, 140, 200, WeightDtype::BF16);
    let w = weights(&gpu, &mut toss, outs, ins, dtype);
    let x = activations(&mut toss, n, ins, dtype);
    let run = |gpu: &Gpu, tiling: Option<LinearTiling>| {
        let arena = Arena::new(gpu);
        let x = operand_of(&arena, &x, ins, dtype);
        let out = match tiling {
            Some(tiling) => linear_tiled(&arena, &x, &w.device, None, tiling),
            None => linear(&arena, &x, &w.device, None),
        };
        out.unwrap().to_host(0, n).unwrap()
    };
    let (wgmma, tile) = (run(&gpu, Some(WGMMA[1])), run(&gpu, Some(LinearTiling::Tile { tokens: 128 })));
    assert!(!bits(&wgmma).eq(bits(&tile)), "the emulation tells them apart");
    assert!(bits(&run(&gpu, None)).eq(bits(&wgmma)));
    let deterministic = gpu.clone().with_deterministic(true);
    assert!(deterministic.clone().is_deterministic() && !gpu.is_deterministic());
    assert!(bits(&run(&deterministic, None)).eq(bits(&tile)));
    assert!(gpu.uses_wgmma(WeightDtype::F16) && !gpu.uses_wgmma(WeightDtype::F32));
}

/// The bits of a row do not depend on what else is in the call.
#[test]
fn batches_do_not_show() {
    let Some(gpu) = gpu(2).map(|gpu| gpu.with_deterministic(true)) else { return };
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
