use moetrail_kernels::gpu::{Arena, DeviceBuffer, add_rms_norm, embedding, select_rows, silu_and_mul};
use moetrail_kernels::reference;
use proptest::prelude::*;

use crate::device::{assert_close, buffer, floats, gpu, half_ulp, matrix, operand};
use crate::toss::{Toss, dtypes};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn norms_agree(seed: u64, n in 1usize..9, width in 1usize..300, added: bool, dtype in dtypes()) {
        let Some(gpu) = gpu(seed) else { return Ok(()) };
        let (arena, mut toss) = (Arena::new(&gpu), Toss::new(seed));
        let (x, y, weight) = (toss.values(n * width), toss.values(n * width), toss.values(width));
        let rows = floats(&arena, &x, width);
        let addition = added.then(|| floats(&arena, &y, width));
        let normed = add_rms_norm(&arena, &rows, addition.as_ref(), &buffer(&gpu, &weight), 1e-5, dtype).unwrap();
        let sum: Vec<f32> = x.iter().zip(&y).map(|(x, y)| if added { x + y } else { *x }).collect();
        assert_eq!(rows.to_host(0, n).unwrap(), sum);
        let mut expected = vec![0.0; n * width];
        for (row, out) in sum.chunks(width).zip(expected.chunks_mut(width)) {
            reference::rms_norm(row, &weight, 1e-5, out);
        }
        let bound = |i: usize| (half_ulp(dtype) + 2e-6) * expected[i].abs() + 1e-6;
        assert_close(&operand(&gpu, &normed), &expected, bound, "norm");
    }

    #[test]
    fn gates_agree(seed: u64, n in 1usize..9, width in 1usize..300, dtype in dtypes()) {
        let Some(gpu) = gpu(seed) else { return Ok(()) };
        let (arena, mut toss) = (Arena::new(&gpu), Toss::new(seed));
        let x: Vec<f32> = toss.values(n * 2 * width).iter().map(|value| value * 8.0).collect();
        let out = silu_and_mul(&arena, &floats(&arena, &x, 2 * width), dtype).unwrap();
        let mut expected = Vec::new();
        for row in x.chunks(2 * width) {
            expected.extend((0..width).map(|i| row[i] / (1.0 + (-row[i]).exp()) * row[width + i]));
        }
        let bound = |i: usize| (half_ulp(dtype) + 4e-6) * expected[i].abs() + 1e-7;
        assert_close(&operand(&gpu, &out), &expected, bound, "silu");
    }

    #[test]
    fn rows_are_looked_up(seed: u64, n in 1usize..9, vocab in 1usize..50, width in 1usize..90, dtype in dtypes()) {
        let Some(gpu) = gpu(seed) else { return Ok(()) };
        let (arena, mut toss) = (Arena::new(&gpu), Toss::new(seed));
        let (table, values) = matrix(&gpu, &mut toss, vocab, width, dtype);
        let ids: Vec<u32> = (0..n).map(|_| toss.below(vocab) as u32).collect();
        let on_device = DeviceBuffer::of(&gpu, &ids).unwrap();
        let x = embedding(&arena, &table, on_device.address(), n).unwrap();
        let expected: Vec<f32> = ids.iter().flat_map(|&id| values[id as usize * width..][..width].to_vec()).collect();
        assert_eq!(x.to_host(0, n).unwrap(), expected);
        // Some of these rows, each added to itself.
        let picked: Vec<u32> = (0..3).map(|_| toss.below(n) as u32).collect();
        let on_device = DeviceBuffer::of(&gpu, &picked).unwrap();
        let some = select_rows(&arena, &x, Some(&x), on_device.address(), 3).unwrap();
        let doubled: Vec<f32> = picked
            .iter()
            .flat_map(|&row| expected[row as usize * width..][..width].iter().map(|value| value * 2.0))
            .collect();
        assert_eq!(some.to_host(0, 3).unwrap(), doubled);
    }
}
