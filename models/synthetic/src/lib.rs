//! Small seeded checkpoints for tests, written in every layout that loads.

use std::collections::BTreeMap;
use std::path::Path;

use half::{bf16, f16};
use moetrail_kernels::WeightDtype;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::{Map, Value, json};

/// Tensors by name: shape and values.
pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// How the experts are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// One matrix for each projection of each expert, as published.
    EachExpert,
    /// Stacked, `[experts, out, in]`, as transformers 5 holds them.
    Fused,
    /// Stacked, `[experts, in, out]`.
    FusedTurned,
}

/// A random model of a family; values are representable in bfloat16, so that every dtype of one seed is one model.
#[derive(Debug, Clone)]
pub struct Synthetic {
    model_type: &'static str,
    config: Map<String, Value>,
    seed: u64,
}

impl Synthetic {
    /// A model of 3 layers, 6 experts of which 2 are taken, and 96 tokens.
    ///
    /// # Panics
    /// When the model type is none of `qwen3_moe`, `olmoe` and `mixtral`.
    pub fn new(model_type: &'static str) -> Self {
        let own = match model_type {
            "qwen3_moe" => json!({
                "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 16, "num_experts": 6, "moe_intermediate_size": 24,
                "intermediate_size": 40, "norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": [],
            }),
            "olmoe" => json!({
                "architectures": ["OlmoeForCausalLM"], "num_experts": 6, "intermediate_size": 24, "norm_topk_prob": false,
            }),
            "mixtral" => json!({
                "architectures": ["MixtralForCausalLM"], "num_local_experts": 6, "intermediate_size": 24,
            }),
            other => panic!("no synthetic {other}"),
        };
        let common = json!({
            "model_type": model_type, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 128, "num_experts_per_tok": 2,
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": false,
            "eos_token_id": 2, "bos_token_id": 0, "torch_dtype": "float32",
        });
        let mut synthetic = Self { model_type, config: Map::new(), seed: 0 };
        for object in [common, own] {
            synthetic.config.extend(object.as_object().cloned().unwrap_or_default());
        }
        synthetic
    }

    /// Sets a key of `config.json`; `null` takes it away.
    pub fn set(mut self, key: &str, value: Value) -> Self {
        match value {
            Value::Null => self.config.remove(key),
            value => self.config.insert(key.to_owned(), value),
        };
        self
    }

    /// Draws other weights.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// The text of `config.json`.
    pub fn config_json(&self) -> String {
        Value::Object(self.config.clone()).to_string()
    }

    /// All tensors, under the names of the layout.
    pub fn tensors(&self, layout: Layout) -> Tensors {
        let mut tensors = Tensors::new();
        let (hidden, vocab) = (self.size("hidden_size"), self.size("vocab_size"));
        self.add(&mut tensors, "model.embed_tokens.weight", &[vocab, hidden], Scale::Plain(1.0));
        for layer in 0..self.size("num_hidden_layers") {
            self.add_layer(&mut tensors, layer, layout);
        }
        self.add(&mut tensors, "model.norm.weight", &[hidden], Scale::Norm);
        if self.config.get("tie_word_embeddings") != Some(&json!(true)) {
            self.add(&mut tensors, "lm_head.weight", &[vocab, hidden], Scale::Matrix);
        }
        tensors
    }

    /// Writes the configuration and the tensors of the layout in one f32 file.
    pub fn write(&self, folder: &Path, layout: Layout) {
        self.write_config(folder);
        write_single(folder, &self.tensors(layout), WeightDtype::F32);
    }

    /// Writes `config.json`.
    pub fn write_config(&self, folder: &Path) {
        std::fs::write(folder.join("config.json"), self.config_json()).expect("the test folder is writable");
    }

    fn size(&self, key: &str) -> usize {
        self.config.get(key).and_then(Value::as_u64).unwrap_or(0) as usize
    }

