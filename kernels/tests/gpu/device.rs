use std::cell::OnceCell;
use std::sync::OnceLock;

use half::{bf16, f16};
use moetrail_kernels::WeightDtype;
use moetrail_kernels::gpu::{Arena, DeviceBuffer, DeviceMatrix, DeviceMatrixBuilder, DeviceRows, Gpu, cuda};

use crate::toss::{Toss, le_bytes};

/// The device that is tested: with `MOETRAIL_TEST_DEVICE=cuda` that of the CUDA driver, else the emulation; `None` where
/// there is no C++ compiler for the emulation, which has been said.
pub fn gpu(seed: u64) -> Option<Gpu> {
    match std::env::var_os("MOETRAIL_TEST_DEVICE") {
        None => moetrail_emulation::gpu(seed, 1 << 30),
        Some(device) => {
            assert_eq!(device, "cuda", "MOETRAIL_TEST_DEVICE names no other device");
            Some(cuda())
        }
    }
}

/// A device that has Hopper's warpgroup instructions; `None` where there is none, which has been said.
pub fn wgmma_gpu(seed: u64) -> Option<Gpu> {
    if !is_cuda() {
        return moetrail_emulation::gpu_of(seed, 1 << 30, 90);
    }
    let gpu = gpu(seed)?;
    let capability = gpu.driver().capability();
    if capability != 90 {
        println!("skipped: wgmma is for compute capability 90, not {capability}");
        return None;
    }
    Some(gpu)
}

/// Whether the CUDA driver's device is tested.
pub fn is_cuda() -> bool {
    std::env::var_os("MOETRAIL_TEST_DEVICE").is_some()
}

/// A device of this thread alone: the streams of a device may not be shared with a test that records a graph.
fn cuda() -> Gpu {
    let open = || cuda::open(0).unwrap_or_else(|error| panic!("{error}"));
    // As long as somebody holds it, opening it again is cheap.
    static HELD: OnceLock<Gpu> = OnceLock::new();
    thread_local!(static OWN: OnceCell<Gpu> = const { OnceCell::new() });
    HELD.get_or_init(open);
    OWN.with(|own| own.get_or_init(open).clone())
}

/// A value as memory of this type holds it.
pub fn round(value: f32, dtype: WeightDtype) -> f32 {
    match dtype {
        WeightDtype::F32 => value,
        WeightDtype::BF16 => bf16::from_f32(value).to_f32(),
        WeightDtype::F16 => f16::from_f32(value).to_f32(),
    }
}

/// Half a unit in the last place, relative.
pub fn half_ulp(dtype: WeightDtype) -> f32 {
    match dtype {
        WeightDtype::F32 => 1.0 / (1 << 24) as f32,
        WeightDtype::BF16 => 1.0 / (1 << 8) as f32,
        WeightDtype::F16 => 1.0 / (1 << 11) as f32,
    }
}

/// Elements of a type, as f32.
pub fn read(gpu: &Gpu, address: moetrail_kernels::gpu::Address, len: usize, dtype: WeightDtype) -> Vec<f32> {
    match dtype {
        WeightDtype::F32 => gpu.read(address, len).unwrap(),
        WeightDtype::BF16 => {
            gpu.read::<u16>(address, len).unwrap().iter().map(|&bits| bf16::from_bits(bits).to_f32()).collect()
        }
        WeightDtype::F16 => {
            gpu.read::<u16>(address, len).unwrap().iter().map(|&bits| f16::from_bits(bits).to_f32()).collect()
        }
    }
}

/// Elements of a type in bytes, as f32.
pub fn from_bytes(bytes: &[u8], dtype: WeightDtype) -> Vec<f32> {
    let pair = |pair: &[u8]| u16::from_le_bytes([pair[0], pair[1]]);
    match dtype {
        WeightDtype::F32 => bytes.chunks(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        WeightDtype::BF16 => bytes.chunks(2).map(|b| bf16::from_bits(pair(b)).to_f32()).collect(),
        WeightDtype::F16 => bytes.chunks(2).map(|b| f16::from_bits(pair(b)).to_f32()).collect(),
    }
}

/// The rows of an operand, after a check that its padding is zero.
pub fn operand(gpu: &Gpu, rows: &DeviceRows) -> Vec<f32> {
    let all = read(gpu, rows.address(), rows.len() * rows.ld(), rows.dtype());
    let mut values = Vec::new();
    for row in all.chunks(rows.ld()) {
        values.extend_from_slice(&row[..rows.width()]);
        assert!(row[rows.width()..].iter().all(|&value| value == 0.0), "padding is zero");
    }
    values
}

/// Rows of f32 with this content.
pub fn floats(arena: &Arena, values: &[f32], width: usize) -> DeviceRows {
    let rows = DeviceRows::floats(arena, values.len() / width, width).unwrap();
    arena.gpu().upload(rows.address(), &le_bytes(values)).unwrap();
    rows
}

/// Rows that products read, with this content, rounded.
pub fn operand_of(arena: &Arena, values: &[f32], width: usize, dtype: WeightDtype) -> DeviceRows {
    let rows = DeviceRows::operand(arena, values.len() / width, width, dtype).unwrap();
    let mut bytes = Vec::new();
    for row in values.chunks(width) {
        for col in 0..rows.ld() {
            let value = row.get(col).copied().unwrap_or(0.0);
            match dtype {
                WeightDtype::F32 => bytes.extend(value.to_le_bytes()),
                WeightDtype::BF16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
                WeightDtype::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
            }
        }
    }
    arena.gpu().upload(rows.address(), &bytes).unwrap();
    rows
}

/// Values in device memory.
pub fn buffer(gpu: &Gpu, values: &[f32]) -> DeviceBuffer {
    DeviceBuffer::of(gpu, values).unwrap()
}

/// Random weights, and what memory of the type holds of them, row-major.
pub fn matrix(gpu: &Gpu, toss: &mut Toss, out: usize, inp: usize, dtype: WeightDtype) -> (DeviceMatrix, Vec<f32>) {
    let values: Vec<f32> = toss.values(out * inp);
    let bytes = le_bytes(&values);
    let mut builder = DeviceMatrixBuilder::zeros(gpu, out, inp, dtype).unwrap();
    let view = moetrail_kernels::WeightView::row_major(&bytes, WeightDtype::F32, out, inp);
    builder.put_rows(0, view.into()).unwrap();
    (builder.finish(), values.iter().map(|&value| round(value, dtype)).collect())
}

/// Fails unless every value is within its bound.
pub fn assert_close(got: &[f32], expected: &[f32], bound: impl Fn(usize) -> f32, what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((got - expected).abs() <= bound(i), "{what}: element {i} is {got}, expected {expected}");
    }
}
