//! Qwen 3 MoE: norms on each query and key head, dense layers among the sparse ones.
//!
//! ```text
//! model.layers.{i}.self_attn.{q,k}_norm.weight        [head_dim]
//! model.layers.{i}.mlp.gate.weight                    [experts, hidden]
//! model.layers.{i}.mlp.experts.{e}.{gate,up}_proj.weight   [moe_intermediate, hidden]
//! model.layers.{i}.mlp.experts.{e}.down_proj.weight        [hidden, moe_intermediate]
//! model.layers.{i}.mlp.{gate,up,down}_proj.weight     in a dense layer, of width intermediate
//! ```

use crate::config::{Defaults, MAX_LAYERS, ModelConfig, QkNormKind};
use crate::error::Result;
use crate::fields::Fields;
use crate::names::{FfnNames, LayerNames};
use crate::registry::Family;
use crate::shards::Shards;

pub(crate) static FAMILY: Family =
    Family { architecture: "Qwen3MoeForCausalLM", model_type: "qwen3_moe", config, layer };

fn config(fields: &Fields) -> Result<ModelConfig> {
    let defaults = Defaults { max_position_embeddings: 32768, rms_norm_eps: 1e-6, rope_theta: 10_000.0 };
    let mut config = ModelConfig::common(fields, &FAMILY, defaults)?;
    config.norm_topk_prob = fields.bool_or("norm_topk_prob", false)?;
    config.attention_bias = fields.bool_or("attention_bias", false)?;
    config.qk_norm = QkNormKind::PerHead;
    config.moe_layers = sparse_layers(fields, &config)?;
    if fields.bool_or("use_sliding_window", false)? {
        config.sliding_window = fields.size_opt("sliding_window", 1 << 30)?;
    }
    Ok(config)
}

/// The layers that `decoder_sparse_step` and `mlp_only_layers` leave with experts.
fn sparse_layers(fields: &Fields, config: &ModelConfig) -> Result<Vec<usize>> {
    let step = fields.size_opt("decoder_sparse_step", MAX_LAYERS)?.unwrap_or(1);
    let dense = fields.ids("mlp_only_layers", 1 << 32)?;
    if config.num_experts == 0 {
        return Ok(Vec::new());
    }
    let sparse = |&i: &usize| (i + 1).is_multiple_of(step) && !dense.contains(&(i as u32));
    Ok((0..config.num_hidden_layers).filter(sparse).collect())
}

fn layer(config: &ModelConfig, _: &Shards, decoder: &str, layer: usize) -> LayerNames {
    let mlp = format!("{decoder}layers.{layer}.mlp");
    let ffn = match config.is_moe_layer(layer) {
        true => FfnNames::experts(&mlp, ["gate_proj", "up_proj", "down_proj"]),
        false => FfnNames::dense(&mlp),
    };
    LayerNames::llama(decoder, layer, ffn)
}