    fn add_layer(&self, tensors: &mut Tensors, layer: usize, layout: Layout) {
        let at = |name: &str| format!("model.layers.{layer}.{name}");
        let (hidden, heads, kv_heads) =
            (self.size("hidden_size"), self.size("num_attention_heads"), self.size("num_key_value_heads"));
        let head_dim = match self.size("head_dim") {
            0 => hidden / heads,
            dim => dim,
        };
        let widths = [("q", heads * head_dim), ("k", kv_heads * head_dim), ("v", kv_heads * head_dim)];
        for (x, width) in widths {
            self.add(tensors, &at(&format!("self_attn.{x}_proj.weight")), &[width, hidden], Scale::Matrix);
        }
        self.add(tensors, &at("self_attn.o_proj.weight"), &[hidden, heads * head_dim], Scale::Matrix);
        if self.config.get("attention_bias") == Some(&json!(true)) {
            for (x, width) in widths.into_iter().chain([("o", hidden)]) {
                self.add(tensors, &at(&format!("self_attn.{x}_proj.bias")), &[width], Scale::Plain(0.1));
            }
        }
        let norms = match self.model_type {
            "qwen3_moe" => Some([head_dim, head_dim]),
            "olmoe" => Some([heads * head_dim, kv_heads * head_dim]),
            _ => None,
        };
        if let Some([q, k]) = norms {
            self.add(tensors, &at("self_attn.q_norm.weight"), &[q], Scale::Norm);
            self.add(tensors, &at("self_attn.k_norm.weight"), &[k], Scale::Norm);
        }
        for norm in ["input_layernorm.weight", "post_attention_layernorm.weight"] {
            self.add(tensors, &at(norm), &[hidden], Scale::Norm);
        }
        let dense = self.config.get("mlp_only_layers").and_then(Value::as_array);
        if dense.is_some_and(|layers| layers.contains(&json!(layer))) || self.size("num_experts_per_tok") == 0 {
            let width = self.size("intermediate_size");
            self.add_gated(tensors, ["gate", "up", "down"].map(|x| at(&format!("mlp.{x}_proj.weight"))), width);
            return;
        }
        self.add_experts(tensors, layer, layout);
    }

    fn add_gated(&self, tensors: &mut Tensors, [gate, up, down]: [String; 3], width: usize) {
        let hidden = self.size("hidden_size");
        self.add(tensors, &gate, &[width, hidden], Scale::Matrix);
        self.add(tensors, &up, &[width, hidden], Scale::Matrix);
        self.add(tensors, &down, &[hidden, width], Scale::Matrix);
    }

    fn add_experts(&self, tensors: &mut Tensors, layer: usize, layout: Layout) {
        let hidden = self.size("hidden_size");
        let count = self.size("num_experts").max(self.size("num_local_experts"));
        let width = match self.size("moe_intermediate_size") {
            0 => self.size("intermediate_size"),
            width => width,
        };
        let old_mixtral = self.model_type == "mixtral" && layout == Layout::EachExpert;
        let block = format!("model.layers.{layer}.{}", if old_mixtral { "block_sparse_moe" } else { "mlp" });
        let parts = if old_mixtral { ["w1", "w3", "w2"] } else { ["gate_proj", "up_proj", "down_proj"] };
        // The values hang on names that are the same in every layout.
        let router = draw(self.seed, &format!("{layer}.router"), count * hidden, 2.0 / (hidden as f32).sqrt());
        tensors.insert(format!("{block}.gate.weight"), (vec![count, hidden], router));
        let matrix = |expert: usize, part: &str, rows: usize, cols: usize| {
            let scale = 1.0 / (cols as f32).sqrt();
            draw(self.seed, &format!("{layer}.{expert}.{part}"), rows * cols, scale)
        };
        let expert = |e: usize| {
            [matrix(e, "gate", width, hidden), matrix(e, "up", width, hidden), matrix(e, "down", hidden, width)]
        };
        if layout == Layout::EachExpert {
            for e in 0..count {
                let shapes = [[width, hidden], [width, hidden], [hidden, width]];
                for ((part, shape), values) in parts.iter().zip(shapes).zip(expert(e)) {
                    tensors.insert(format!("{block}.experts.{e}.{part}.weight"), (shape.to_vec(), values));
                }
            }
            return;
        }
        let (mut gate_up, mut down) = (Vec::new(), Vec::new());
        for e in 0..count {
            let [gate, up, d] = expert(e);
            let both = [gate, up].concat();
            let turned = layout == Layout::FusedTurned;
            gate_up.extend(if turned { transposed(&both, 2 * width, hidden) } else { both });
            down.extend(if turned { transposed(&d, hidden, width) } else { d });
        }
        let [gate_up_shape, down_shape] = match layout {
            Layout::FusedTurned => [vec![count, hidden, 2 * width], vec![count, width, hidden]],
            _ => [vec![count, 2 * width, hidden], vec![count, hidden, width]],
        };
        tensors.insert(format!("{block}.experts.gate_up_proj"), (gate_up_shape, gate_up));
        tensors.insert(format!("{block}.experts.down_proj"), (down_shape, down));
    }

