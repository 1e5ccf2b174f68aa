use moetrail_kernels::gpu::{Arena, DeviceBuffer, DeviceExperts, ExpertTiling, Gpu, expert_ffn, expert_ffn_tiled};
use moetrail_kernels::{ExpertMatrix, PackedExperts, WeightDtype, WeightView, reference};
use proptest::prelude::*;

use crate::device::{assert_close, gpu, half_ulp, is_cuda, operand_of, round, wgmma_gpu};
use crate::toss::{Toss, dtypes, le_bytes};

#[derive(Clone, Copy, Debug)]
struct Shape {
    experts: usize,
    hidden: usize,
    inter: usize,
    top_k: usize,
    dtype: WeightDtype,
}

/// The same random weights on the device and on the host; they are what memory of the type holds.
struct Layer {
    shape: Shape,
    device: DeviceExperts,
    host: PackedExperts,
    /// Gate, up, down of each expert.
    values: Vec<[Vec<f32>; 3]>,
}

impl Layer {
    fn new(gpu: &Gpu, toss: &mut Toss, shape: Shape) -> Layer {
        let Shape { experts, hidden, inter, dtype, .. } = shape;
        let mut device = DeviceExperts::builder(gpu, experts, hidden, inter, dtype).unwrap();
        let mut host = PackedExperts::builder(experts, hidden, inter, dtype, dtype);
        let mut values = Vec::new();
        for expert in 0..experts {
            let mut random =
                || -> Vec<f32> { toss.values(hidden * inter).iter().map(|&value| round(value / 4.0, dtype)).collect() };
            let parts = [random(), random(), random()];
            let bytes = [&parts[0], &parts[1], &parts[2]].map(|values| le_bytes(values));
            let gate = WeightView::row_major(&bytes[0], WeightDtype::F32, inter, hidden);
            let up = WeightView::row_major(&bytes[1], WeightDtype::F32, inter, hidden);
            let down = WeightView::row_major(&bytes[2], WeightDtype::F32, hidden, inter);
            device.put(expert, ExpertMatrix::Gate, gate).unwrap();
            device.put(expert, ExpertMatrix::Up, up).unwrap();
            device.put(expert, ExpertMatrix::Down, down).unwrap();
            host.put(expert, ExpertMatrix::Gate, gate).unwrap();
            host.put(expert, ExpertMatrix::Up, up).unwrap();
            host.put(expert, ExpertMatrix::Down, down).unwrap();
            values.push(parts);
        }
        Layer { shape, device: device.finish(), host: host.finish(), values }
    }
}

/// Tokens and what the router chose for them.
#[derive(Clone)]
struct Call {
    x: Vec<f32>,
    ids: Vec<u32>,
    weights: Vec<f32>,
}

impl Call {
    fn new(toss: &mut Toss, shape: Shape, n: usize) -> Call {
        let Shape { experts, hidden, top_k, dtype, .. } = shape;
        Call {
            x: toss.values(n * hidden).iter().map(|&value| round(value, dtype)).collect(),
            ids: (0..n).flat_map(|_| toss.permutation(experts)[..top_k].to_vec()).map(|id| id as u32).collect(),
            weights: toss.values(n * top_k),
        }
    }

    fn rows(&self, shape: Shape, first: usize, n: usize) -> Call {
        let of = |width: usize| first * width..(first + n) * width;
        Call {
            x: self.x[of(shape.hidden)].to_vec(),
            ids: self.ids[of(shape.top_k)].to_vec(),
            weights: self.weights[of(shape.top_k)].to_vec(),
        }
    }

    fn run(&self, gpu: &Gpu, layer: &Layer, tiling: Option<ExpertTiling>) -> Vec<f32> {
        let (arena, Shape { hidden, top_k, dtype, .. }) = (Arena::new(gpu), layer.shape);
        let x = operand_of(&arena, &self.x, hidden, dtype);
        let (ids, weights) = (DeviceBuffer::of(gpu, &self.ids).unwrap(), DeviceBuffer::of(gpu, &self.weights).unwrap());
        let (ids, weights, experts) = (ids.address(), weights.address(), &layer.device);
        let out = match tiling {
            None => expert_ffn(&arena, &x, ids, weights, top_k, experts),
            Some(tiling) => expert_ffn_tiled(&arena, &x, ids, weights, top_k, experts, tiling),
        };
        out.unwrap().to_host(0, x.len()).unwrap()
    }

