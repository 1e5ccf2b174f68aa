//! The forward pass: embedding, layers, head.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use moetrail_kernels::{
    KvPool, Linear, PackedMatrix, RingCells, RingWrite, RopeTable, WeightDtype, WeightFormat, embedding,
};

use crate::config::ModelConfig;
use crate::dtype::{Quantization, WeightChoice};
use crate::error::Result;
use crate::layer::{Layer, Norm, Residual};
use crate::loader::Loader;
use crate::moe::Seam;
use crate::registry::Family;
use crate::step::{HiddenOutput, Limits, StepInput, StepOutput, num_slots, refused};

/// A loaded model. A clone shares the weights.
#[derive(Clone)]
pub struct Decoder {
    config: ModelConfig,
    device: Device,
    dtype: WeightDtype,
    /// `[vocab, hidden]`
    embedding: PackedMatrix,
    layers: Vec<Layer>,
    norm: Norm,
    /// `[vocab, hidden]`; shares the embedding's memory where the checkpoint ties them.
    head: Linear,
    rope: Arc<RopeTable>,
    weight_bytes: usize,
    weight_formats: Vec<WeightFormat>,
}

impl Decoder {
    /// Packs all weights.
    pub(crate) fn load(
        mut loader: Loader<'_>,
        config: ModelConfig,
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
        for index in 0..config.num_hidden_layers {
            let names = (family.layer)(&config, loader.shards(), decoder, index);
            layers.push(Layer::load(&mut loader, &config, &names)?);
            loader.end_layer();
        }
        let norm = Norm::load(&mut loader, &config, &format!("{decoder}norm.weight"))?;
        let head = match tied {
            true => embedding.clone(),
            false => loader.packed(&[(HEAD, vocab)], hidden)?,
        };
        let dtype = loader.dtype();
        let (weight_bytes, weight_formats) = loader.finish();
        Ok(Self {
            rope: Arc::new(config.rope.table(config.head_dim, max_positions)),
            config,
            device: Device::Cpu,
            dtype,
            embedding,
            layers,
            norm,
            head: Linear::new(head, None),
            weight_bytes,
            weight_formats,
        })
    }

    /// The architecture.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where the forward pass runs.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What weights that are not quantised are packed as, and the dtype of the KV cache.
    pub fn dtype(&self) -> WeightDtype {
        self.dtype
    }

