//! Metadata as the `config.json` that llama.cpp's converter read (`convert_hf_to_gguf.py`).

use std::path::Path;

use candle_core::quantized::gguf_file::{Content, Value as GgufValue};
use serde_json::{Map, Value, json};

use super::refused;
use crate::error::Result;
use crate::fields::Fields;
use crate::shards::Shards;

/// The metadata of one file, by key without the architecture's name before it.
pub(super) struct Metadata<'a> {
    path: &'a Path,
    content: &'a Content,
    architecture: String,
}

impl<'a> Metadata<'a> {
    pub(super) fn new(path: &'a Path, content: &'a Content) -> Result<Self> {
        let architecture = content.metadata.get("general.architecture").and_then(|value| value.to_string().ok());
        let architecture = architecture.ok_or_else(|| refused(path, "metadata lack general.architecture"))?.clone();
        Ok(Self { path, content, architecture })
    }

    pub(super) fn architecture(&self) -> &str {
        &self.architecture
    }

    pub(super) fn size(&self, key: &str) -> Result<usize> {
        let size = self.size_opt(key)?;
        size.ok_or_else(|| refused(self.path, format!("metadata lack {}.{key}", self.architecture)))
    }

    pub(super) fn size_opt(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        size.map(Some).ok_or_else(|| refused(self.path, format!("{}.{key} is {value}", self.architecture)))
    }

    fn get(&self, key: &str) -> Option<Value> {
        json_of(self.content.metadata.get(&format!("{}.{key}", self.architecture))?)
    }

    fn general(&self, key: &str) -> Option<Value> {
        json_of(self.content.metadata.get(key)?)
    }
}

/// A value that is no array; what is not a finite number is no value.
fn json_of(value: &GgufValue) -> Option<Value> {
    Some(match value {
        GgufValue::U8(n) => json!(n),
        GgufValue::I8(n) => json!(n),
        GgufValue::U16(n) => json!(n),
        GgufValue::I16(n) => json!(n),
        GgufValue::U32(n) => json!(n),
        GgufValue::I32(n) => json!(n),
        GgufValue::U64(n) => json!(n),
        GgufValue::I64(n) => json!(n),
        // By its shortest decimal: 1e-6 as f32 is not to become 9.99999997e-7.
        GgufValue::F32(n) => n.to_string().parse::<f64>().ok().filter(|n| n.is_finite()).map(|n| json!(n))?,
        GgufValue::F64(n) => json!(n),
        GgufValue::Bool(truth) => json!(truth),
        GgufValue::String(text) => json!(text),
        GgufValue::Array(_) => return None,
    })
}

/// What the family's reader calls the value of a key.
const COMMON: [(&str, &str); 9] = [
    ("block_count", "num_hidden_layers"),
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.key_length", "head_dim"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ("rope.freq_base", "rope_theta"),
];

const EXPERTS: [(&str, &str); 5] = [
    ("expert_count", "num_experts"),
    ("expert_used_count", "num_experts_per_tok"),
    ("expert_feed_forward_length", "moe_intermediate_size"),
    ("attention.clamp_kqv", "clip_qkv"),
    ("attention.sliding_window", "sliding_window"),
];

/// The metadata as a configuration of transformers.
pub(super) fn read(path: &Path, content: &Content, shards: &Shards) -> Result<Fields> {
    let metadata = Metadata::new(path, content)?;
    let mut config = Map::new();
    for (gguf, key) in COMMON.into_iter().chain(EXPERTS) {
        config.extend(metadata.get(gguf).map(|value| (key.to_owned(), value)));
    }
    let (architecture, normalised) = match metadata.architecture() {
        // llama.cpp's graphs fix what a checkpoint would say (`llm_build_qwen3moe`, `llm_build_olmoe`).
        "qwen3moe" => ("Qwen3MoeForCausalLM", true),
        "olmoe" => ("OlmoeForCausalLM", false),
        "llama" => ("MixtralForCausalLM", true),
        other => (other, false),
    };
    config.insert("architectures".into(), json!([architecture]));
    config.insert("norm_topk_prob".into(), metadata.get("expert_weights_norm").unwrap_or(json!(normalised)));
    config.insert("attention_bias".into(), json!(shards.contains("model.layers.0.self_attn.q_proj.bias")));
    config.insert("tie_word_embeddings".into(), json!(!shards.contains("lm_head.weight")));
    // Some files have no vocab_size: the embedding has as many rows.
    let rows = shards.get("model.embed_tokens.weight").and_then(|tensor| tensor.shape().first().copied());
    config.extend(rows.map(|rows| ("vocab_size".to_owned(), json!(rows))));
    // A dense model of the same architecture has no experts: Mixtral's reader would miss them by name only.
    if metadata.get("expert_count").is_none() {
        return Err(refused(
            path,
            format!("a model of architecture {architecture:?} without experts is not supported"),
        ));
    }
    for (gguf, key) in
        [("tokenizer.ggml.eos_token_id", "eos_token_id"), ("tokenizer.ggml.bos_token_id", "bos_token_id")]
    {
        config.extend(metadata.general(gguf).map(|value| (key.to_owned(), value)));
    }
    config.extend(scaling(&metadata).map(|scaling| ("rope_scaling".to_owned(), scaling)));
    Fields::parse(path, &Value::Object(config).to_string())
}

/// The rotary scaling, in transformers' words.
fn scaling(metadata: &Metadata<'_>) -> Option<Value> {
    let kind = metadata.get("rope.scaling.type")?;
    if kind == "none" {
        return None;
    }
    let mut scaling = Map::from_iter([("rope_type".to_owned(), kind)]);
    for (gguf, key) in [
        ("factor", "factor"),
        ("original_context_length", "original_max_position_embeddings"),
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
    ] {
        scaling.extend(metadata.get(&format!("rope.scaling.{gguf}")).map(|value| (key.to_owned(), value)));
    }
    Some(Value::Object(scaling))
}
