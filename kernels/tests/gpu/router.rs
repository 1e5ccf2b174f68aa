use moetrail_kernels::gpu::{
    Address, Arena, DeviceBuffer, DeviceReplay, DeviceRing, DeviceRingWrite, DeviceRouter, DeviceRouterConfig,
    DeviceRouting, Gpu, RoutedRows, Scoring, route, select,
};
use moetrail_kernels::{RouterConfig, WeightDtype, WeightView, reference};
use proptest::prelude::*;

use crate::device::{assert_close, buffer, floats, gpu, operand_of, round};
use crate::replay::{Given, Replay, logits};
use crate::toss::{Toss, dtypes, le_bytes};

fn softmax(top_k: usize, num_experts: usize, norm_topk_prob: bool) -> DeviceRouterConfig {
    RouterConfig { top_k, num_experts, norm_topk_prob }.into()
}

/// A choice on the host.
#[derive(Debug, PartialEq)]
struct Chosen {
    ids: Vec<u32>,
    weights: Vec<f32>,
    nan: Vec<u32>,
    changed: Vec<u32>,
}

impl Chosen {
    fn read(gpu: &Gpu, routing: &DeviceRouting, n: usize, top_k: usize, marks: &DeviceBuffer) -> Chosen {
        let marks: Vec<u32> = gpu.read(marks.address(), 2 * n).unwrap();
        Chosen {
            ids: gpu.read(routing.topk_ids.address(), n * top_k).unwrap(),
            weights: gpu.read(routing.topk_weights.address(), n * top_k).unwrap(),
            nan: marks[..n].to_vec(),
            changed: marks[n..].to_vec(),
        }
    }

    /// What must be the same bits however the row is computed.
    fn row(&self, row: usize, top_k: usize) -> (Vec<u32>, Vec<u32>, u32, u32) {
        let weights = self.weights[row * top_k..][..top_k].iter().map(|weight| weight.to_bits()).collect();
        (self.ids[row * top_k..][..top_k].to_vec(), weights, self.nan[row], self.changed[row])
    }
}

fn no_marks(gpu: &Gpu, n: usize) -> DeviceBuffer {
    DeviceBuffer::of(gpu, &vec![0u32; 2 * n]).unwrap()
}

fn choose(gpu: &Gpu, logits: &[f32], cfg: &DeviceRouterConfig, bias: Option<&[f32]>) -> Chosen {
    let (arena, n) = (Arena::new(gpu), logits.len() / cfg.num_experts);
    let marks = no_marks(gpu, n);
    let bias = bias.map(|bias| buffer(gpu, bias));
    let logits = floats(&arena, logits, cfg.num_experts);
    let routing = select(&arena, logits, cfg, bias.as_ref(), &RoutedRows::free(marks.address())).unwrap();
    Chosen::read(gpu, &routing, n, cfg.top_k, &marks)
}

