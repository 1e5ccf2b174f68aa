//! One decoder layer: attention, then a dense or a sparse feed-forward network, each behind a norm.

use crate::attention::Attention;
use crate::backend::{Backend, LayerCache, Residual};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::loader::Loader;
use crate::mlp::Mlp;
use crate::moe::Moe;
use crate::names::{FfnNames, LayerNames};

/// One layer's weights.
#[derive(Clone)]
pub(crate) struct Layer<B: Backend> {
    input_norm: Norm<B>,
    attention: Attention<B>,
    post_attention_norm: Norm<B>,
    ffn: Ffn<B>,
}

#[derive(Clone)]
enum Ffn<B: Backend> {
    Dense(Mlp<B>),
    Sparse(Moe<B>),
}

impl<B: Backend> Ffn<B> {
    /// Says that what is multiplied first is read after the next job.
    fn announce(&self, backend: &B) {
        match self {
            Ffn::Dense(mlp) => mlp.announce(backend),
            Ffn::Sparse(moe) => moe.announce(backend),
        }
    }
}

/// A root-mean-square norm.
#[derive(Clone)]
pub(crate) struct Norm<B: Backend> {
    /// `[hidden]`
    weight: B::Vector,
    eps: f32,
}

impl<B: Backend> Norm<B> {
    pub(crate) fn load(loader: &mut Loader<'_, B>, config: &ModelConfig, name: &str) -> Result<Self> {
        let weight = loader.floats(&[(name, &[config.hidden_size])])?;
        Ok(Self { weight: loader.backend().vector(weight)?, eps: config.rms_norm_eps as f32 })
    }

    /// The residual stream with its last addition made, and its norm.
    pub(crate) fn forward(&self, backend: &B, stream: Residual<B>) -> Result<(B::Rows, B::Operand)> {
        backend.norm(stream, &self.weight, self.eps)
    }
}

impl<B: Backend> Layer<B> {
    /// Packs the layer; if it routes, it is MoE layer `moe_layer`.
    pub(crate) fn load(
        loader: &mut Loader<'_, B>,
        config: &ModelConfig,
        names: &LayerNames,
        moe_layer: usize,
    ) -> Result<Self> {
        let input_norm = Norm::load(loader, config, &names.input_norm)?;
        let attention = Attention::load(loader, config, names)?;
        let post_attention_norm = Norm::load(loader, config, &names.post_attention_norm)?;
        let ffn = match &names.ffn {
            FfnNames::Dense(names) => Ffn::Dense(Mlp::load(loader, config, names)?),
            FfnNames::Experts(names) => Ffn::Sparse(Moe::load(loader, config, names, moe_layer)?),
        };
        Ok(Self { input_norm, attention, post_attention_norm, ffn })
    }

    /// What is multiplied first.
    pub(crate) fn first(&self) -> &B::Linear {
        self.attention.first()
    }

    /// The stream after this layer; `next` is multiplied after it.
    pub(crate) fn forward(
        &self,
        backend: &B,
        step: &mut B::Step<'_>,
        stream: Residual<B>,
        cache: LayerCache<'_, B>,
        next: &B::Linear,
    ) -> Result<Residual<B>> {
        let (x, normed) = self.input_norm.forward(backend, stream)?;
        let announce_next = || self.ffn.announce(backend);
        let attended = self.attention.forward(backend, step, &normed, cache, announce_next)?;
        let (x, normed) = self.post_attention_norm.forward(backend, Residual { x, addition: Some(attended) })?;
        let out = match &self.ffn {
            Ffn::Dense(mlp) => mlp.forward(backend, &normed, next)?,
            Ffn::Sparse(moe) => moe.forward(backend, step, &normed, next)?,
        };
        Ok(Residual { x, addition: Some(out) })
    }
}
