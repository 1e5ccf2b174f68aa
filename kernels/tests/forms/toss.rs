use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use moetrail_kernels::{BlockRows, PackedMatrix, WeightDtype, WeightFormat, WeightRows, WeightView};
use proptest::prelude::*;

/// Reproducible numbers from one seed of a property test.
pub struct Toss(u64);

impl Toss {
    pub fn new(seed: u64) -> Toss {
        Toss(seed)
    }

    pub fn bits(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.bits() % limit as u64) as usize
    }

    /// In -2..2, with many different exponents.
    pub fn value(&mut self) -> f32 {
        let unit = (self.bits() >> 40) as f32 / (1 << 24) as f32;
        (unit * 4.0 - 2.0) * if self.below(4) == 0 { 0.01 } else { 1.0 }
    }

    pub fn values(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.value()).collect()
    }

    pub fn permutation(&mut self, len: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..len).collect();
        for i in (1..len).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }

    /// Random weights; blocks are candle's quantisation of them.
    pub fn matrix(&mut self, out: usize, inp: usize, format: impl Into<WeightFormat>) -> PackedMatrix {
        let format = format.into();
        let mut builder = PackedMatrix::zeros(out, inp, format);
        self.stored(out, inp, format).with(|rows| builder.put_rows(0, rows)).unwrap();
        builder.finish()
    }

    /// Random weights as a checkpoint may store them that is packed as `format`.
    pub fn stored(&mut self, out: usize, inp: usize, format: WeightFormat) -> StoredWeights {
        let values = self.values(out * inp);
        let Some(kind) = ggml_type(format) else {
            return StoredWeights { bytes: le_bytes(&values), out, inp, format: WeightDtype::F32.into() };
        };
        let tensor = Tensor::from_vec(values, (out, inp), &Device::Cpu).unwrap();
        let bytes = QTensor::quantize(&tensor, kind).unwrap().data().unwrap().into_owned();
        StoredWeights { bytes, out, inp, format }
    }
}

/// A matrix in bytes of its own.
pub struct StoredWeights {
    pub bytes: Vec<u8>,
    out: usize,
    inp: usize,
    format: WeightFormat,
}

impl StoredWeights {
    pub fn with<R>(&self, run: impl FnOnce(WeightRows<'_>) -> R) -> R {
        match self.format {
            WeightFormat::Float(dtype) => run(WeightView::row_major(&self.bytes, dtype, self.out, self.inp).into()),
            format => run(BlockRows::new(&self.bytes, format, self.out, self.inp).unwrap().into()),
        }
    }
}

pub fn ggml_type(format: WeightFormat) -> Option<GgmlDType> {
    match format {
        WeightFormat::Q8_0 => Some(GgmlDType::Q8_0),
        WeightFormat::Q4K => Some(GgmlDType::Q4K),
        WeightFormat::Float(_) | WeightFormat::Int8 => None,
    }
}

pub fn le_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Every format, and what the inputs of a matrix must be a multiple of.
pub fn formats() -> impl Strategy<Value = (WeightFormat, usize)> {
    prop_oneof![
        Just((WeightDtype::F32.into(), 1)),
        Just((WeightDtype::BF16.into(), 1)),
        Just((WeightDtype::F16.into(), 1)),
        Just((WeightFormat::Int8, 1)),
        Just((WeightFormat::Q8_0, 32)),
        Just((WeightFormat::Q4K, 256)),
    ]
}

pub fn dtypes() -> impl Strategy<Value = WeightDtype> {
    prop_oneof![Just(WeightDtype::F32), Just(WeightDtype::BF16), Just(WeightDtype::F16)]
}
