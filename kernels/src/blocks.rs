//! Rows of ggml's quantised blocks, as they lie in a GGUF file (`ggml-common.h`, `ggml-quants.c` of ggml).

use half::f16;

use crate::error::KernelError;
use crate::format::WeightFormat;
use crate::packed::CHUNK;

/// Quantised rows `[rows, cols]`, row after row, inside somebody else's bytes.
#[derive(Clone, Copy, Debug)]
pub struct BlockRows<'a> {
    bytes: &'a [u8],
    format: WeightFormat,
    rows: usize,
    cols: usize,
}

/// Thirty-two inputs of one output.
pub(crate) struct Block {
    pub(crate) scale: f16,
    pub(crate) minimum: f16,
    /// As wide as the widest: Q8_0's codes are signed.
    pub(crate) codes: [i8; CHUNK],
}

impl<'a> BlockRows<'a> {
    /// Rows of [`WeightFormat::Q8_0`] or [`WeightFormat::Q4K`]. Fails where the width is no whole number of ggml's blocks
    /// (of 32 and 256 weights) or the bytes do not fit the shape.
    pub fn new(bytes: &'a [u8], format: WeightFormat, rows: usize, cols: usize) -> Result<BlockRows<'a>, KernelError> {
        let (weights, size) = ggml_block(format);
        let needed = rows.checked_mul(cols / weights).and_then(|blocks| blocks.checked_mul(size));
        if size == 0 || !cols.is_multiple_of(weights) || needed != Some(bytes.len()) {
            return Err(KernelError::Blocks { format, rows, cols, got: bytes.len() });
        }
        Ok(BlockRows { bytes, format, rows, cols })
    }

    /// How the weights are stored.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// Rows, the output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns, the input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Chunk `chunk` of a row.
    pub(crate) fn block(&self, row: usize, chunk: usize) -> Block {
        let (weights, size) = ggml_block(self.format);
        let within = weights / CHUNK;
        let block = &self.bytes[(row * (self.cols / weights) + chunk / within) * size..][..size];
        match self.format {
            WeightFormat::Q4K => q4_k(block, chunk % within),
            _ => {
                Block { scale: half(block, 0), minimum: f16::ZERO, codes: std::array::from_fn(|i| block[2 + i] as i8) }
            }
        }
    }
}

/// Weights and bytes of a block in the file.
fn ggml_block(format: WeightFormat) -> (usize, usize) {
    match format {
        WeightFormat::Q8_0 => (32, 34),
        WeightFormat::Q4K => (256, 144),
        WeightFormat::Float(_) | WeightFormat::Int8 => (1, 0),
    }
}

fn half(bytes: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Sub-block `index` of eight: f16 scale and minimum of all, twelve bytes of six-bit factors, then 128 bytes of codes.
fn q4_k(block: &[u8], index: usize) -> Block {
    let (factors, codes) = block[4..].split_at(12);
    // The first four pairs lie in six bits of a byte each; the others share their low bits in four bytes, and take their
    // high ones from what the first left over.
    let (scale, minimum) = match index {
        0..4 => (factors[index] & 63, factors[index + 4] & 63),
        _ => {
            (factors[index + 4] & 15 | factors[index - 4] >> 6 << 4, factors[index + 4] >> 4 | factors[index] >> 6 << 4)
        }
    };
    let times = |at: usize, factor: u8| f16::from_f32(half(block, at).to_f32() * f32::from(factor));
    // Two sub-blocks share 32 bytes: the even one has the low halves.
    let codes = &codes[index / 2 * CHUNK..][..CHUNK];
    Block {
        scale: times(0, scale),
        minimum: times(2, minimum),
        codes: std::array::from_fn(|i| (codes[i] >> (index % 2 * 4) & 15) as i8),
    }
}
