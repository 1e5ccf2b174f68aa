//! The golden files that `tests/golden/make_golden.py` writes with transformers.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use crate::support::golden_folder;

/// The golden checkpoints: three families, two shapes each.
pub const MODELS: [&str; 6] = ["qwen3_moe-a", "qwen3_moe-b", "olmoe-a", "olmoe-b", "mixtral-a", "mixtral-b"];

/// What transformers computed for one prompt.
pub struct Case {
    pub prompt: Vec<u32>,
    pub output: Vec<u32>,
    /// `[C]`, f32.
    pub logprobs: Vec<f32>,
    /// `[P - 1]`, f32.
    pub prompt_logprobs: Vec<f32>,
    /// `[C][5]`.
    pub top_logprobs: Vec<f32>,
    /// `[R, L, K]`.
    pub routed_experts: Vec<u8>,
    /// `[R, L]`: the smallest relative gap among the first K + 1 router logits.
    pub gaps: Vec<f32>,
}

/// The golden file of one checkpoint.
pub struct Golden {
    pub num_layers: usize,
    pub top_k: usize,
    pub moe_layers: Vec<usize>,
    pub cases: Vec<Case>,
}

impl Golden {
    pub fn read(model: &str) -> Self {
        let text = std::fs::read_to_string(golden_folder(model).join("golden.json")).expect("the golden file exists");
        let json: Value = serde_json::from_str(&text).expect("the golden file is JSON");
        let number = |key: &str| json[key].as_u64().expect("a count") as usize;
        Self {
            num_layers: number("num_layers"),
            top_k: number("top_k"),
            moe_layers: ids(&json["moe_layers"]).into_iter().map(|layer| layer as usize).collect(),
            cases: json["cases"].as_array().expect("cases").iter().map(Case::read).collect(),
        }
    }
}

impl Case {
    fn read(json: &Value) -> Self {
        Self {
            prompt: ids(&json["prompt_ids"]),
            output: ids(&json["output_ids"]),
            logprobs: floats(&json["logprobs"]),
            prompt_logprobs: floats(&json["prompt_logprobs"]),
            top_logprobs: floats(&json["top_logprobs"]),
            routed_experts: bytes(&json["routed_experts"]),
            gaps: floats(&json["gaps"]),
        }
    }
}

fn ids(json: &Value) -> Vec<u32> {
    json.as_array().expect("a list of ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

fn bytes(json: &Value) -> Vec<u8> {
    STANDARD.decode(json["data"].as_str().expect("base64 data")).expect("valid base64")
}

fn floats(json: &Value) -> Vec<f32> {
    bytes(json).chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}
