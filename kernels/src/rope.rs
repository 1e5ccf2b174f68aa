/// Cosines and sines of the rotary embedding, `[max_positions, rotary / 2]` each, NeoX style (`rotate_half`).
#[derive(Clone, Debug)]
pub struct RopeTable {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
    max_positions: usize,
}

impl RopeTable {
    /// A table from the inverse frequencies (`rotary / 2` of them); `attention_scaling` multiplies cosine and sine.
    ///
    /// The angle is the f32 product of position and inverse frequency, as in the published models; its cosine and
    /// sine are taken in f64 and rounded once.
    pub fn new(inv_freq: Vec<f32>, attention_scaling: f32, max_positions: usize) -> RopeTable {
        let half = inv_freq.len();
        let angles =
            (0..max_positions).flat_map(|position| inv_freq.iter().map(move |&freq| f64::from(position as f32 * freq)));
        let (cos, sin) = angles
            .map(|angle| (angle.cos() as f32 * attention_scaling, angle.sin() as f32 * attention_scaling))
            .unzip();
        RopeTable { cos, sin, half, max_positions }
    }

    /// One past the largest position of the table.
    pub fn max_positions(&self) -> usize {
        self.max_positions
    }

    /// Leading elements of a head that are rotated.
    pub fn rotary_dim(&self) -> usize {
        2 * self.half
    }

    /// Cosines and sines (`[rotary / 2]` each) at a position.
    pub(crate) fn at(&self, position: u32) -> (&[f32], &[f32]) {
        let row = position as usize * self.half..(position as usize + 1) * self.half;
        (&self.cos[row.clone()], &self.sin[row])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_hold_the_scaled_cosine_and_sine_of_the_f32_angle() {
        let table = RopeTable::new(vec![1.0, 0.25], 2.0, 5);
        let (cos, sin) = table.at(3);
        assert_eq!(cos, [3f64.cos() as f32 * 2.0, 0.75f64.cos() as f32 * 2.0]);
        assert_eq!(sin, [3f64.sin() as f32 * 2.0, 0.75f64.sin() as f32 * 2.0]);
        assert_eq!((table.rotary_dim(), table.max_positions()), (4, 5));
    }
}
