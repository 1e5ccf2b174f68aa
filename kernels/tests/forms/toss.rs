use moetrail_kernels::{PackedMatrix, WeightDtype, WeightView};
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

    pub fn matrix(&mut self, out: usize, inp: usize, dtype: WeightDtype) -> PackedMatrix {
        let bytes = le_bytes(&self.values(out * inp));
        let mut builder = PackedMatrix::zeros(out, inp, dtype);
        builder.put_rows(0, WeightView::row_major(&bytes, WeightDtype::F32, out, inp)).unwrap();
        builder.finish()
    }
}

pub fn le_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

pub fn dtypes() -> impl Strategy<Value = WeightDtype> {
    prop_oneof![Just(WeightDtype::F32), Just(WeightDtype::BF16), Just(WeightDtype::F16)]
}
