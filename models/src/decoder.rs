//! A loaded model, on whichever processor.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use moetrail_kernels::gpu::{Gpu, SampleParams};
use moetrail_kernels::{KvPool, WeightDtype, WeightFormat};

use crate::backend::{Cpu, GpuBackend};
use crate::config::ModelConfig;
use crate::dtype::{Quantization, WeightChoice};
use crate::error::Result;
use crate::hidden::{self, Hidden};
use crate::kv_cache::KvCache;
use crate::loader::Loader;
use crate::network::{Network, NetworkWeights};
use crate::pending::{PendingMarks, PendingTokens};
use crate::registry::Family;
use crate::ring::Ring;
use crate::step::{HiddenOutput, Limits, Marks, StepInput, StepOutput, refused};

/// A loaded model. A clone shares the weights.
#[derive(Clone)]
pub struct Decoder {
    config: ModelConfig,
    max_positions: usize,
    place: Place,
}

/// The weights, where they are.
#[derive(Clone)]
enum Place {
    Host(Network<Cpu>),
    Device(Box<Network<GpuBackend>>, Gpu),
}

impl Decoder {
    /// Packs all weights for the CPU.
    pub(crate) fn load(
        loader: Loader<'_, Cpu>,
        config: ModelConfig,
        family: &Family,
        max_positions: usize,
    ) -> Result<Self> {
        let place = Place::Host(Network::load(loader, &config, family, max_positions)?);
        Ok(Self { config, max_positions, place })
    }

    /// Packs all weights for a GPU.
    pub(crate) fn load_on(
        gpu: &Gpu,
        loader: Loader<'_, GpuBackend>,
        config: ModelConfig,
        family: &Family,
        max_positions: usize,
    ) -> Result<Self> {
        let place = Place::Device(Box::new(Network::load(loader, &config, family, max_positions)?), gpu.clone());
        Ok(Self { config, max_positions, place })
    }

    /// The GPU that computes; `None` for the CPU.
    pub fn gpu(&self) -> Option<&Gpu> {
        match &self.place {
            Place::Host(_) => None,
            Place::Device(_, gpu) => Some(gpu),
        }
    }

    /// How many decode steps are recorded.
    #[cfg(test)]
    pub(crate) fn recorded(&self) -> usize {
        match &self.place {
            Place::Host(_) => 0,
            Place::Device(network, _) => network.backend.recordings.lock().expect("no step panicked").recorded(),
        }
    }

    fn weights(&self) -> &NetworkWeights {
        match &self.place {
            Place::Host(network) => &network.weights,
            Place::Device(network, _) => &network.weights,
        }
    }

    /// The architecture.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What weights that are not quantised are packed as, and the dtype of the KV cache.
    pub fn dtype(&self) -> WeightDtype {
        self.weights().dtype
    }

    /// Bytes of the packed weights.
    pub fn weight_bytes(&self) -> usize {
        self.weights().bytes
    }

    /// What to load other weights of this model with, so that they are packed alike.
    pub fn weight_choice(&self) -> WeightChoice {
        let int8 = self.weights().formats.contains(&WeightFormat::Int8);
        WeightChoice { dtype: self.dtype().into(), quantization: int8.then_some(Quantization::Int8) }
    }

    /// The formats of the packed matrices; routers and norms apart.
    pub fn weight_formats(&self) -> impl std::fmt::Display {
        self.weights().formats.iter().map(WeightFormat::to_string).collect::<Vec<_>>().join(", ")
    }

    /// Positions at or above this are refused: the length of the rotary table.
    pub fn max_positions(&self) -> usize {
        self.max_positions
    }

