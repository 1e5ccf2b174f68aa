//! The tensor names of one decoder layer.

/// Names of one layer's tensors; shapes follow from the configuration.
#[derive(Debug, Clone)]
pub(crate) struct LayerNames {
    /// Norm before attention, `[hidden]`.
    pub(crate) input_norm: String,
    /// Norm before the feed-forward network, `[hidden]`.
    pub(crate) post_attention_norm: String,
    /// Attention projections without `.weight` or `.bias`: query, key, value, output.
    pub(crate) projections: [String; 4],
    /// Norms of query and key.
    pub(crate) qk_norm: [String; 2],
    /// The feed-forward network.
    pub(crate) ffn: FfnNames,
}

/// Names of a layer's feed-forward network.
#[derive(Debug, Clone)]
pub(crate) enum FfnNames {
    /// One gated network: gate, up, down.
    Dense([String; 3]),
    /// A router and its experts.
    Experts(ExpertNames),
}

/// Names of a router and its experts, in each of the layouts that are published.
#[derive(Debug, Clone)]
pub(crate) struct ExpertNames {
    /// The router's weight, `[experts, hidden]`.
    pub(crate) router: String,
    /// What all experts' names begin with, such as `model.layers.0.mlp.experts`.
    pub(crate) experts: String,
    /// Last parts of one expert's names: gate, up, down.
    pub(crate) parts: [&'static str; 3],
}

impl LayerNames {
    /// The names that all decoders of the Llama line share; `ffn` is the family's own.
    pub(crate) fn llama(decoder: &str, layer: usize, ffn: FfnNames) -> Self {
        let at = |name: &str| format!("{decoder}layers.{layer}.{name}");
        Self {
            input_norm: at("input_layernorm.weight"),
            post_attention_norm: at("post_attention_layernorm.weight"),
            projections: ["q", "k", "v", "o"].map(|x| at(&format!("self_attn.{x}_proj"))),
            qk_norm: ["q", "k"].map(|x| at(&format!("self_attn.{x}_norm.weight"))),
            ffn,
        }
    }
}

impl FfnNames {
    /// A dense network with gate, up and down projections under `mlp`.
    pub(crate) fn dense(mlp: &str) -> Self {
        Self::Dense(["gate", "up", "down"].map(|x| format!("{mlp}.{x}_proj.weight")))
    }

    /// A router named `gate` and experts under `block`.
    pub(crate) fn experts(block: &str, parts: [&'static str; 3]) -> Self {
        Self::Experts(ExpertNames {
            router: format!("{block}.gate.weight"),
            experts: format!("{block}.experts"),
            parts,
        })
    }
}

impl ExpertNames {
    /// One expert's matrices: gate, up, down.
    pub(crate) fn of(&self, expert: usize) -> [String; 3] {
        self.parts.map(|part| format!("{}.{expert}.{part}.weight", self.experts))
    }

    /// The fused layout's tensors: gate and up of all experts, down of all experts.
    pub(crate) fn fused(&self) -> [String; 2] {
        ["gate_up_proj", "down_proj"].map(|part| format!("{}.{part}", self.experts))
    }

    /// The stacked layout's tensors, as in GGUF: gate, up and down of all experts.
    pub(crate) fn stacked(&self) -> [String; 3] {
        ["gate", "up", "down"].map(|part| format!("{}.{part}", self.experts))
    }
}
