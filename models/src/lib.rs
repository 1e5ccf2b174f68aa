//! Mixture-of-experts checkpoints, from a Hugging Face folder, hub id or GGUF file to a forward pass.
//!
//! [`Checkpoint::open`] reads and checks the configuration and indexes the tensors; [`Checkpoint::load`] packs them for
//! the kernels, straight from the mapped files; [`Decoder::forward`] runs rows of any number of sequences against a paged
//! KV cache and hands the chosen experts to the ring as they are picked; a [`Replay`] gives experts in place of the choice.
#![deny(unsafe_code)]

mod attention;
mod awaited;
mod backend;
mod checkpoint;
mod config;
mod contents;
mod decoder;
mod dtype;
mod dummy;
mod error;
mod experts;
mod families;
mod fields;
mod generation;
mod gguf;
mod hidden;
mod hub;
mod kv_cache;
mod layer;
mod loader;
mod mlp;
mod moe;
mod names;
mod network;
mod pending;
mod registry;
mod replay;
mod ring;
mod rope;
mod shard;
mod shards;
mod step;
#[cfg(test)]
mod tests;

pub use awaited::Awaited;
pub use checkpoint::Checkpoint;
pub use config::{ModelConfig, QkNormKind};
pub use contents::Contents;
pub use decoder::Decoder;
pub use dtype::{DtypeChoice, Quantization, WeightChoice};
pub use error::{ModelError, Result};
pub use generation::GenerationConfig;
pub use gguf::GgufTokenizer;
pub use hidden::Hidden;
pub use kv_cache::{KvCache, SwappedKv};
pub use moetrail_kernels::{RingCells, SeqSpan, WeightDtype};
pub use pending::{DeviceMarks, PendingMarks, PendingReport, PendingTokens};
pub use registry::supported_architectures;
pub use replay::Replay;
pub use ring::Ring;
pub use rope::{RopeConfig, RopeScaling};
pub use step::{HiddenOutput, Marks, StepInput, StepOutput};