fn check_weights(logits: &[f32], ids: &[u32], weights: &[f32], cfg: &DeviceRouterConfig) {
    let expected = reference::expert_weights(logits, ids, cfg);
    if expected.iter().all(|weight| weight.is_finite()) {
        assert_close(weights, &expected, |i| 3e-6 * expected[i].abs() + 1e-30, "weights");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(80))]

    #[test]
    fn select_agrees(seed: u64, n in 1usize..12, experts in 1usize..300, k in 1usize..33, normalise: bool, odd: bool) {
        let Some(gpu) = gpu(seed) else { return Ok(()) };
        let cfg = softmax(k.min(experts), experts, normalise);
        let mut toss = Toss::new(seed);
        let logits = logits(&mut toss, n * experts, odd);
        let got = choose(&gpu, &logits, &cfg, None);
        for (row, logits) in logits.chunks(experts).enumerate() {
            let (ids, _, nan, changed) = got.row(row, cfg.top_k);
            assert_eq!(ids, reference::choose_experts(logits, None, &cfg), "{logits:?}");
            assert_eq!((nan, changed), (u32::from(logits.iter().any(|logit| logit.is_nan())), 0));
            check_weights(logits, &ids, &got.weights[row * cfg.top_k..][..cfg.top_k], &cfg);
        }
        let row = toss.below(n);
        let alone = choose(&gpu, &logits[row * experts..][..experts], &cfg, None);
        assert_eq!(alone.row(0, cfg.top_k), got.row(row, cfg.top_k), "a row alone");
    }

    #[test]
    fn sigmoids_and_groups_agree(
        seed: u64,
        n in 1usize..9,
        n_group in prop_oneof![Just(1), Just(2), Just(5), Just(8), Just(32)],
        size in 1usize..33,
        biased: bool,
        normalise: bool,
        odd: bool,
    ) {
        let Some(gpu) = gpu(seed) else { return Ok(()) };
        let mut toss = Toss::new(seed);
        let (experts, topk_group) = (n_group * size, 1 + toss.below(n_group));
        let cfg = DeviceRouterConfig {
            top_k: 1 + toss.below((topk_group * size).min(32)),
            num_experts: experts,
            norm_topk_prob: normalise,
            scoring: Scoring::Sigmoid { n_group, topk_group },
            routed_scaling_factor: [1.0, 2.5][toss.below(2)],
        };
        let logits = logits(&mut toss, n * experts, odd);
        // Some below every sigmoid: an excluded expert is not a zero that beats them.
        let bias: Vec<f32> = (0..experts).map(|_| [0.0, 0.25, -2.0, toss.value()][toss.below(4)]).collect();
        let bias = biased.then_some(&*bias);
        let got = choose(&gpu, &logits, &cfg, bias);
        for (row, logits) in logits.chunks(experts).enumerate() {
            let (ids, ..) = got.row(row, cfg.top_k);
            let expected = reference::choose_experts(logits, bias, &cfg);
            let scores = reference::compared_scores(logits, bias, cfg.scoring);
            assert!(ids == expected || nearly_tied(&scores), "{ids:?}, expected {expected:?}: {scores:?}");
            check_weights(logits, &ids, &got.weights[row * cfg.top_k..][..cfg.top_k], &cfg);
        }
    }
}

