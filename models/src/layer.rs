//! One decoder layer: attention, then a dense or a sparse feed-forward network, each behind a norm.

use candle_core::{Device, Tensor};
use moetrail_kernels::{KvPool, Linear, RopeTable, RowMarks, add_rms_norm, rms_norm};

use crate::attention::Attention;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::loader::Loader;
use crate::mlp::Mlp;
use crate::moe::{Moe, Seam};
use crate::names::{FfnNames, LayerNames};
use crate::step::StepInput;

/// One layer's weights.
#[derive(Clone)]
pub(crate) struct Layer {
    input_norm: Norm,
    attention: Attention,
    post_attention_norm: Norm,
    ffn: Ffn,
}

#[derive(Clone)]
enum Ffn {
    Dense(Mlp),
    Sparse(Moe),
}

impl Ffn {
    /// Says that what is multiplied first is read after the next job.
    fn announce(&self) {
        match self {
            Ffn::Dense(mlp) => mlp.announce(),
            Ffn::Sparse(moe) => moe.announce(),
        }
    }
}

/// A root-mean-square norm.
#[derive(Clone)]
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

    /// The residual stream with its last addition made, and its norm.
    pub(crate) fn forward(&self, stream: Residual) -> Result<(Tensor, Tensor)> {
        let Residual { x, addition } = stream;
        match addition {
            Some(addition) => Ok(add_rms_norm(&x, &addition, &self.weight, self.eps)?),
            None => {
                let normed = rms_norm(&x, &self.weight, self.eps)?;
                Ok((x, normed))
            }
        }
    }
}

/// The residual stream `[rows, hidden]`, and what is still to be added to it: the norm that follows does both at once.
pub(crate) struct Residual {
    pub(crate) x: Tensor,
    pub(crate) addition: Option<Tensor>,
}

impl Residual {
    /// Some rows of the stream.
    pub(crate) fn rows(&self, rows: &Tensor) -> Result<Residual> {
        let addition = self.addition.as_ref().map(|addition| addition.index_select(rows, 0)).transpose()?;
        Ok(Residual { x: self.x.index_select(rows, 0)?, addition })
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

    /// What is multiplied first.
    pub(crate) fn first(&self) -> &Linear {
        self.attention.first()
    }

    /// The stream after this layer, and what the router, if there is one, tells of the rows.
    pub(crate) fn forward(
        &self,
        stream: Residual,
        input: &StepInput<'_>,
        rope: &RopeTable,
        kv: &mut KvPool,
        layer: usize,
        seam: Seam<'_>,
    ) -> Result<(Residual, RowMarks)> {
        let (x, normed) = self.input_norm.forward(stream)?;
        let attended = self.attention.forward(&normed, input, rope, kv, layer, || self.ffn.announce())?;
        let (x, normed) = self.post_attention_norm.forward(Residual { x, addition: Some(attended) })?;
        let (out, marks) = match &self.ffn {
            Ffn::Dense(mlp) => (mlp.forward(&normed, seam.next)?, RowMarks::default()),
            Ffn::Sparse(moe) => moe.forward(&normed, seam)?,
        };
        Ok((Residual { x, addition: Some(out) }, marks))
    }
}
