use moetrail_kernels::gpu::{Arena, DeviceBuffer, DeviceKv, DeviceQkNorm, DeviceRope, qkv_rope_store};
use moetrail_kernels::{AttentionShape, KvPool, QkNorm, RopeTable, WeightDtype, reference};
use proptest::prelude::*;

use crate::device::{assert_close, floats, from_bytes, gpu, half_ulp, operand};
use crate::toss::{Toss, dtypes};

#[derive(Clone, Copy, Debug)]
enum Norm {
    None,
    PerHead,
    Whole,
}

/// Bytes of one block of every layer.
fn block(kv: &DeviceKv, index: usize) -> Vec<u8> {
    let mut bytes = vec![0; kv.bytes() / kv.num_blocks()];
    kv.read_block(index as u32, &mut bytes).unwrap();
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn qkv_rope_store_agrees(
        seed: u64, n in 1usize..10, kv_heads in 1usize..4, group in 1usize..4, half in 0usize..40, pass in 0usize..5,
        block_size in 1usize..6, dtype in dtypes(), clip: bool,
        norm in prop_oneof![Just(Norm::None), Just(Norm::PerHead), Just(Norm::Whole)],
    ) {
        let Some(gpu) = gpu(seed) else { return Ok(()) };
        let (arena, mut toss) = (Arena::new(&gpu), Toss::new(seed));
        let head_dim = (2 * half + pass).max(1);
        let heads = kv_heads * group;
        let clip_qkv = clip.then_some(0.75);
        let shape = AttentionShape { heads, kv_heads, head_dim, scale: 1.0, window: None, clip_qkv };
        let (q_width, kv_width) = (heads * head_dim, kv_heads * head_dim);
        let width = q_width + 2 * kv_width;
        let qkv = toss.values(n * width);
        let rope = RopeTable::new((0..half).map(|i| 0.9f32.powi(i as i32)).collect(), 1.25, 300);
        let norm = match norm {
            Norm::None => None,
            Norm::PerHead => Some((head_dim, head_dim, true)),
            Norm::Whole => Some((q_width, kv_width, false)),
        };
        let norm = norm.map(|(q, k, per_head)| QkNorm {
            q_weight: toss.values(q), k_weight: toss.values(k), eps: 1e-5, per_head,
        });
        let positions: Vec<u32> = (0..n).map(|_| toss.below(300) as u32).collect();
        let num_blocks = (2 * n).div_ceil(block_size);
        let slots: Vec<u32> =
            toss.permutation(num_blocks * block_size)[..n].iter().map(|&slot| slot as u32).collect();

        let mut expected = qkv.clone();
        for (row, &position) in expected.chunks_mut(width).zip(&positions) {
            reference::qkv_rope(row, &shape, norm.as_ref(), &rope, position);
        }
        let device_norm = norm.as_ref().map(|norm| DeviceQkNorm::new(&gpu, norm).unwrap());
        let device_rope = DeviceRope::new(&gpu, &rope).unwrap();
        // Queries and, at layer 1, the cache, when these rows are one batch.
        let run = |rows: &[usize], slots: &[u32]| {
            let kv = DeviceKv::new(&gpu, 2, num_blocks, block_size, kv_heads, head_dim, dtype).unwrap();
            let chosen: Vec<f32> = rows.iter().flat_map(|&row| qkv[row * width..][..width].to_vec()).collect();
            let positions: Vec<u32> = rows.iter().map(|&row| positions[row]).collect();
            let [positions, slots] = [&positions[..], slots].map(|words| DeviceBuffer::of(&gpu, words).unwrap());
            let q = qkv_rope_store(
                &arena, &floats(&arena, &chosen, width), &shape, device_norm.as_ref(), &device_rope,
                positions.address(), slots.address(), &kv, 1,
            ).unwrap();
            (operand(&gpu, &q), kv)
        };
        let all: Vec<usize> = (0..n).collect();
        let (q, kv) = run(&all, &slots);
        // What the cache holds at a slot: K, then V.
        let stored = |kv: &DeviceKv, slot: u32| {
            let (index, offset) = (slot as usize / block_size, slot as usize % block_size);
            let values = from_bytes(&block(kv, index), dtype);
            let (layer_0, layer_1) = values.split_at(values.len() / 2);
            assert!(layer_0.iter().all(|&value| value == 0.0), "the other layer");
            layer_1
                .chunks(head_dim)
                .skip(offset)
                .step_by(block_size)
                .flat_map(<[f32]>::to_vec)
                .collect::<Vec<f32>>()
        };
        let got: Vec<f32> = q
            .chunks(q_width)
            .zip(&slots)
            .flat_map(|(q, &slot)| [q.to_vec(), stored(&kv, slot)].concat())
            .collect();
        let bound = |i: usize| expected[i].abs() * half_ulp(dtype) + 2e-5;
        assert_close(&got, &expected, bound, &format!("{dtype} {shape:?}"));
        // Slots that no row has stay zero.
        for slot in (0..(num_blocks * block_size) as u32).filter(|slot| !slots.contains(slot)) {
            assert!(stored(&kv, slot).iter().all(|&value| value == 0.0), "slot {slot}");
        }
        // A row alone, in a cache of its own.
        let row = toss.below(n);
        let (one, alone) = run(&[row], &slots[row..row + 1]);
        assert_eq!(one, q[row * q_width..][..q_width]);
        assert_eq!(stored(&alone, slots[row]), stored(&kv, slots[row]));
        // A row that is not stored.
        let (one, alone) = run(&[row], &[u32::MAX]);
        assert_eq!(one, q[row * q_width..][..q_width]);
        assert!((0..num_blocks).all(|index| block(&alone, index).iter().all(|&byte| byte == 0)));
    }
}