/// Whether the last bit of a sigmoid, which devices may compute otherwise, could decide.
fn nearly_tied(scores: &[f32]) -> bool {
    if std::env::var("MOETRAIL_TEST_DEVICE").is_err() {
        return false;
    }
    let mut sums: Vec<f32> = scores.to_vec();
    for (i, a) in scores.iter().enumerate() {
        sums.extend(scores[i + 1..].iter().map(|b| a + b));
    }
    sums.sort_by(f32::total_cmp);
    sums.windows(2).any(|pair| pair[0] != pair[1] && (pair[1] - pair[0]).abs() < 1e-6)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// The ring takes what was decided, at the slots of the rows, and nothing of a padded row.
    #[test]
    fn replay_agrees(seed: u64, n in 1usize..12, experts in 1usize..400, k in 1usize..33, normalise: bool, odd: bool) {
        let Some(gpu) = gpu(seed) else { return Ok(()) };
        let cfg = softmax(k.min(experts), experts, normalise);
        let top_k = cfg.top_k;
        let (arena, mut toss) = (Arena::new(&gpu), Toss::new(seed));
        let logits = logits(&mut toss, n * experts, odd);
        let own: Vec<Vec<u32>> =
            logits.chunks(experts).map(|logits| reference::choose_experts(logits, None, &cfg)).collect();
        let Replay { kinds, given, row_of, ids, moe_layers, moe_layer } = Replay::new(&mut toss, &own, experts);
        let (on_device, ids) = (DeviceBuffer::of(&gpu, &row_of).unwrap(), DeviceBuffer::of(&gpu, &ids).unwrap());
        let replay = DeviceReplay { row_of: on_device.address(), ids: ids.address(), moe_layers, moe_layer };

        let wide = experts > 256 || toss.below(2) == 0;
        let ring = DeviceRing::new(&gpu, 2 * n, 2, top_k, wide).unwrap();
        ring.fill(0xa5).unwrap();
        let slots: Vec<u32> = toss.permutation(2 * n)[..n]
            .iter()
            .map(|&slot| if toss.below(4) == 0 { u32::MAX } else { slot as u32 })
            .collect();
        let on_device = DeviceBuffer::of(&gpu, &slots).unwrap();
        let capture = DeviceRingWrite { ring: &ring, moe_layer: 1 };
        let slots_at = Some(on_device.address());

        // Marks of other layers are there already.
        let old: Vec<u32> = (0..2 * n).map(|i| if i < n { toss.below(2) } else { toss.below(9) } as u32).collect();
        let marks = DeviceBuffer::of(&gpu, &old).unwrap();
        let rows = floats(&arena, &logits, experts);
        let capture = (toss.below(4) > 0).then_some(capture);
        let routed = RoutedRows { slots: slots_at, capture, replay: Some(replay), marks: marks.address() };
        let routing = select(&arena, rows, &cfg, None, &routed).unwrap();
        let got = Chosen::read(&gpu, &routing, n, top_k, &marks);
        let free = choose(&gpu, &logits, &cfg, None);

        let mut expected_ring = vec![0xa5u8; ring.bytes()];
        for (row, logits) in logits.chunks(experts).enumerate() {
            let (ids, weights, nan, changed) = got.row(row, top_k);
            if slots[row] == u32::MAX {
                // Padding: no expert, nothing to add, and nothing is marked.
                assert_eq!((ids, weights), (vec![u32::MAX; top_k], vec![0; top_k]));
                assert_eq!((nan, changed), (old[row], old[n + row]));
                continue;
            }
            assert_eq!(ids, given[row]);
            if matches!(kinds[row], Given::Nothing | Given::Own) {
                assert_eq!((&ids, &weights), (&free.row(row, top_k).0, &free.row(row, top_k).1), "bits of its own ids");
            }
            let mut set = given[row].clone();
            let mut own = own[row].clone();
            set.sort_unstable();
            own.sort_unstable();
            assert_eq!(changed, old[n + row] + u32::from(set != own), "{:?}", kinds[row]);
            assert_eq!(nan, old[row] | u32::from(logits.iter().any(|logit| logit.is_nan())));
            check_weights(logits, &ids, &got.weights[row * top_k..][..top_k], &cfg);
            if capture.is_some() {
                for (k, &id) in ids.iter().enumerate() {
                    let cell = (slots[row] as usize * 2 + 1) * top_k + k;
                    match wide {
                        true => expected_ring[2 * cell..][..2].copy_from_slice(&(id as u16).to_le_bytes()),
                        false => expected_ring[cell] = id as u8,
                    }
                }
            }
        }
        let mut in_ring = vec![0; ring.bytes()];
        ring.read_block(0, 2 * n, &mut in_ring).unwrap();
        assert_eq!(in_ring, expected_ring);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// The whole call: logits within their bound, the choice exactly that of these logits, the same bits for a row alone,
    /// for any number of rows, and with logits in parts or whole.
    #[test]
    fn routes_agree(
        seed: u64,
        n in prop_oneof![1usize..10, 1usize..150],
        hidden in prop_oneof![1usize..100, 100usize..700],
        experts in 1usize..140,
        gate_dtype in dtypes(),
        dtype in dtypes(),
    ) {
        let Some(gpu) = gpu(seed) else { return Ok(()) };
        let (arena, mut toss) = (Arena::new(&gpu), Toss::new(seed));
        let cfg = softmax(experts.min(4), experts, true);
        let stored: Vec<f32> = toss.values(experts * hidden);
        let bytes: Vec<u8> = match gate_dtype {
            WeightDtype::F32 => le_bytes(&stored),
            WeightDtype::BF16 => stored.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect(),
            WeightDtype::F16 => stored.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect(),
        };
        let gate = WeightView::row_major(&bytes, gate_dtype, experts, hidden);
        let router = DeviceRouter::new(&gpu, gate, None).unwrap();
        let mut x = toss.values(n * hidden);
        let nan_row = toss.below(2 * n);
        if nan_row < n {
            x[nan_row * hidden + toss.below(hidden)] = f32::NAN;
        }
        let run = |router: &DeviceRouter, rows: std::ops::Range<usize>| {
            let marks = no_marks(&gpu, rows.len());
            let operand = operand_of(&arena, &x[rows.start * hidden..rows.end * hidden], hidden, dtype);
            let routing = route(&arena, &operand, router, &cfg, &RoutedRows::free(marks.address())).unwrap();
            let logits = routing.logits.to_host(0, rows.len()).unwrap();
            (Chosen::read(&gpu, &routing, rows.len(), cfg.top_k, &marks), logits)
        };
        let (got, logits) = run(&router, 0..n);
        for row in (0..n).filter(|&row| row != nan_row) {
            let x: Vec<f32> = x[row * hidden..][..hidden].iter().map(|&value| round(value, dtype)).collect();
            let (mut exact, mut size) = (vec![0.0; experts], vec![0.0; experts]);
            for expert in 0..experts {
                for (i, x) in x.iter().enumerate() {
                    let product = f64::from(*x) * f64::from(gate.get(expert, i));
                    exact[expert] += product;
                    size[expert] += product.abs();
                }
            }
            let exact: Vec<f32> = exact.iter().map(|&value| value as f32).collect();
            assert_close(&logits[row * experts..][..experts], &exact, |i| size[i] as f32 * 2e-6 + 1e-6, "logits");
        }
        for row in 0..n {
            let (ids, _, nan, changed) = got.row(row, cfg.top_k);
            assert_eq!(ids, reference::choose_experts(&logits[row * experts..][..experts], None, &cfg));
            assert_eq!((nan, changed), (u32::from(row == nan_row), 0));
        }
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<u32>>();
        let whole = router.clone().with_parts_limit(0);
        assert_eq!(bits(&run(&whole, 0..n).1), bits(&logits), "in parts and whole");
        let row = toss.below(n);
        for router in [&router, &whole] {
            let (alone, its_logits) = run(router, row..row + 1);
            assert_eq!(alone.row(0, cfg.top_k), got.row(row, cfg.top_k), "a row alone");
            assert_eq!(bits(&its_logits), bits(&logits[row * experts..][..experts]), "a row's logits alone");
        }
    }
}

/// Shapes of real routers: the largest of each kernel, the deepest chunks.
#[test]
fn large_shapes_agree() {
    for (experts, hidden, top_k) in [(1024, 128, 32), (513, 2048, 10), (64, 4100, 8), (256, 256, 8)] {
        let Some(gpu) = gpu(experts as u64) else { return };
        let (arena, mut toss) = (Arena::new(&gpu), Toss::new(3));
        let weights: Vec<f32> = toss.values(experts * hidden).iter().map(|&v| round(v, WeightDtype::BF16)).collect();
        let x: Vec<f32> = toss.values(2 * hidden).iter().map(|&v| round(v, WeightDtype::BF16)).collect();
        let bytes: Vec<u8> = weights.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect();
        let view = WeightView::row_major(&bytes, WeightDtype::BF16, experts, hidden);
        let router = DeviceRouter::new(&gpu, view, None).unwrap();
        let (cfg, marks) = (softmax(top_k, experts, true), no_marks(&gpu, 2));
        let operand = operand_of(&arena, &x, hidden, WeightDtype::BF16);
        let routing = route(&arena, &operand, &router, &cfg, &RoutedRows::free(marks.address())).unwrap();
        let (got, logits) = (Chosen::read(&gpu, &routing, 2, top_k, &marks), routing.logits.to_host(0, 2).unwrap());
        for row in 0..2 {
            let exact: Vec<f32> = weights
                .chunks(hidden)
                .map(|w| {
                    w.iter().zip(&x[row * hidden..]).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>() as f32
                })
                .collect();
            let logits = &logits[row * experts..][..experts];
            assert_close(logits, &exact, |_| hidden as f32 * 4e-7, "logits");
            assert_eq!(got.row(row, top_k).0, reference::choose_experts(logits, None, &cfg));
        }
    }
}

/// A recorded step is launched again with other rows, slots and replays, some of them padding.
#[test]
fn a_recorded_route_reads_everything_that_varies() {
    let Some(gpu) = gpu(7) else { return };
    let (arena, mut toss) = (Arena::new(&gpu), Toss::new(7));
    let (n, hidden, experts) = (5, 70, 24);
    let cfg = softmax(3, experts, true);
    let weights = le_bytes(&toss.values(experts * hidden));
    let view = WeightView::row_major(&weights, WeightDtype::F32, experts, hidden);
    let router = DeviceRouter::new(&gpu, view, None).unwrap();
    let ring = DeviceRing::new(&gpu, 9, 1, 3, false).unwrap();
    let x = operand_of(&arena, &vec![0.0; n * hidden], hidden, WeightDtype::F32);
    let [slots, row_of] = [0; 2].map(|_| DeviceBuffer::of(&gpu, &vec![u32::MAX; n]).unwrap());
    let given = DeviceBuffer::of(&gpu, &[7u16, 3, 1]).unwrap();
    let marks = no_marks(&gpu, n);
    gpu.driver().begin_graph().unwrap();
    let capture = DeviceRingWrite { ring: &ring, moe_layer: 0 };
    let slots_at = Some(slots.address());
    let replay = DeviceReplay { row_of: row_of.address(), ids: given.address(), moe_layers: 1, moe_layer: 0 };
    let routed = RoutedRows { slots: slots_at, capture: Some(capture), replay: Some(replay), marks: marks.address() };
    let routing = route(&arena, &x, &router, &cfg, &routed).unwrap();
    let graph = gpu.driver().end_graph().unwrap();
    for rows in 1..=n {
        let values = toss.values(rows * hidden);
        let padded: Vec<f32> = (0..n * hidden).map(|i| values.get(i).copied().unwrap_or(f32::NAN)).collect();
        let content = operand_of(&arena, &padded, hidden, WeightDtype::F32);
        let bytes = gpu.read::<u8>(content.address(), n * content.ld() * 4).unwrap();
        gpu.upload(x.address(), &bytes).unwrap();
        let some = |value: &dyn Fn(usize) -> u32| -> Vec<u8> {
            (0..n).flat_map(|row| if row < rows { value(row) } else { u32::MAX }.to_le_bytes()).collect()
        };
        let order = toss.permutation(9);
        gpu.upload(slots.address(), &some(&|row| order[row] as u32)).unwrap();
        let replayed = toss.below(rows);
        gpu.upload(row_of.address(), &some(&|row| if row == replayed { 0 } else { u32::MAX })).unwrap();
        ring.fill(0xee).unwrap();
        gpu.driver().launch_graph(graph).unwrap();
        let ids: Vec<u32> = gpu.read(routing.topk_ids.address(), n * 3).unwrap();
        assert_eq!(ids[replayed * 3..][..3], [7, 3, 1]);
        assert!(ids[..rows * 3].iter().all(|id| *id < experts as u32), "rows choose experts");
        assert!(
            ids[rows * 3..].iter().all(|id| *id == u32::MAX),
            "padding chooses none, for which no weights are read"
        );
        let marked: Vec<u32> = gpu.read(marks.address(), n).unwrap();
        assert_eq!(marked, vec![0; n], "padding is NaN, which nobody is told");
        let mut expected = vec![0xee; 9 * 3];
        for row in 0..rows {
            let ids = ids[row * 3..][..3].iter().map(|&id| id as u8);
            expected.splice(order[row] * 3..order[row] * 3 + 3, ids);
        }
        let mut bytes = vec![0; expected.len()];
        ring.read_block(0, 9, &mut bytes).unwrap();
        assert_eq!(bytes, expected, "{rows} rows");
    }
    gpu.driver().drop_graph(graph);
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(gpu) = gpu(1) else { return };
    let arena = Arena::new(&gpu);
    let marks = no_marks(&gpu, 1);
    let refuse_at = |slotted: bool, cfg: DeviceRouterConfig, bias: bool, capture: Option<DeviceRingWrite<'_>>| {
        let bias = bias.then(|| buffer(&gpu, &vec![0.0; cfg.num_experts]));
        let logits = floats(&arena, &vec![0.0; cfg.num_experts], cfg.num_experts);
        let slots = slotted.then_some(Address::NULL);
        let routed = RoutedRows { slots, capture, replay: None, marks: marks.address() };
        select(&arena, logits, &cfg, bias.as_ref(), &routed).unwrap_err().to_string()
    };
    let refuse = |cfg, bias, capture| refuse_at(true, cfg, bias, capture);
    let grouped = |n_group, topk_group, top_k| DeviceRouterConfig {
        scoring: Scoring::Sigmoid { n_group, topk_group },
        ..softmax(top_k, 12, true)
    };
    assert!(refuse(softmax(5, 4, true), false, None).contains("top_k 4 is not below 4"));
    assert!(refuse(softmax(33, 64, true), false, None).contains("top_k 32 is not below 32"));
    assert!(refuse(softmax(1, 1025, true), false, None).contains("number of experts 1024 is not below 1024"));
    assert!(refuse(softmax(1, 8, true), true, None).contains("bias"));
    assert!(refuse(grouped(5, 1, 1), false, None).contains("experts of the groups"));
    assert!(refuse(grouped(4, 5, 1), false, None).contains("number of chosen groups 4"));
    assert!(refuse(grouped(4, 1, 4), false, None).contains("top_k 3 is not below 3"));
    let ring = DeviceRing::new(&gpu, 4, 2, 2, false).unwrap();
    let write = |moe_layer| DeviceRingWrite { ring: &ring, moe_layer };
    assert!(refuse(softmax(2, 4, true), false, Some(write(2))).contains("MoE layer 2 is not below 2"));
    assert!(refuse(softmax(2, 300, true), false, Some(write(0))).contains("largest expert id 299"));
    assert!(refuse(softmax(3, 4, true), false, Some(write(0))).contains("ring is [2], expected [3]"));
    assert!(refuse_at(false, softmax(2, 4, true), false, Some(write(0))).contains("slots of the ring's rows"));
}
