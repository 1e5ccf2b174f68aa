//! The gated feed-forward network of a dense layer.

use candle_core::Tensor;
use moetrail_kernels::{Linear, silu_and_mul};

use crate::config::ModelConfig;
use crate::error::Result;
use crate::loader::Loader;

/// `down(silu(gate x) * (up x))`; gate and up are one matrix.
#[derive(Clone)]
pub(crate) struct Mlp {
    /// `[2 * intermediate, hidden]`: gate rows, then up rows.
    gate_up: Linear,
    /// `[hidden, intermediate]`
    down: Linear,
}

impl Mlp {
    /// Packs the three matrices.
    pub(crate) fn load(loader: &mut Loader<'_>, config: &ModelConfig, names: &[String; 3]) -> Result<Self> {
        let (hidden, inter) = (config.hidden_size, config.intermediate_size);
        let [gate, up, down] = names;
        let gate_up = loader.packed(&[(gate, inter), (up, inter)], hidden)?;
        let down = loader.packed(&[(down, hidden)], inter)?;
        Ok(Self { gate_up: Linear::new(gate_up, None), down: Linear::new(down, None) })
    }

    /// Says that the first weights are read after the next job.
    pub(crate) fn announce(&self) {
        self.gate_up.announce();
    }

    /// `[rows, hidden]` to `[rows, hidden]`.
    pub(crate) fn forward(&self, x: &Tensor, next: &Linear) -> Result<Tensor> {
        self.down.announce();
        let inner = silu_and_mul(&self.gate_up.forward(x)?)?;
        next.announce();
        Ok(self.down.forward(&inner)?)
    }
}
