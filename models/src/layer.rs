//! One decoder layer: attention, then a dense or a sparse feed-forward network, each behind a norm.

use candle_core::{Device, Tensor};
use moetrail_kernels::{KvPool, RopeTable, RowMarks, rms_norm};

use crate::attention::Attention;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::loader::Loader;
use crate::mlp::Mlp;
use crate::moe::{Moe, Seam};
use crate::names::{FfnNames, LayerNames};
use crate::step::StepInput;

/// One layer's weights.
pub(crate) struct Layer {
    input_norm: Norm,
    attention: Attention,
    post_attention_norm: Norm,
    ffn: Ffn,
}

enum Ffn {
    Dense(Mlp),
    Sparse(Moe),
}

/// A root-mean-square norm.
pub(crate) struct Norm {
    /// F32 `[hidden]`
    weight: Tensor,
    eps: f32,
}

impl Norm {
    pub(crate) fn load(loader: &mut Loader<'_>, config: &ModelConfig, name: &str) -> Result<Self> {
        let weight = loader.floats(&[(name, &[config.hidden_size])])?;
        let weight = Tensor::from_vec(weight, config.hidden_size, &Device::Cpu)?;
        Ok(Self { weight, eps: config.rms_norm_eps as f32 })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(rms_norm(x, &self.weight, self.eps)?)
    }
}

impl Layer {
    /// Packs the layer.
    pub(crate) fn load(loader: &mut Loader<'_>, config: &ModelConfig, names: &LayerNames) -> Result<Self> {
        let input_norm = Norm::load(loader, config, &names.input_norm)?;
        let attention = Attention::load(loader, config, names)?;
        let post_attention_norm = Norm::load(loader, config, &names.post_attention_norm)?;
        let ffn = match &names.ffn {
            FfnNames::Dense(names) => Ffn::Dense(Mlp::load(loader, config, names)?),
            FfnNames::Experts(names) => Ffn::Sparse(Moe::load(loader, config, names)?),
        };
        Ok(Self { input_norm, attention, post_attention_norm, ffn })
    }

    /// `[rows, hidden]` to `[rows, hidden]`, and what the router, if there is one, tells of the rows.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        input: &StepInput<'_>,
        rope: &RopeTable,
        kv: &mut KvPool,
        layer: usize,
        seam: Seam<'_>,
    ) -> Result<(Tensor, RowMarks)> {
        let attended = self.attention.forward(&self.input_norm.forward(x)?, input, rope, kv, layer)?;
        let x = (x + attended)?;
        let normed = self.post_attention_norm.forward(&x)?;
        let (out, marks) = match &self.ffn {
            Ffn::Dense(mlp) => (mlp.forward(&normed)?, RowMarks::default()),
            Ffn::Sparse(moe) => moe.forward(&normed, seam)?,
        };
        Ok(((x + out)?, marks))
    }
}
