//! Random weights for a configuration, as vLLM's `--load-format dummy` gives them: to measure speed without a checkpoint.

use std::path::Path;

use moetrail_kernels::WeightDtype;

use crate::config::ModelConfig;
use crate::dtype::StoredType;
use crate::error::Result;
use crate::shard::{Place, Shard};
use crate::shards::StoredTensor;

/// Tensors of any name and of every shape that a configuration calls for. Those of one shape are the same memory, with the
/// spread that transformers initialises weights with; vectors are ones.
#[derive(Debug)]
pub(crate) struct Dummy {
    memory: Shard,
    places: Vec<Place>,
}

/// Spread of transformers' initial weights (`initializer_range`).
const SPREAD: f32 = 0.02;

impl Dummy {
    pub(crate) fn new(folder: &Path, config: &ModelConfig) -> Result<Self> {
        let (hidden, q, kv) = (config.hidden_size, config.q_width(), config.kv_width());
        let shapes = [
            vec![config.vocab_size, hidden],
            vec![q, hidden],
            vec![kv, hidden],
            vec![hidden, q],
            vec![config.num_experts, hidden],
            vec![config.moe_intermediate_size, hidden],
            vec![hidden, config.moe_intermediate_size],
            vec![config.intermediate_size, hidden],
            vec![hidden, config.intermediate_size],
        ];
        let vectors = [vec![hidden], vec![config.head_dim], vec![q], vec![kv]];
        let len = |shape: &[usize]| shape.iter().product::<usize>();
        let most = |shapes: &[Vec<usize>]| shapes.iter().map(|shape| len(shape)).max().unwrap_or(0);
        let (numbers, ones) = (most(&shapes), most(&vectors));
        let memory = Shard::in_memory(folder, 2 * (numbers + ones), |bytes| {
            let mut state = 0x9e37_79b9_7f4a_7c15u64;
            for (index, cell) in bytes.chunks_exact_mut(2).enumerate() {
                // xorshift64; uniform with that standard deviation.
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                let uniform = (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
                let value = if index < numbers { uniform * SPREAD * 3f32.sqrt() } else { 1.0 };
                cell.copy_from_slice(&half::bf16::from_f32(value).to_le_bytes());
            }
        })?;
        let place = |first: usize, shape: Vec<usize>| Place {
            dtype: StoredType::Float(WeightDtype::BF16),
            bytes: 2 * first..2 * (first + len(&shape)),
            shape,
            interleaved_heads: None,
        };
        let places = shapes.into_iter().map(|shape| place(0, shape));
        let places = places.chain(vectors.into_iter().map(|shape| place(numbers, shape))).collect();
        Ok(Self { memory, places })
    }

    /// A tensor of this shape.
    pub(crate) fn get(&self, shape: &[usize]) -> Option<StoredTensor<'_>> {
        let place = self.places.iter().find(|place| place.shape == shape)?;
        Some(StoredTensor::new(&self.memory, place))
    }
}