    /// Bytes of the packed weights.
    pub fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }

    /// What to load other weights of this model with, so that they are packed alike.
    pub fn weight_choice(&self) -> WeightChoice {
        let int8 = self.weight_formats.contains(&WeightFormat::Int8);
        WeightChoice { dtype: self.dtype.into(), quantization: int8.then_some(Quantization::Int8) }
    }

    /// The formats of the packed matrices; routers and norms apart.
    pub fn weight_formats(&self) -> impl std::fmt::Display {
        self.weight_formats.iter().map(WeightFormat::to_string).collect::<Vec<_>>().join(", ")
    }

    /// Positions at or above this are refused: the length of the rotary table.
    pub fn max_positions(&self) -> usize {
        self.rope.max_positions()
    }

    /// A KV cache of this model's shape.
    pub fn new_kv_pool(&self, num_blocks: usize, block_size: usize) -> KvPool {
        let config = &self.config;
        let (layers, kv_heads) = (config.num_hidden_layers, config.num_key_value_heads);
        KvPool::new(layers, num_blocks, block_size, kv_heads, config.head_dim, self.dtype)
    }

    /// Bytes of one block of the KV cache, all layers together.
    pub fn kv_bytes_per_block(&self, block_size: usize) -> usize {
        let config = &self.config;
        let (layers, kv_heads) = (config.num_hidden_layers, config.num_key_value_heads);
        KvPool::bytes_per_block(layers, block_size, kv_heads, config.head_dim, self.dtype)
    }

    /// Runs the rows through all layers and those of `logit_rows` through the head: [`hidden`](Self::hidden), then
    /// [`logits`](Self::logits).
    pub fn forward(&self, input: &StepInput<'_>, kv: &mut KvPool, ring: Option<RingCells<'_>>) -> Result<StepOutput> {
        let HiddenOutput { hidden, nan_rows, changed_cells } = self.hidden(input, kv, ring)?;
        Ok(StepOutput { logits: self.logits(&hidden)?, nan_rows, changed_cells })
    }

    /// Runs the rows through all layers, and those of `logit_rows` through the final norm.
    ///
    /// Keys and values go to `kv` at the rows' slots; the experts of every row go to `ring`, `[slots, moe_layers,
    /// top_k]`, at the same slots, in the order of [`ModelConfig::moe_layers`]. A replayed row takes the given experts,
    /// and these go to the ring.
    pub fn hidden(
        &self,
        input: &StepInput<'_>,
        kv: &mut KvPool,
        mut ring: Option<RingCells<'_>>,
    ) -> Result<HiddenOutput> {
        self.check(input, kv, ring.as_ref())?;
        if input.token_ids.is_empty() {
            let hidden = Tensor::zeros((0, self.config.hidden_size), candle_core::DType::F32, &self.device)?;
            return Ok(HiddenOutput { hidden, nan_rows: Vec::new(), changed_cells: Vec::new() });
        }
        let mut nan_rows = Vec::new();
        let mut changed_cells = vec![0; input.replay.map_or(0, |replay| replay.row_of.len())];
        let mut moe_layer = 0;
        let x = embedding(&self.embedding, input.token_ids, &self.device)?;
        let mut stream = Residual { x, addition: None };
        for (index, layer) in self.layers.iter().enumerate() {
            let sparse = self.config.is_moe_layer(index);
            let capture = ring.as_mut().filter(|_| sparse).map(|ring| RingWrite {
                cells: again(ring),
                moe_layers: self.config.moe_layers.len(),
                moe_layer,
                slots: input.slot_mapping,
            });
            let replay = input.replay.filter(|_| sparse).map(|replay| replay.of_layer(moe_layer, &self.config));
            moe_layer += usize::from(sparse);
            let next = self.layers.get(index + 1).map_or(&self.head, Layer::first);
            let seam = Seam { capture, replay, next };
            let (after, marks) = layer.forward(stream, input, &self.rope, kv, index, seam)?;
            stream = after;
            nan_rows.extend(marks.nan_rows);
            for row in marks.changed_rows {
                changed_cells[row as usize] += 1;
            }
        }
        nan_rows.sort_unstable();
        nan_rows.dedup();
        let hidden = match input.logit_rows {
            [] => Tensor::zeros((0, self.config.hidden_size), candle_core::DType::F32, &self.device)?,
            rows => {
                let wanted = stream.rows(&Tensor::from_slice(rows, rows.len(), &self.device)?)?;
                self.norm.forward(wanted)?.1
            }
        };
        Ok(HiddenOutput { hidden, nan_rows, changed_cells })
    }

    /// The logits of hidden rows, `[rows, hidden]` to F32 `[rows, vocab]`.
    ///
    /// A vocabulary makes these much larger than the hidden rows: callers with many rows take them in slices.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        if hidden.dim(0)? == 0 {
            return Ok(Tensor::zeros((0, self.config.vocab_size), candle_core::DType::F32, &self.device)?);
        }
        self.head.forward(hidden).map_err(Into::into)
    }

    fn check(&self, input: &StepInput<'_>, kv: &KvPool, ring: Option<&RingCells<'_>>) -> Result<()> {
        let num_slots = num_slots(kv);
        let limits = Limits { config: &self.config, max_positions: self.max_positions(), num_slots };
        input.check(&limits)?;
        let Some(ring) = ring else {
            return Ok(());
        };
        let cells = self.config.moe_layers.len() * self.config.num_experts_per_tok;
        let (len, widest) = match ring {
            RingCells::U8(cells) => (cells.len(), 1 << 8),
            RingCells::U16(cells) => (cells.len(), 1 << 16),
        };
        if len != num_slots * cells {
            let expected = format!("{num_slots} slots of {cells} cells");
            return Err(refused("ring", expected, format!("{len} cells")));
        }
        if self.config.num_experts > widest {
            let expected = format!("cells that hold ids below {}", self.config.num_experts);
            return Err(refused("ring", expected, format!("cells that hold ids below {widest}")));
        }
        Ok(())
    }
}

/// The same cells for a shorter while.
fn again<'a>(ring: &'a mut RingCells<'_>) -> RingCells<'a> {
    match ring {
        RingCells::U8(cells) => RingCells::U8(cells),
        RingCells::U16(cells) => RingCells::U16(cells),
    }
}

const HEAD: &str = "lm_head.weight";

/// Whether a tied checkpoint's head, should it be stored as well, is the embedding.
///
/// Transformers keeps a stored head that differs from the embedding in spite of `tie_word_embeddings`; so do we.
fn head_is_embedding(loader: &mut Loader<'_>, embedding: &str) -> Result<bool> {
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