#[test]
fn blocks_are_copied_and_moved_whole() {
    let Some(gpu) = gpu(3) else { return };
    for dtype in [WeightDtype::F32, WeightDtype::BF16] {
        let kv = DeviceKv::new(&gpu, 2, 4, 3, 2, 5, dtype).unwrap();
        let mut pool = KvPool::new(2, 4, 3, 2, 5, dtype);
        assert_eq!(kv.bytes(), pool.bytes());
        let content: Vec<u8> = (0..kv.bytes() / 4).map(|i| (i % 255) as u8 + 1).collect();
        pool.write_block(1, &content);
        kv.write_block(1, &content).unwrap();
        kv.copy_block(1, 3).unwrap();
        kv.copy_block(3, 3).unwrap();
        assert_eq!(block(&kv, 1), content);
        assert_eq!(block(&kv, 3), content);
        assert!(block(&kv, 0).iter().chain(&block(&kv, 2)).all(|&byte| byte == 0));
        // K of layer 1: the third of four parts of a block, the blocks before it zero or as long.
        let part = content.len() / 4;
        let k: Vec<u8> = gpu.read(kv.k(1), 2 * part).unwrap();
        assert_eq!(k, [vec![0; part], content[2 * part..3 * part].to_vec()].concat());
        assert_eq!(kv.v(1).0 - kv.k(1).0, 4 * part as u64);
    }
}

#[test]
#[should_panic(expected = "block 4 of 4 blocks")]
fn a_block_outside_the_cache_is_refused() {
    let Some(gpu) = gpu(0) else { panic!("block 4 of 4 blocks") };
    DeviceKv::new(&gpu, 1, 4, 2, 1, 4, WeightDtype::F16).unwrap().copy_block(4, 0).unwrap();
}

#[test]
fn other_shapes_are_refused() {
    let Some(gpu) = gpu(0) else { return };
    let arena = Arena::new(&gpu);
    let shape = AttentionShape { heads: 2, kv_heads: 1, head_dim: 4, scale: 1.0, window: None, clip_qkv: None };
    let refuse = |shape: &AttentionShape, width: usize, rotary: usize, layer: usize, q_weight: usize| {
        let kv = DeviceKv::new(&gpu, 1, 2, 4, 1, 4, WeightDtype::F32).unwrap();
        let rope = DeviceRope::new(&gpu, &RopeTable::new(vec![1.0; rotary / 2], 1.0, 4)).unwrap();
        let norm = QkNorm { q_weight: vec![1.0; q_weight], k_weight: vec![1.0; 4], eps: 0.0, per_head: true };
        let norm = DeviceQkNorm::new(&gpu, &norm).unwrap();
        let ids = DeviceBuffer::of(&gpu, &[0u32]).unwrap();
        let qkv = floats(&arena, &vec![0.0; width], width);
        let at = ids.address();
        qkv_rope_store(&arena, &qkv, shape, Some(&norm), &rope, at, at, &kv, layer).unwrap_err().to_string()
    };
    assert!(refuse(&shape, 15, 2, 0, 4).contains("qkv is [15, 15], expected [16, 16]"));
    assert!(refuse(&shape, 16, 6, 0, 4).contains("rotary width 6 is not below 5"));
    assert!(refuse(&shape, 16, 2, 1, 4).contains("layer 1 is not below 1"));
    assert!(refuse(&shape, 16, 2, 0, 3).contains("q norm weight"));
    assert!(refuse(&AttentionShape { kv_heads: 2, ..shape }, 24, 2, 0, 4).contains("kv cache heads"));
}
