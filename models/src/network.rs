//! The forward pass: embedding, layers, head. Written once, over a [`Backend`].

use moetrail_kernels::gpu::{DeviceRows, SampleParams};
use moetrail_kernels::{WeightDtype, WeightFormat};

use crate::backend::{Backend, GpuBackend, LayerCache, Residual};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::layer::{Layer, Norm};
use crate::loader::Loader;
use crate::pending::{PendingMarks, PendingTokens};
use crate::registry::Family;
use crate::step::StepInput;

/// The weights of a model, packed for a backend. A clone shares them.
#[derive(Clone)]
pub(crate) struct Network<B: Backend> {
    pub(crate) backend: B,
    /// `[vocab, hidden]`
    embedding: B::Matrix,
    layers: Vec<Layer<B>>,
    norm: Norm<B>,
    /// `[vocab, hidden]`; shares the embedding's memory where the checkpoint ties them.
    head: B::Linear,
    rope: B::Rope,
    pub(crate) weights: NetworkWeights,
}

/// What the weights were packed as.
#[derive(Clone)]
pub(crate) struct NetworkWeights {
    /// Of those that are not quantised, and of the cache.
    pub(crate) dtype: WeightDtype,
    pub(crate) bytes: usize,
    /// Of the matrices, routers apart.
    pub(crate) formats: Vec<WeightFormat>,
}

impl<B: Backend> Network<B> {
    /// Packs all weights.
    pub(crate) fn load(
        mut loader: Loader<'_, B>,
        config: &ModelConfig,
        family: &Family,
        max_positions: usize,
    ) -> Result<Self> {
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        // A bare decoder is saved without the prefix that a model with a head gives its names.
        let bare =
            !loader.shards().contains("model.embed_tokens.weight") && loader.shards().contains("embed_tokens.weight");
        let decoder = if bare { "" } else { "model." };
        let embed_name = format!("{decoder}embed_tokens.weight");
        let tied = config.tie_word_embeddings && head_is_embedding(&mut loader, &embed_name)?;
        let embedding = loader.packed(&[(&embed_name, vocab)], hidden)?;
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        let mut moe_layer = 0;
        for index in 0..config.num_hidden_layers {
            let names = (family.layer)(config, loader.shards(), decoder, index);
            layers.push(Layer::load(&mut loader, config, &names, moe_layer)?);
            moe_layer += usize::from(config.is_moe_layer(index));
            loader.end_layer();
        }
        let norm = Norm::load(&mut loader, config, &format!("{decoder}norm.weight"))?;
        let head = match tied {
            true => embedding.clone(),
            false => loader.packed(&[(HEAD, vocab)], hidden)?,
        };
        let packing = loader.backend();
        let (head, rope) =
            (packing.with_bias(head, None)?, packing.rope(config.rope.table(config.head_dim, max_positions))?);
        packing.loaded()?;
        // Another, which holds nothing that was needed to pack.
        let (backend, dtype) = (packing.clone(), loader.dtype());
        let (bytes, formats) = loader.finish();
        Ok(Self { backend, embedding, layers, norm, head, rope, weights: NetworkWeights { dtype, bytes, formats } })
    }

    /// A KV cache of the model's shape.
    pub(crate) fn kv(&self, config: &ModelConfig, num_blocks: usize, block_size: usize) -> Result<B::Kv> {
        self.backend.kv(config, num_blocks, block_size, self.weights.dtype)
    }

    /// Runs the rows through all layers, and those whose logits are wanted through the final norm.
    pub(crate) fn hidden<'a>(
        &self,
        config: &ModelConfig,
        input: &StepInput<'a>,
        kv: &mut B::Kv,
        ring: Option<B::Ring<'a>>,
    ) -> Result<(B::Operand, PendingMarks)> {
        let mut step = self.backend.begin(input, ring, config, kv)?;
        let hidden = self.layers(&mut step, kv)?;
        Ok((hidden, self.backend.end(step)))
    }

    /// What lies between the beginning and the end of a step.
    pub(crate) fn layers(&self, step: &mut B::Step<'_>, kv: &mut B::Kv) -> Result<B::Operand> {
        let backend = &self.backend;
        let mut stream = Residual { x: backend.embed(step, &self.embedding)?, addition: None };
        for (index, layer) in self.layers.iter().enumerate() {
            let next = self.layers.get(index + 1).map_or(&self.head, Layer::first);
            let cache = LayerCache { kv, layer: index, rope: &self.rope };
            stream = layer.forward(backend, step, stream, cache, next)?;
        }
        let wanted = backend.logit_rows(step, stream)?;
        Ok(self.norm.forward(backend, wanted)?.1)
    }

    /// The logits of hidden rows, `[rows, hidden]` to `[rows, vocab]`.
    pub(crate) fn logits(&self, hidden: &B::Operand) -> Result<B::Rows> {
        self.backend.linear(hidden, &self.head)
    }
}

impl Network<GpuBackend> {
    /// Issues the sampling of tokens from the logits of hidden rows: pairs of a row and how, ascending by row.
    pub(crate) fn sample(&self, hidden: &DeviceRows, tokens: &[(u32, SampleParams)]) -> Result<PendingTokens> {
        let vocab = self.head.out_features();
        self.backend.sample(tokens, vocab, |first, len| self.logits(&hidden.slice(first, len)))
    }
}

const HEAD: &str = "lm_head.weight";

/// Whether a tied checkpoint's head, should it be stored as well, is the embedding.
///
/// Transformers keeps a stored head that differs from the embedding in spite of `tie_word_embeddings`; so do we.
fn head_is_embedding<B: Backend>(loader: &mut Loader<'_, B>, embedding: &str) -> Result<bool> {
    let (head, table) = (loader.shards().get(HEAD), loader.shards().get(embedding));
    let (Some(head), Some(table)) = (head, table) else {
        return Ok(true);
    };
    let same = head.dtype() == table.dtype() && head.shape() == table.shape() && head.bytes() == table.bytes();
    if same {
        loader.skip(HEAD);
    } else {
        tracing::warn!(
            path = %head.path().display(),
            "tie_word_embeddings is set, yet {HEAD} differs from the embedding: the stored head is used"
        );
    }
    Ok(same)
}
