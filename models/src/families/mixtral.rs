//! Mixtral: weights always normalised over the chosen experts, an optional sliding window.
//!
//! ```text
//! model.layers.{i}.block_sparse_moe.gate.weight            [experts, hidden]
//! model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight  [intermediate, hidden]   gate
//! model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight  [intermediate, hidden]   up
//! model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight  [hidden, intermediate]   down
//! ```
//!
//! Transformers 5 calls the block `mlp`; both names load.

use crate::config::{Defaults, ModelConfig};
use crate::error::Result;
use crate::fields::Fields;
use crate::names::{FfnNames, LayerNames};
use crate::registry::Family;
use crate::shards::Shards;

pub(crate) static FAMILY: Family = Family { architecture: "MixtralForCausalLM", model_type: "mixtral", config, layer };

fn config(fields: &Fields) -> Result<ModelConfig> {
    let defaults = Defaults { max_position_embeddings: 131_072, rms_norm_eps: 1e-5, rope_theta: 1_000_000.0 };
    let mut config = ModelConfig::common(fields, &FAMILY, defaults)?;
    config.moe_intermediate_size = config.intermediate_size;
    config.norm_topk_prob = true;
    config.sliding_window = fields.size_opt("sliding_window", 1 << 30)?;
    Ok(config)
}

fn layer(_: &ModelConfig, shards: &Shards, decoder: &str, layer: usize) -> LayerNames {
    let renamed = format!("{decoder}layers.{layer}.mlp");
    let block = match shards.contains(&format!("{renamed}.gate.weight")) {
        true => renamed,
        false => format!("{decoder}layers.{layer}.block_sparse_moe"),
    };
    LayerNames::llama(decoder, layer, FfnNames::experts(&block, ["w1", "w3", "w2"]))
}
