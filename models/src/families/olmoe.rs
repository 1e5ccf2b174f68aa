//! OLMoE: norms over the full width of query and key, optional clipping, experts in every layer.
//!
//! ```text
//! model.layers.{i}.self_attn.q_norm.weight            [heads * head_dim]
//! model.layers.{i}.self_attn.k_norm.weight            [kv_heads * head_dim]
//! model.layers.{i}.mlp.gate.weight                    [experts, hidden]
//! model.layers.{i}.mlp.experts.{e}.{gate,up}_proj.weight   [intermediate, hidden]
//! model.layers.{i}.mlp.experts.{e}.down_proj.weight        [hidden, intermediate]
//! ```

use crate::config::{Defaults, ModelConfig, QkNormKind};
use crate::error::Result;
use crate::fields::Fields;
use crate::names::{FfnNames, LayerNames};
use crate::registry::Family;
use crate::shards::Shards;

pub(crate) static FAMILY: Family = Family { architecture: "OlmoeForCausalLM", model_type: "olmoe", config, layer };

fn config(fields: &Fields) -> Result<ModelConfig> {
    let defaults = Defaults { max_position_embeddings: 4096, rms_norm_eps: 1e-5, rope_theta: 10_000.0 };
    let mut config = ModelConfig::common(fields, &FAMILY, defaults)?;
    config.moe_intermediate_size = config.intermediate_size;
    config.norm_topk_prob = fields.bool_or("norm_topk_prob", false)?;
    config.attention_bias = fields.bool_or("attention_bias", false)?;
    config.clip_qkv = fields.positive_opt("clip_qkv")?;
    config.qk_norm = QkNormKind::FullWidth;
    Ok(config)
}

fn layer(_: &ModelConfig, _: &Shards, decoder: &str, layer: usize) -> LayerNames {
    let mlp = format!("{decoder}layers.{layer}.mlp");
    let ffn = FfnNames::experts(&mlp, ["gate_proj", "up_proj", "down_proj"]);
    LayerNames::llama(decoder, layer, ffn)
}