    /// Fails unless `got` is what the reference gives, but for roundings.
    fn assert_agrees(&self, layer: &Layer, got: &[f32]) {
        let mut expected = vec![0.0; got.len()];
        reference::expert_ffn(&self.x, &self.ids, &self.weights, &layer.host, &mut expected);
        let bounds = self.bounds(layer);
        assert_close(
            got,
            &expected,
            |i| bounds[i],
            &format!("{:?} of {} rows", layer.shape, self.x.len() / layer.shape.hidden),
        );
    }

    /// How far two results may be apart that sum in different orders, and round the middle once each.
    fn bounds(&self, layer: &Layer) -> Vec<f32> {
        let Shape { hidden, inter, top_k, dtype, .. } = layer.shape;
        let eps = 1.2e-7;
        let mut bounds = Vec::new();
        for (x, (ids, weights)) in self.x.chunks(hidden).zip(self.ids.chunks(top_k).zip(self.weights.chunks(top_k))) {
            let mut row = vec![1e-30; hidden];
            for (&id, weight) in ids.iter().zip(weights) {
                let [gate, up, down] = &layer.values[id as usize];
                let dot = |w: &[f32], i: usize| {
                    let terms = || w[i * hidden..][..hidden].iter().zip(x).map(|(w, x)| w * x);
                    // One rounding a term and one a sum, relative to the sum of the terms' sizes.
                    (terms().sum::<f32>(), terms().map(f32::abs).sum::<f32>() * (hidden + 2) as f32 * eps)
                };
                let mid: Vec<(f32, f32)> = (0..inter)
                    .map(|i| {
                        let ((gate, gate_error), (up, up_error)) = (dot(gate, i), dot(up, i));
                        let silu = gate / (1.0 + (-gate).exp());
                        let value = (silu * up).abs();
                        // The slope of silu is at most 1.1; the device's exponential is not exact.
                        let error = 1.1 * gate_error * (up.abs() + up_error) + silu.abs() * up_error + 4e-6 * value;
                        let least = if dtype == WeightDtype::F16 { 1.0 / (1 << 24) as f32 } else { 0.0 };
                        (value, error + 2.0 * half_ulp(dtype) * (value + error) + least)
                    })
                    .collect();
                for (bound, down) in row.iter_mut().zip(down.chunks(inter)) {
                    let terms = down.iter().zip(&mid);
                    let error: f32 = terms
                        .map(|(down, (value, error))| down.abs() * (error + value * (inter + top_k + 3) as f32 * eps))
                        .sum();
                    *bound += weight.abs() * error;
                }
            }
            bounds.extend(row);
        }
        bounds
    }
}

fn assert_bits(got: &[f32], expected: &[f32], what: &str) {
    let bits = |values: &[f32]| -> Vec<u32> { values.iter().map(|value| value.to_bits()).collect() };
    assert!(bits(got) == bits(expected), "{what}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn experts_agree(
        seed: u64, n in 1usize..40, hidden in 1usize..150, inter in 1usize..150, experts in 1usize..12, k in 1usize..5,
        dtype in dtypes(),
    ) {
        let Some(gpu) = gpu(seed) else { return Ok(()) };
        let mut toss = Toss::new(seed);
        let layer = Layer::new(&gpu, &mut toss, Shape { experts, hidden, inter, top_k: k.min(experts), dtype });
        let call = Call::new(&mut toss, layer.shape, n);
        call.assert_agrees(&layer, &call.run(&gpu, &layer, None));
    }

    #[test]
    fn wgmma_experts_agree(
        seed: u64, n in 1usize..200, hidden in 1usize..200, inter in 1usize..200, experts in 1usize..6, k in 1usize..4,
        half: bool, tiling in 0usize..3,
    ) {
        let Some(gpu) = wgmma_gpu(seed) else { return Ok(()) };
        let dtype = if half { WeightDtype::F16 } else { WeightDtype::BF16 };
        let mut toss = Toss::new(seed);
        let layer = Layer::new(&gpu, &mut toss, Shape { experts, hidden, inter, top_k: k.min(experts), dtype });
        let call = Call::new(&mut toss, layer.shape, n);
        call.assert_agrees(&layer, &call.run(&gpu, &layer, Some(WGMMA[tiling])));
    }
}

const WGMMA: [ExpertTiling; 3] = [ExpertTiling::Wgmma(64), ExpertTiling::Wgmma(128), ExpertTiling::Wgmma(160)];

