//! The gated feed-forward network of a dense layer.

use crate::backend::Backend;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::loader::Loader;

/// `down(silu(gate x) * (up x))`; gate and up are one matrix.
#[derive(Clone)]
pub(crate) struct Mlp<B: Backend> {
    /// `[2 * intermediate, hidden]`: gate rows, then up rows.
    gate_up: B::Linear,
    /// `[hidden, intermediate]`
    down: B::Linear,
}

impl<B: Backend> Mlp<B> {
    /// Packs the three matrices.
    pub(crate) fn load(loader: &mut Loader<'_, B>, config: &ModelConfig, names: &[String; 3]) -> Result<Self> {
        let (hidden, inter) = (config.hidden_size, config.intermediate_size);
        let [gate, up, down] = names;
        let gate_up = loader.packed(&[(gate, inter), (up, inter)], hidden)?;
        let down = loader.packed(&[(down, hidden)], inter)?;
        let backend = loader.backend();
        Ok(Self { gate_up: backend.with_bias(gate_up, None)?, down: backend.with_bias(down, None)? })
    }

    /// Says that the first weights are read after the next job.
    pub(crate) fn announce(&self, backend: &B) {
        backend.announce(&self.gate_up);
    }

    /// `[rows, hidden]` to `[rows, hidden]`.
    pub(crate) fn forward(&self, backend: &B, x: &B::Operand, next: &B::Linear) -> Result<B::Rows> {
        backend.announce(&self.down);
        let inner = backend.silu_and_mul(&backend.linear(x, &self.gate_up)?)?;
        backend.announce(next);
        backend.linear(&inner, &self.down)
    }
}
