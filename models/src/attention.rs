//! Self-attention over the paged cache.

use moetrail_kernels::{AttentionShape, QkNorm};

use crate::backend::{AttentionOf, Backend, LayerCache};
use crate::config::{ModelConfig, QkNormKind};
use crate::error::Result;
use crate::loader::Loader;
use crate::names::LayerNames;

/// The attention of one layer; query, key and value projections are one matrix.
#[derive(Clone)]
pub(crate) struct Attention<B: Backend> {
    /// `[(heads + 2 * kv_heads) * head_dim, hidden]`
    qkv: B::Linear,
    /// `[hidden, heads * head_dim]`
    output: B::Linear,
    norm: Option<B::QkNorm>,
    shape: AttentionShape,
}

impl<B: Backend> Attention<B> {
    /// Packs the projections.
    pub(crate) fn load(loader: &mut Loader<'_, B>, config: &ModelConfig, names: &LayerNames) -> Result<Self> {
        let (q, kv, hidden) = (config.q_width(), config.kv_width(), config.hidden_size);
        let weights = names.projections.each_ref().map(|name| format!("{name}.weight"));
        let [wq, wk, wv, wo] = &weights;
        let qkv = loader.packed(&[(wq, q), (wk, kv), (wv, kv)], hidden)?;
        let output = loader.packed(&[(wo, hidden)], q)?;
        let (qkv_bias, output_bias) = match config.attention_bias {
            true => {
                let biases = names.projections.each_ref().map(|name| format!("{name}.bias"));
                let [bq, bk, bv, bo] = &biases;
                let qkv_bias = loader.floats(&[(bq, &[q]), (bk, &[kv]), (bv, &[kv])])?;
                (Some(qkv_bias), Some(loader.floats(&[(bo, &[hidden])])?))
            }
            false => (None, None),
        };
        let norm = load_norm(loader, config, names)?;
        let backend = loader.backend();
        Ok(Self {
            qkv: backend.with_bias(qkv, qkv_bias)?,
            output: backend.with_bias(output, output_bias)?,
            norm: norm.map(|norm| backend.qk_norm(norm)).transpose()?,
            shape: config.attention_shape(),
        })
    }

    /// What is multiplied first.
    pub(crate) fn first(&self) -> &B::Linear {
        &self.qkv
    }

    /// Stores the rows' keys and values in a layer of the cache, and attends: `[rows, hidden]` to `[rows, hidden]`.
    pub(crate) fn forward(
        &self,
        backend: &B,
        step: &B::Step<'_>,
        x: &B::Operand,
        cache: LayerCache<'_, B>,
        announce_next: impl FnOnce(),
    ) -> Result<B::Rows> {
        backend.announce(&self.output);
        let qkv = backend.linear(x, &self.qkv)?;
        let attention = AttentionOf { shape: &self.shape, norm: self.norm.as_ref() };
        let attended = backend.attend(step, &qkv, attention, cache)?;
        announce_next();
        backend.linear(&attended, &self.output)
    }
}

fn load_norm<B: Backend>(
    loader: &mut Loader<'_, B>,
    config: &ModelConfig,
    names: &LayerNames,
) -> Result<Option<QkNorm>> {
    let widths = match config.qk_norm {
        QkNormKind::None => return Ok(None),
        QkNormKind::PerHead => [config.head_dim, config.head_dim],
        QkNormKind::FullWidth => [config.q_width(), config.kv_width()],
    };
    let [q, k] = &names.qk_norm;
    Ok(Some(QkNorm {
        q_weight: loader.floats(&[(q, &[widths[0]])])?,
        k_weight: loader.floats(&[(k, &[widths[1]])])?,
        eps: config.rms_norm_eps as f32,
        per_head: config.qk_norm == QkNormKind::PerHead,
    }))
}