/// Every tiling gives the same bits: one expert has most tokens, some have none, one has the rest.
#[test]
fn tilings_do_not_show() {
    let Some(gpu) = gpu(1) else { return };
    for (dtype, hidden, inter) in
        [(WeightDtype::BF16, 300, 40), (WeightDtype::F16, 40, 300), (WeightDtype::F32, 140, 20)]
    {
        let mut toss = Toss::new(7);
        let layer = Layer::new(&gpu, &mut toss, Shape { experts: 4, hidden, inter, top_k: 1, dtype });
        let mut call = Call::new(&mut toss, layer.shape, 75);
        for (i, id) in call.ids.iter_mut().enumerate() {
            *id = if i % 8 == 3 { 3 } else { 1 };
        }
        let first = call.run(&gpu, &layer, Some(ExpertTiling::ALL[0]));
        call.assert_agrees(&layer, &first);
        for tiling in ExpertTiling::ALL.into_iter().filter(|tiling| !WGMMA.contains(tiling)) {
            assert_bits(&call.run(&gpu, &layer, Some(tiling)), &first, &format!("{tiling:?} of {:?}", layer.shape));
        }
    }
}

/// The same of Hopper's tilings, which promise to agree with one another; and a row is the same among fewer.
#[test]
fn wgmma_tilings_do_not_show() {
    let Some(gpu) = wgmma_gpu(1) else { return };
    for (dtype, hidden, inter) in [(WeightDtype::BF16, 300, 140), (WeightDtype::F16, 140, 300)] {
        let mut toss = Toss::new(7);
        let layer = Layer::new(&gpu, &mut toss, Shape { experts: 4, hidden, inter, top_k: 1, dtype });
        let mut call = Call::new(&mut toss, layer.shape, 230);
        for (i, id) in call.ids.iter_mut().enumerate() {
            *id = if i % 8 == 3 { 3 } else { 1 };
        }
        let first = call.run(&gpu, &layer, Some(WGMMA[0]));
        call.assert_agrees(&layer, &first);
        for tiling in WGMMA {
            assert_bits(&call.run(&gpu, &layer, Some(tiling)), &first, &format!("{tiling:?} of {:?}", layer.shape));
            let some = call.rows(layer.shape, 37, 101).run(&gpu, &layer, Some(tiling));
            assert_bits(&some, &first[37 * hidden..][..101 * hidden], &format!("{tiling:?} of {:?}", layer.shape));
        }
    }
}

/// Hopper's tilings are chosen where experts have many pairs, and never on a deterministic device.
#[test]
fn determinism_excludes_wgmma() {
    if is_cuda() {
        return;
    }
    let Some(gpu) = wgmma_gpu(4) else { return };
    let mut toss = Toss::new(8);
    let shape = Shape { experts: 2, hidden: 70, inter: 70, top_k: 1, dtype: WeightDtype::BF16 };
    let layer = Layer::new(&gpu, &mut toss, shape);
    let call = Call::new(&mut toss, shape, 80);
    let (wgmma, tile) = (call.run(&gpu, &layer, Some(WGMMA[0])), call.run(&gpu, &layer, Some(ExpertTiling::Tile(64))));
    assert!(wgmma != tile, "the emulation tells them apart");
    assert_bits(&call.run(&gpu, &layer, None), &wgmma, "by default");
    assert_bits(&call.run(&gpu.with_deterministic(true), &layer, None), &tile, "deterministic");
}

/// The bits of a row do not depend on what else is in the call, nor on the order of its ids.
#[test]
fn batches_do_not_show() {
    let Some(gpu) = gpu(2).map(|gpu| gpu.with_deterministic(true)) else { return };
    for (dtype, experts, top_k) in [(WeightDtype::BF16, 5, 2), (WeightDtype::F16, 2, 2), (WeightDtype::F32, 3, 3)] {
        let (mut toss, most) = (Toss::new(9), 140);
        let layer = Layer::new(&gpu, &mut toss, Shape { experts, hidden: 70, inter: 36, top_k, dtype });
        let call = Call::new(&mut toss, layer.shape, most);
        let all = call.run(&gpu, &layer, None);
        for n in [1, 7, 8, 9, 17, 33, 65, 130] {
            let first = toss.below(most - n + 1);
            let mut some = call.rows(layer.shape, first, n);
            some.ids.chunks_mut(top_k).for_each(<[u32]>::reverse);
            some.weights.chunks_mut(top_k).for_each(<[f32]>::reverse);
            let what = format!("{n} rows from {first}, {:?}", layer.shape);
            assert_bits(&some.run(&gpu, &layer, None), &all[first * 70..][..n * 70], &what);
        }
    }
}