    fn add(&self, tensors: &mut Tensors, name: &str, shape: &[usize], scale: Scale) {
        let len = shape.iter().product();
        let values = match scale {
            Scale::Plain(scale) => draw(self.seed, name, len, scale),
            Scale::Matrix => draw(self.seed, name, len, 1.0 / (shape[shape.len() - 1] as f32).sqrt()),
            Scale::Norm => {
                let near_one = |x: f32| bf16::from_f32(1.0 + x).to_f32();
                draw(self.seed, name, len, 0.1).into_iter().map(near_one).collect()
            }
        };
        tensors.insert(name.to_owned(), (shape.to_vec(), values));
    }
}

enum Scale {
    Plain(f32),
    Matrix,
    Norm,
}

/// Writes `model.safetensors`.
pub fn write_single(folder: &Path, tensors: &Tensors, dtype: WeightDtype) {
    write_file(&folder.join("model.safetensors"), tensors.iter(), dtype);
}

/// Writes `count` shards and their index; tensors are dealt out in turn.
pub fn write_shards(folder: &Path, tensors: &Tensors, dtype: WeightDtype, count: usize) {
    let file = |shard: usize| format!("model-{:05}-of-{count:05}.safetensors", shard + 1);
    let mut placed = Map::new();
    for shard in 0..count {
        let part = || tensors.iter().skip(shard).step_by(count);
        write_file(&folder.join(file(shard)), part(), dtype);
        placed.extend(part().map(|(name, _)| (name.clone(), json!(file(shard)))));
    }
    let index = json!({ "metadata": {}, "weight_map": placed });
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string())
        .expect("the test folder is writable");
}

fn write_file<'a>(
    path: &Path,
    tensors: impl Iterator<Item = (&'a String, &'a (Vec<usize>, Vec<f32>))>,
    dtype: WeightDtype,
) {
    let encode = |x: &f32| match dtype {
        WeightDtype::F32 => x.to_le_bytes().to_vec(),
        WeightDtype::BF16 => bf16::from_f32(*x).to_le_bytes().to_vec(),
        WeightDtype::F16 => f16::from_f32(*x).to_le_bytes().to_vec(),
    };
    let stored = match dtype {
        WeightDtype::F32 => Dtype::F32,
        WeightDtype::BF16 => Dtype::BF16,
        WeightDtype::F16 => Dtype::F16,
    };
    let encoded: Vec<(&String, &Vec<usize>, Vec<u8>)> =
        tensors.map(|(name, (shape, values))| (name, shape, values.iter().flat_map(encode).collect())).collect();
    let views = encoded.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(stored, (*shape).clone(), bytes).expect("the values fill the shape");
        (name.as_str(), view)
    });
    serialize_to_file(views, None, path).expect("the test folder is writable");
}

fn transposed(matrix: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..rows * cols).map(|i| matrix[(i % rows) * cols + i / rows]).collect()
}

/// Values of about normal distribution, rounded to bfloat16, that hang on seed and name alone.
fn draw(seed: u64, name: &str, len: usize, scale: f32) -> Vec<f32> {
    let hash = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let mut state = name.bytes().fold(0xcbf2_9ce4_8422_2325 ^ seed, hash);
    let mut uniform = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    // The sum of four uniforms has variance 1/3.
    let mut normal = || (uniform() + uniform() + uniform() + uniform()) * 3f32.sqrt();
    (0..len).map(|_| bf16::from_f32(normal() * scale).to_f32()).collect()
}
