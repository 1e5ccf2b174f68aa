//! Tensor names: from those of llama.cpp (`gguf-py/gguf/constants.py`) to those of the checkpoints they were made from.

use std::path::Path;

use candle_core::quantized::gguf_file::Content;

use super::config::Metadata;
use crate::error::Result;

/// How one file's tensors are called.
pub(super) struct NameMap {
    /// Query and key heads, where the file has the rows of a head in another order.
    interleaved: Option<[usize; 2]>,
}

const TOP: [(&str, &str); 3] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];

/// In a layer; what follows the name (`.weight`, `.bias`) stays.
const LAYER: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate_inp", "mlp.gate"),
];

const EXPERTS: [(&str, &str, &str); 3] =
    [("ffn_gate", "gate", "w1"), ("ffn_up", "up", "w3"), ("ffn_down", "down", "w2")];

impl NameMap {
    pub(super) fn new(path: &Path, content: &Content) -> Result<Self> {
        let metadata = Metadata::new(path, content)?;
        // llama.cpp turns neighbours of a head in this architecture, transformers halves: its converter reorders the rows.
        let interleaved = match metadata.architecture() {
            "llama" => {
                let heads = metadata.size("attention.head_count")?;
                Some([heads, metadata.size_opt("attention.head_count_kv")?.unwrap_or(heads)])
            }
            _ => None,
        };
        Ok(Self { interleaved })
    }

    /// Heads whose rows alternate between the halves of a head.
    pub(super) fn interleaved_heads(&self, name: &str) -> Option<usize> {
        let [heads, kv_heads] = self.interleaved?;
        match name.strip_prefix("blk.")?.split_once('.')?.1 {
            "attn_q.weight" => Some(heads),
            "attn_k.weight" => Some(kv_heads),
            _ => None,
        }
    }

    /// The name in a checkpoint of transformers.
    pub(super) fn checkpoint_name(&self, name: &str) -> String {
        if let Some((_, known)) = TOP.iter().find(|(gguf, _)| *gguf == name) {
            return (*known).to_owned();
        }
        layer_name(name).unwrap_or_else(|| name.to_owned())
    }
}

fn layer_name(name: &str) -> Option<String> {
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (part, kind) = rest.rsplit_once('.')?;
    if let Some((_, known)) = LAYER.iter().find(|(gguf, _)| *gguf == part) {
        return Some(format!("model.layers.{layer}.{known}.{kind}"));
    }
    let experts = format!("model.layers.{layer}.mlp.experts");
    EXPERTS.iter().find_map(|(gguf, stacked, each)| match part.strip_prefix(gguf)? {
        "_exps" => Some(format!("{experts}.{stacked}")),
        // Mixtral's first files have one tensor an expert.
        one => Some(format!("{experts}.{}.{each}.{kind}", one.strip_prefix('.')?)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_checkpoint() {
        let names = NameMap { interleaved: Some([8, 2]) };
        for (gguf, checkpoint) in [
            ("output.weight", "lm_head.weight"),
            ("blk.3.attn_q.bias", "model.layers.3.self_attn.q_proj.bias"),
            ("blk.12.attn_q_norm.weight", "model.layers.12.self_attn.q_norm.weight"),
            ("blk.0.ffn_gate_inp.weight", "model.layers.0.mlp.gate.weight"),
            ("blk.0.ffn_down_exps.weight", "model.layers.0.mlp.experts.down"),
            ("blk.1.ffn_up.7.weight", "model.layers.1.mlp.experts.7.w3.weight"),
            ("rope_freqs.weight", "rope_freqs.weight"),
        ] {
            assert_eq!(names.checkpoint_name(gguf), checkpoint);
        }
        let heads = ["blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"];
        assert_eq!(heads.map(|name| names.interleaved_heads(name)), [Some(8), Some(2), None]);
    }
}
