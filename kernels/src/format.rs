use std::fmt;

use crate::packed::{CHUNK, PANEL};
use crate::weights::WeightDtype;

/// How packed weights are stored.
///
/// Activations beside bf16 weights are rounded to bf16, those beside quantised ones to whole numbers of -127 to 127 under
/// one scale for every 32 inputs (as ggml does), in every form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// Floats.
    Float(WeightDtype),
    /// Codes of -127 to 127 and one f32 scale an output: `weight = code * scale`.
    Int8,
    /// ggml's `Q8_0`: codes of -128 to 127, and one f16 scale for every 32 inputs of an output.
    Q8_0,
    /// ggml's `Q4_K`: codes of 0 to 15; a scale and a minimum for every 32 inputs of an output:
    /// `weight = code * scale - minimum`. Both are products of f16 and six bits in ggml, and rounded to f16 here.
    Q4K,
}

impl From<WeightDtype> for WeightFormat {
    fn from(dtype: WeightDtype) -> WeightFormat {
        WeightFormat::Float(dtype)
    }
}

impl WeightFormat {
    /// Bytes of a panel before its first chunk.
    pub(crate) const fn head_bytes(self) -> usize {
        match self {
            WeightFormat::Int8 => 4 * PANEL,
            _ => 0,
        }
    }

    /// Bytes of a chunk before its codes.
    pub(crate) const fn scale_bytes(self) -> usize {
        match self {
            WeightFormat::Float(_) | WeightFormat::Int8 => 0,
            WeightFormat::Q8_0 => 2 * PANEL,
            WeightFormat::Q4K => 2 * 2 * PANEL,
        }
    }

    /// Bytes of a chunk: 32 inputs of 64 outputs.
    pub(crate) const fn chunk_bytes(self) -> usize {
        let weights = CHUNK * PANEL;
        self.scale_bytes()
            + match self {
                WeightFormat::Float(dtype) => weights * dtype.bytes(),
                WeightFormat::Int8 | WeightFormat::Q8_0 => weights,
                WeightFormat::Q4K => weights / 2,
            }
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WeightFormat::Float(dtype) => dtype.fmt(out),
            WeightFormat::Int8 => out.write_str("int8"),
            WeightFormat::Q8_0 => out.write_str("q8_0"),
            WeightFormat::Q4K => out.write_str("q4_k"),
        }
    }
}