    /// A KV cache of this model's shape, where the model computes.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn new_kv(&self, num_blocks: usize, block_size: usize) -> Result<KvCache> {
        Ok(match &self.place {
            Place::Host(network) => KvCache::Host(network.kv(&self.config, num_blocks, block_size)?),
            Place::Device(network, _) => KvCache::Device(network.kv(&self.config, num_blocks, block_size)?),
        })
    }

    /// Bytes of one block of the KV cache, all layers together.
    pub fn kv_bytes_per_block(&self, block_size: usize) -> usize {
        let config = &self.config;
        let (layers, kv_heads) = (config.num_hidden_layers, config.num_key_value_heads);
        KvPool::bytes_per_block(layers, block_size, kv_heads, config.head_dim, self.dtype())
    }

    /// Runs the rows through all layers and those of `logit_rows` through the head: [`hidden`](Self::hidden), then
    /// [`logits`](Self::logits).
    pub fn forward(&self, input: &StepInput<'_>, kv: &mut KvCache, ring: Option<Ring<'_>>) -> Result<StepOutput> {
        let HiddenOutput { hidden, marks } = self.hidden(input, kv, ring)?;
        let logits = self.logits(&hidden, 0..hidden.len())?;
        let (Marks { nan_rows, changed_cells }, _) = marks.finish(&PendingTokens::default())?;
        Ok(StepOutput { logits, nan_rows, changed_cells })
    }

    /// Runs the rows through all layers, and those of `logit_rows` through the final norm.
    ///
    /// Keys and values go to `kv` at the rows' slots; the experts of every row go to `ring`, `[slots, moe_layers,
    /// top_k]`, at the same slots, in the order of [`ModelConfig::moe_layers`]. A replayed row takes the given experts,
    /// and these go to the ring.
    pub fn hidden(&self, input: &StepInput<'_>, kv: &mut KvCache, ring: Option<Ring<'_>>) -> Result<HiddenOutput> {
        self.check(input, kv, ring.as_ref())?;
        if input.token_ids.is_empty() {
            let hidden = Tensor::zeros((0, self.config.hidden_size), DType::F32, &Device::Cpu)?;
            return Ok(output(hidden::Place::Host(hidden), PendingMarks::Host(Marks::default())));
        }
        match (&self.place, kv) {
            (Place::Host(_), _) if input.awaited.is_some() => {
                Err(refused("awaited", "a device that samples".into(), "a decoder on the host".into()))
            }
            (Place::Host(network), KvCache::Host(kv)) => {
                let ring = ring.map(Ring::host).transpose()?;
                let (hidden, marks) = network.hidden(&self.config, input, kv, ring)?;
                Ok(output(hidden::Place::Host(hidden), marks))
            }
            (Place::Device(network, _), KvCache::Device(kv)) => {
                let ring = ring.map(Ring::device).transpose()?;
                let (hidden, marks) = network.hidden_recorded(&self.config, input, kv, ring)?;
                Ok(output(hidden::Place::Device(hidden), marks))
            }
            _ => Err(refused("kv", "memory of where the weights are".into(), "other memory".into())),
        }
    }

    /// The logits of some of the hidden rows, F32 `[rows, vocab]` on the host.
    ///
    /// A vocabulary makes these much larger than the hidden rows: callers with many rows take them in slices.
    pub fn logits(&self, hidden: &Hidden, rows: Range<usize>) -> Result<Tensor> {
        if rows.is_empty() {
            return Ok(Tensor::zeros((0, self.config.vocab_size), DType::F32, &Device::Cpu)?);
        }
        match (&self.place, &hidden.0) {
            (Place::Host(network), hidden::Place::Host(hidden)) => {
                network.logits(&hidden.narrow(0, rows.start, rows.len())?)
            }
            (Place::Device(network, _), hidden::Place::Device(hidden)) => {
                let logits = network.logits(&hidden.slice(rows.start, rows.len()))?;
                let values = logits.to_host(0, rows.len())?;
                Ok(Tensor::from_vec(values, (rows.len(), self.config.vocab_size), &Device::Cpu)?)
            }
            _ => Err(refused("hidden", "rows of this model".into(), "rows of another place".into())),
        }
    }

    /// Issues the sampling of tokens from rows of `hidden` on the device: pairs of a row and how, ascending by row. Their
    /// logits never leave it. [`PendingMarks::send`] brings the tokens.
    pub fn sample(&self, hidden: &Hidden, tokens: &[(u32, SampleParams)]) -> Result<PendingTokens> {
        let Some((last, _)) = tokens.last() else { return Ok(PendingTokens::default()) };
        if !tokens.is_sorted_by_key(|(row, _)| row) || *last as usize >= hidden.len() {
            let rows: Vec<u32> = tokens.iter().map(|(row, _)| *row).collect();
            return Err(refused("tokens", format!("ascending rows below {}", hidden.len()), format!("{rows:?}")));
        }
        match (&self.place, &hidden.0) {
            (Place::Device(network, _), hidden::Place::Device(hidden)) => network.sample(hidden, tokens),
            _ => Err(refused("hidden", "rows on a device".into(), "rows of another place".into())),
        }
    }

    /// The most alternatives that a token sampled on the device may list; `None` where none is sampled there.
    pub fn max_sampled_logprobs(&self) -> Option<usize> {
        let fits = self.config.vocab_size <= SampleParams::MAX_VOCAB;
        (self.gpu().is_some() && fits).then_some(SampleParams::MAX_TOP)
    }

    fn check(&self, input: &StepInput<'_>, kv: &KvCache, ring: Option<&Ring<'_>>) -> Result<()> {
        let num_slots = kv.num_blocks() * kv.block_size();
        let limits = Limits { config: &self.config, max_positions: self.max_positions, num_slots };
        input.check(&limits)?;
        match ring {
            None => Ok(()),
            Some(ring) => ring.check(&self.config, num_slots),
        }
    }
}

fn output(hidden: hidden::Place, marks: PendingMarks) -> HiddenOutput {
    HiddenOutput { hidden: Hidden(hidden), marks }
}
