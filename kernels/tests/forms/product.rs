use candle_core::Device;
use candle_core::quantized::{QStorage, QTensor};
use moetrail_kernels::{BlockRows, Form, PackedMatrix, WeightDtype, WeightFormat, WeightView, linear, reference};
use proptest::prelude::*;

use crate::rows::{assert_bits, assert_close, check_rows, pick};
use crate::toss::{Toss, formats, ggml_type, le_bytes};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn linear_agrees(
        seed: u64, n in 1usize..40, ins in 1usize..150, outs in 1usize..200, (format, block) in formats(), biased: bool,
    ) {
        let mut toss = Toss::new(seed);
        let ins = ins.next_multiple_of(block);
        let x = toss.values(n * ins);
        let weight = toss.matrix(outs, ins, format);
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
            assert_close(&got, &expected, bound, &format!("{form} {format} [{n}, {ins}] x [{outs}, {ins}]"));
        }
    }
}

/// candle reads the same blocks as the same weights, but for the rounding of Q4_K's scales and minima, which span 4 and 2 here.
#[test]
fn blocks_agree_with_candle() {
    let (outs, ins) = (70, 512);
    for format in [WeightFormat::Q8_0, WeightFormat::Q4K] {
        let stored = Toss::new(11).stored(outs, ins, format);
        let mut packed = PackedMatrix::zeros(outs, ins, format);
        stored.with(|rows| packed.put_rows(0, rows)).unwrap();
        let packed = packed.finish();
        let storage = qtensor(format, &stored.bytes, outs, ins);
        let expected: Vec<f32> = storage.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let mut row = vec![0.0; ins];
        for (o, expected) in expected.chunks_exact(ins).enumerate() {
            packed.unpack_row(o, &mut row);
            match format {
                WeightFormat::Q8_0 => assert_bits(&row, expected, "q8_0"),
                _ => assert_close(&row, expected, |_| 6.0 * 2f32.powi(-11), "q4_k"),
            }
        }
    }
}

fn qtensor(format: WeightFormat, bytes: &[u8], outs: usize, ins: usize) -> QTensor {
    let storage = QStorage::from_data(bytes.into(), &Device::Cpu, ggml_type(format).unwrap()).unwrap();
    QTensor::new(storage, (outs, ins)).unwrap()
}

/// Every weight lies within half a step of its code, and the largest of an output is met.
#[test]
fn int8_is_the_nearest_code() {
    let (outs, ins) = (66, 90);
    let values = Toss::new(5).values(outs * ins);
    let bytes = le_bytes(&values);
    let mut packed = PackedMatrix::zeros(outs, ins, WeightFormat::Int8);
    packed.put_rows(0, WeightView::row_major(&bytes, WeightDtype::F32, outs, ins)).unwrap();
    let packed = packed.finish();
    let mut row = vec![0.0; ins];
    for (o, values) in values.chunks_exact(ins).enumerate() {
        packed.unpack_row(o, &mut row);
        let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        assert_close(&row, values, |_| largest / 254.0 * 1.0001, "int8");
        let met = row.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        assert!((met - largest).abs() <= 1e-6 * largest, "{met} {largest}");
    }
}

#[test]
fn rows_of_another_format_are_refused() {
    let blocks = vec![0u8; 34 * 2];
    let rows = BlockRows::new(&blocks, WeightFormat::Q8_0, 2, 32).unwrap();
    let error = PackedMatrix::zeros(2, 32, WeightFormat::Q4K).put_rows(0, rows).unwrap_err().to_string();
    assert_eq!(error, "q8_0 weights cannot be packed as q4_k");
    PackedMatrix::zeros(2, 32, WeightDtype::BF16).put_rows(0, rows).unwrap_err();
    let floats = WeightView::row_major(&blocks, WeightDtype::BF16, 1, 32);
    PackedMatrix::zeros(1, 32, WeightFormat::Q8_0).put_rows(0, floats).unwrap_err();
    BlockRows::new(&blocks, WeightFormat::Q8_0, 2, 33).unwrap_err();
    BlockRows::new(&blocks, WeightFormat::Q8_0, 3, 32).unwrap_err();
    BlockRows::new(&blocks, WeightFormat::Q4K, 1, 32).unwrap_err();
    BlockRows::new(&[], WeightFormat::Int8, 0, 32).unwrap_err();
}

/// `sum |x| |w|` of each output.
fn magnitudes(x: &[f32], weight: &PackedMatrix, n: usize) -> Vec<f32> {
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
    let formats =
        [WeightDtype::BF16.into(), WeightDtype::F32.into(), WeightFormat::Int8, WeightFormat::Q8_0, WeightFormat::Q4K];
    for format in formats {
        let mut toss = Toss::new(7);
        let x = toss.values(n * ins);
        let weight = toss.matrix(outs, ins, format);
        let mut expected = vec![0.0; n * outs];
        reference::linear(&x, &weight, None, &mut expected);
        for form in Form::available() {
            let mut got = vec![0.0; n * outs];
            linear(form, &x, &weight, None, &mut got);
            assert_close(&got, &expected, |_| 5e-3, &format!("{form} {format}"));
            let mut alone = vec![0.0; outs];
            linear(form, &x[499 * ins..], &weight, None, &mut alone);
            assert_eq!(alone, got[499 * outs..]);
        }
    }
}