/// Many pairs, more experts than a warp has lanes, some of which get none: sorting is by many warps.
#[test]
fn many_experts_agree() {
    let Some(gpu) = gpu(3) else { return };
    let mut toss = Toss::new(4);
    let shape = Shape { experts: 75, hidden: 18, inter: 5, top_k: 8, dtype: WeightDtype::BF16 };
    let layer = Layer::new(&gpu, &mut toss, shape);
    let mut call = Call::new(&mut toss, shape, 170);
    // A token names an expert once, as routers do; two of three experts are left to a few tokens.
    for ids in call.ids.chunks_mut(8).skip(5) {
        let start = toss.below(17);
        ids.iter_mut().enumerate().for_each(|(k, id)| *id = ((start + k) * 3) as u32);
    }
    call.assert_agrees(&layer, &call.run(&gpu, &layer, None));
}

/// A pair without an expert adds nothing, and a row without any is zero.
#[test]
fn pairs_without_an_expert_are_left_out() {
    let Some(gpu) = gpu(5) else { return };
    let mut toss = Toss::new(6);
    let shape = Shape { experts: 3, hidden: 33, inter: 17, top_k: 2, dtype: WeightDtype::F16 };
    let layer = Layer::new(&gpu, &mut toss, shape);
    let mut call = Call::new(&mut toss, shape, 9);
    let whole = call.run(&gpu, &layer, None);
    let mut alone = call.clone();
    alone.weights[2 * 4] = 0.0;
    let alone = alone.run(&gpu, &layer, None);
    call.ids[2 * 4] = u32::MAX;
    call.ids[2 * 6] = 3;
    call.ids[2 * 6 + 1] = 4;
    let got = call.run(&gpu, &layer, None);
    for row in 0..9 {
        let of = |values: &[f32]| values[row * 33..][..33].to_vec();
        match row {
            4 => assert_eq!(of(&got), of(&alone)),
            6 => assert_eq!(of(&got), [0.0; 33]),
            _ => assert_bits(&of(&got), &of(&whole), "other rows"),
        }
    }
}

#[test]
fn other_shapes_are_refused() {
    let Some(gpu) = gpu(0) else { return };
    let arena = Arena::new(&gpu);
    let mut builder = DeviceExperts::builder(&gpu, 2, 40, 3, WeightDtype::BF16).unwrap();
    let bytes = vec![0u8; 40 * 3 * 4];
    let view = |rows, cols| WeightView::row_major(&bytes, WeightDtype::F32, rows, cols);
    builder.put(1, ExpertMatrix::Gate, view(3, 40)).unwrap();
    assert!(builder.put(2, ExpertMatrix::Up, view(3, 40)).unwrap_err().to_string().contains("expert 2 is not below 2"));
    let error = builder.put(1, ExpertMatrix::Down, view(3, 40)).unwrap_err().to_string();
    assert!(error.contains("put experts: weight is [3, 40], expected [40, 3]"), "{error}");
    let experts = builder.finish();
    // Gate and up: a panel of 64 columns each; down: 3 panels of 32.
    assert_eq!(experts.bytes(), 2 * 2 * (2 * 16 * 64 + 3 * 16 * 32));
    let buffer = DeviceBuffer::of(&gpu, &[0u32; 33]).unwrap();
    let ids = buffer.address();
    let x = |width: usize| operand_of(&arena, &vec![1.0; width], width, WeightDtype::BF16);
    let error = expert_ffn(&arena, &x(41), ids, ids, 1, &experts).unwrap_err().to_string();
    assert!(error.contains("expert_ffn: x is [1, 41, 64], expected [1, 40, 64]"), "{error}");
    let error = expert_ffn(&arena, &x(40), ids, ids, 33, &experts).unwrap_err().to_string();
    assert!(error.contains("top_k 33 is not below 33"), "{error}");
    assert_eq!(
        expert_ffn(&arena, &operand_of(&arena, &[], 40, WeightDtype::BF16), ids, ids, 1, &experts).unwrap().len(),
        0
    );
}
