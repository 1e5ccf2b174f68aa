//! Self-attention over the paged cache.

use candle_core::Tensor;
use moetrail_kernels::{AttentionShape, KvPool, Linear, QkNorm, RopeTable, paged_attention, qkv_rope_store};

use crate::config::{ModelConfig, QkNormKind};
use crate::error::Result;
use crate::loader::Loader;
use crate::names::LayerNames;
use crate::step::StepInput;

/// The attention of one layer; query, key and value projections are one matrix.
#[derive(Clone)]
pub(crate) struct Attention {
    /// `[(heads + 2 * kv_heads) * head_dim, hidden]`
    qkv: Linear,
    /// `[hidden, heads * head_dim]`
    output: Linear,
    norm: Option<QkNorm>,
    shape: AttentionShape,
}

impl Attention {
    /// Packs the projections.
    pub(crate) fn load(loader: &mut Loader<'_>, config: &ModelConfig, names: &LayerNames) -> Result<Self> {
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
        Ok(Self {
            qkv: Linear::new(qkv, qkv_bias),
            output: Linear::new(output, output_bias),
            norm: load_norm(loader, config, names)?,
            shape: AttentionShape {
                heads: config.num_attention_heads,
                kv_heads: config.num_key_value_heads,
                head_dim: config.head_dim,
                scale: (config.head_dim as f64).powf(-0.5) as f32,
                window: config.sliding_window,
                clip_qkv: config.clip_qkv.map(|bound| bound as f32),
            },
        })
    }

    /// What is multiplied first.
    pub(crate) fn first(&self) -> &Linear {
        &self.qkv
    }

    /// Stores the rows' keys and values in a layer of the cache, and attends: `[rows, hidden]` to `[rows, hidden]`.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        input: &StepInput<'_>,
        rope: &RopeTable,
        kv: &mut KvPool,
        layer: usize,
        announce_next: impl FnOnce(),
    ) -> Result<Tensor> {
        self.output.announce();
        let qkv = self.qkv.forward(x)?;
        let (positions, slots) = (input.positions, input.slot_mapping);
        let store = kv.layer_mut(layer);
        let q = qkv_rope_store(&qkv, &self.shape, self.norm.as_ref(), rope, positions, slots, store)?;
        let attended = paged_attention(&q, &self.shape, input.seqs, kv.layer_mut(layer))?;
        announce_next();
        Ok(self.output.forward(&attended)?)
    }
}

fn load_norm(loader: &mut Loader<'_>, config: &ModelConfig, names: &LayerNames) -> Result<Option<QkNorm>> {
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
