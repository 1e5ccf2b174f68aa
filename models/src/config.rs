//! What `config.json` says about a model, checked.

use std::path::Path;

use moetrail_kernels::{AttentionShape, WeightDtype};

use crate::dtype::from_torch_name;
use crate::error::Result;
use crate::fields::Fields;
use crate::registry::{Family, family_of};
use crate::rope::RopeConfig;

/// Ids are 16 bits wide at most in every format of the rows.
const MAX_EXPERTS: usize = 1 << 16;
pub(crate) const MAX_LAYERS: usize = 1 << 12;
const MAX_WIDTH: usize = 1 << 24;
const MAX_VOCAB: usize = 1 << 28;
const MAX_POSITIONS: usize = 1 << 30;

/// Where the projections of query and key are normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNormKind {
    /// Nowhere.
    None,
    /// Each head by itself, one weight of `head_dim` for all heads (Qwen 3).
    PerHead,
    /// Over the full width of the projection (OLMoE).
    FullWidth,
}

/// The architecture of a checkpoint.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    /// The class that transformers would load, such as `Qwen3MoeForCausalLM`.
    pub architecture: String,
    /// Transformers' name of the family, such as `qwen3_moe`.
    pub model_type: String,
    /// Rows of the embedding table and of the head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Width of a dense layer's feed-forward network.
    pub intermediate_size: usize,
    /// Width of one expert.
    pub moe_intermediate_size: usize,
    /// Routed experts a layer; 0 for a fully dense checkpoint.
    pub num_experts: usize,
    /// Experts that each token takes.
    pub num_experts_per_tok: usize,
    /// Whether the weights of the chosen experts are scaled to sum to one.
    pub norm_topk_prob: bool,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Positions of the training, as the file says; see [`ModelConfig::max_model_len`].
    pub max_position_embeddings: usize,
    /// Whether the head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Decoder indices of the layers that have experts, ascending.
    pub moe_layers: Vec<usize>,
    /// A key at distance `sliding_window` or more is not seen.
    pub sliding_window: Option<usize>,
    /// Whether the attention projections have biases.
    pub attention_bias: bool,
    /// Bound on the absolute value of query, key and value (OLMoE).
    pub clip_qkv: Option<f64>,
    /// Where query and key are normalised.
    pub qk_norm: QkNormKind,
    /// The checkpoint's dtype where the file names one.
    pub dtype: Option<WeightDtype>,
    /// Token ids that end a text, as `config.json` says.
    pub eos_token_ids: Vec<u32>,
    /// Token id that begins a text.
    pub bos_token_id: Option<u32>,
}

impl ModelConfig {
    /// Reads and checks the text of a `config.json`; `path` is for messages only.
    pub fn from_json(path: &Path, text: &str) -> Result<Self> {
        Ok(Self::from_fields(&Fields::parse(path, text)?)?.0)
    }

    pub(crate) fn from_fields(fields: &Fields) -> Result<(Self, &'static Family)> {
        let family = family_of(fields)?;
        if fields.get("quantization_config").is_some() {
            return Err(fields.wrong("quantization_config", "nothing (quantised checkpoints are not supported)"));
        }
        let config = (family.config)(fields)?;
        config.check(fields)?;
        Ok((config, family))
    }

    /// The longest sequence that the rotary embedding serves.
    pub fn max_model_len(&self) -> usize {
        self.rope.reach(self.max_position_embeddings)
    }

    /// How a layer attends.
    pub(crate) fn attention_shape(&self) -> AttentionShape {
        AttentionShape {
            heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            scale: (self.head_dim as f64).powf(-0.5) as f32,
            window: self.sliding_window,
            clip_qkv: self.clip_qkv.map(|bound| bound as f32),
        }
    }

    /// Where another checkpoint's architecture differs, so that its weights cannot take the place of this one's.
    ///
    /// The stored dtype, the ids that end a text and whether head and embedding are stored once do not matter.
    pub fn difference(&self, other: &Self) -> Option<String> {
        macro_rules! first_of {
            ($($field:ident),*) => {
                $(if self.$field != other.$field {
                    return Some(format!("{} is {:?} there and {:?} here", stringify!($field), other.$field, self.$field));
                })*
            };
        }
        first_of!(
            architecture,
            vocab_size,
            hidden_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            intermediate_size,
            moe_intermediate_size,
            num_experts,
            num_experts_per_tok,
            norm_topk_prob,
            rms_norm_eps,
            rope,
            moe_layers,
            sliding_window,
            attention_bias,
            clip_qkv,
            qk_norm
        );
        None
    }

