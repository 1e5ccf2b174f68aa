//! The number formats that weights come in, and the choice between them.

use std::fmt;
use std::str::FromStr;

use candle_core::quantized::GgmlDType;
use moetrail_kernels::{WeightDtype, WeightFormat};
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

/// What matrices are quantised to while they are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantization {
    /// Whole numbers of eight bits, and one scale an output.
    Int8,
}

impl FromStr for Quantization {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "int8" => Ok(Self::Int8),
            other => Err(format!("expected int8, found {other:?}")),
        }
    }
}

/// How the weights are packed. Routers and norms are never quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WeightChoice {
    /// Dtype of the weights that are not quantised, and of the KV cache.
    pub dtype: DtypeChoice,
    /// What the matrices are quantised to, if they come as floats.
    pub quantization: Option<Quantization>,
}

impl From<DtypeChoice> for WeightChoice {
    fn from(dtype: DtypeChoice) -> Self {
        Self { dtype, quantization: None }
    }
}

impl WeightChoice {
    /// The dtype and the format of matrices, given the checkpoint's own dtype; what is wrong with the choice otherwise.
    pub(crate) fn resolve(self, own: WeightDtype) -> Result<(WeightDtype, WeightFormat), String> {
        match (self.quantization, self.dtype) {
            (None, dtype) => {
                let dtype = dtype.resolve(own);
                Ok((dtype, dtype.into()))
            }
            (Some(Quantization::Int8), DtypeChoice::Auto | DtypeChoice::BFloat16) => {
                Ok((WeightDtype::BF16, WeightFormat::Int8))
            }
            (Some(Quantization::Int8), other) => {
                Err(format!("quantization int8 goes with dtype bfloat16, found {other:?}"))
            }
        }
    }
}

/// What a tensor is in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StoredType {
    /// Floats that are packed as they are.
    Float(WeightDtype),
    /// Blocks of ggml.
    Blocks(GgmlDType),
    /// Something of safetensors that is no weight.
    Other(Dtype),
}

impl fmt::Display for StoredType {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Float(dtype) => dtype.fmt(out),
            Self::Blocks(dtype) => write!(out, "{dtype:?}"),
            Self::Other(dtype) => write!(out, "{dtype:?}"),
        }
    }
}

impl From<Dtype> for StoredType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::Float(WeightDtype::F32),
            Dtype::BF16 => Self::Float(WeightDtype::BF16),
            Dtype::F16 => Self::Float(WeightDtype::F16),
            other => Self::Other(other),
        }
    }
}

impl From<GgmlDType> for StoredType {
    fn from(dtype: GgmlDType) -> Self {
        match dtype {
            GgmlDType::F32 => Self::Float(WeightDtype::F32),
            GgmlDType::BF16 => Self::Float(WeightDtype::BF16),
            GgmlDType::F16 => Self::Float(WeightDtype::F16),
            other => Self::Blocks(other),
        }
    }
}

impl StoredType {
    pub(crate) fn float(self) -> Option<WeightDtype> {
        match self {
            Self::Float(dtype) => Some(dtype),
            Self::Blocks(_) | Self::Other(_) => None,
        }
    }

    /// The format in which the kernels read these blocks as they are.
    pub(crate) fn packed_as_is(self) -> Option<WeightFormat> {
        match self {
            Self::Blocks(GgmlDType::Q8_0) => Some(WeightFormat::Q8_0),
            Self::Blocks(GgmlDType::Q4K) => Some(WeightFormat::Q4K),
            _ => None,
        }
    }
}
