//! The number formats that weights come in, and the choice between them.

use std::str::FromStr;

use moetrail_kernels::WeightDtype;
use safetensors::Dtype;

/// What the weights are packed as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DtypeChoice {
    /// The checkpoint's own dtype: `dtype` or `torch_dtype` of `config.json`, else that of its tensors.
    #[default]
    Auto,
    /// 32-bit floats.
    Float32,
    /// Brain floats: 16 bits, the range of a 32-bit float.
    BFloat16,
    /// 16-bit IEEE floats.
    Float16,
}

impl FromStr for DtypeChoice {
    type Err = String;

    /// Reads vLLM's spellings of `--dtype`.
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "float32" | "float" => Ok(Self::Float32),
            "bfloat16" => Ok(Self::BFloat16),
            "float16" | "half" => Ok(Self::Float16),
            other => Err(format!("expected auto, float32 (float), bfloat16 or float16 (half), found {other:?}")),
        }
    }
}

impl From<WeightDtype> for DtypeChoice {
    fn from(dtype: WeightDtype) -> Self {
        match dtype {
            WeightDtype::F32 => Self::Float32,
            WeightDtype::BF16 => Self::BFloat16,
            WeightDtype::F16 => Self::Float16,
        }
    }
}

impl DtypeChoice {
    /// The dtype chosen, given the checkpoint's own.
    pub fn resolve(self, own: WeightDtype) -> WeightDtype {
        match self {
            Self::Auto => own,
            Self::Float32 => WeightDtype::F32,
            Self::BFloat16 => WeightDtype::BF16,
            Self::Float16 => WeightDtype::F16,
        }
    }
}

/// Reads torch's name of a dtype, with or without `torch.` before it.
pub(crate) fn from_torch_name(name: &str) -> Option<WeightDtype> {
    match name.strip_prefix("torch.").unwrap_or(name) {
        "float32" | "float" => Some(WeightDtype::F32),
        "bfloat16" => Some(WeightDtype::BF16),
        "float16" | "half" => Some(WeightDtype::F16),
        _ => None,
    }
}

/// The packable dtype of a stored tensor.
pub(crate) fn from_safetensors(dtype: Dtype) -> Option<WeightDtype> {
    match dtype {
        Dtype::F32 => Some(WeightDtype::F32),
        Dtype::BF16 => Some(WeightDtype::BF16),
        Dtype::F16 => Some(WeightDtype::F16),
        _ => None,
    }
}