    /// Width of the query projection.
    pub fn q_width(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of the key projection, and of the value projection.
    pub fn kv_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Whether a decoder layer has experts.
    pub fn is_moe_layer(&self, layer: usize) -> bool {
        self.moe_layers.binary_search(&layer).is_ok()
    }

    /// The keys that all families share; the caller fills in the rest.
    pub(crate) fn common(fields: &Fields, family: &Family, defaults: Defaults) -> Result<Self> {
        match fields.text_opt("hidden_act")? {
            None | Some("silu" | "swish") => {}
            Some(_) => return Err(fields.wrong("hidden_act", "\"silu\"")),
        }
        let vocab_size = fields.size("vocab_size", MAX_VOCAB)?;
        let hidden_size = fields.size("hidden_size", MAX_WIDTH)?;
        let num_hidden_layers = fields.size("num_hidden_layers", MAX_LAYERS)?;
        let heads = fields.size("num_attention_heads", MAX_WIDTH)?;
        let kv_heads = fields.size_opt("num_key_value_heads", heads)?.unwrap_or(heads);
        let head_dim = match fields.size_opt("head_dim", MAX_WIDTH)? {
            Some(dim) => dim,
            None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => {
                let expected = format!("a divisor of hidden_size ({hidden_size}) where head_dim is absent");
                return Err(fields.wrong("num_attention_heads", expected));
            }
        };
        let max_position_embeddings =
            fields.size_opt("max_position_embeddings", MAX_POSITIONS)?.unwrap_or(defaults.max_position_embeddings);
        let dtype_key = if fields.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
        let dtype = match fields.text_opt(dtype_key)? {
            None | Some("auto") => None,
            Some(name) => {
                let dtype = from_torch_name(name);
                Some(dtype.ok_or_else(|| fields.wrong(dtype_key, "float32, bfloat16 or float16"))?)
            }
        };
        let num_experts = fields.count_of(&["num_experts", "num_local_experts", "n_routed_experts"], MAX_EXPERTS)?;
        Ok(Self {
            architecture: family.architecture.to_owned(),
            model_type: family.model_type.to_owned(),
            vocab_size,
            hidden_size,
            num_hidden_layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            intermediate_size: fields.size("intermediate_size", MAX_WIDTH)?,
            moe_intermediate_size: fields.size_opt("moe_intermediate_size", MAX_WIDTH)?.unwrap_or(0),
            num_experts,
            num_experts_per_tok: fields.count_of(&["num_experts_per_tok"], MAX_EXPERTS)?,
            norm_topk_prob: false,
            rms_norm_eps: fields.positive_opt("rms_norm_eps")?.unwrap_or(defaults.rms_norm_eps),
            rope: RopeConfig::read(fields, defaults.rope_theta, max_position_embeddings)?,
            max_position_embeddings,
            tie_word_embeddings: fields.bool_or("tie_word_embeddings", false)?,
            moe_layers: (0..num_hidden_layers).collect(),
            sliding_window: None,
            attention_bias: false,
            clip_qkv: None,
            qk_norm: QkNormKind::None,
            dtype,
            eos_token_ids: fields.ids("eos_token_id", 1 << 32)?,
            bos_token_id: fields.ids("bos_token_id", 1 << 32)?.first().copied(),
        })
    }

    fn check(&self, fields: &Fields) -> Result<()> {
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if !heads.is_multiple_of(kv_heads) {
            let expected = format!("a divisor of num_attention_heads ({heads})");
            return Err(fields.wrong("num_key_value_heads", expected));
        }
        if !self.head_dim.is_multiple_of(2) {
            let expected = format!("an even number (it is {})", self.head_dim);
            return Err(fields.wrong("head_dim", expected));
        }
        // The widths are bounded by the shapes of the tensors as well; this keeps the products far from overflow.
        if self.q_width() > MAX_WIDTH {
            let expected = format!("at most {MAX_WIDTH} / num_attention_heads ({heads})");
            return Err(fields.wrong("head_dim", expected));
        }
        if self.moe_layers.is_empty() {
            return Ok(());
        }
        if self.num_experts_per_tok == 0 || self.num_experts_per_tok > self.num_experts {
            let expected = format!("an integer in 1..={} (the number of experts)", self.num_experts);
            return Err(fields.wrong("num_experts_per_tok", expected));
        }
        if self.moe_intermediate_size == 0 {
            return Err(fields.wrong("moe_intermediate_size", format!("an integer in 1..={MAX_WIDTH}")));
        }
        Ok(())
    }
}

/// Values for keys that a family's published files may leave out.
pub(crate) struct Defaults {
    pub(crate) max_position_embeddings: usize,
    pub(crate) rms_norm_eps: f64,
    pub(crate) rope_theta: f64,
}
