use std::fmt;

use half::{bf16, f16};

use crate::error::KernelError;

/// How weights, or the KV cache, are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightDtype {
    /// 32-bit floats.
    F32,
    /// bfloat16; activations are rounded to it once before a product.
    BF16,
    /// IEEE half precision; products are f32.
    F16,
}

impl WeightDtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            WeightDtype::F32 => 4,
            WeightDtype::BF16 | WeightDtype::F16 => 2,
        }
    }
}

impl fmt::Display for WeightDtype {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            WeightDtype::F32 => "float32",
            WeightDtype::BF16 => "bfloat16",
            WeightDtype::F16 => "float16",
        })
    }
}

/// A weight matrix `[rows, cols]` inside somebody else's little-endian bytes, perhaps unaligned, perhaps transposed.
#[derive(Clone, Copy, Debug)]
pub struct WeightView<'a> {
    /// The bytes; element (r, c) lies `r * row_stride + c * col_stride` elements from their start.
    pub bytes: &'a [u8],
    /// Element type.
    pub dtype: WeightDtype,
    /// Rows, the output features.
    pub rows: usize,
    /// Columns, the input features.
    pub cols: usize,
    /// Elements from one row to the next.
    pub row_stride: usize,
    /// Elements from one column to the next.
    pub col_stride: usize,
}

impl<'a> WeightView<'a> {
    /// A row-major `[rows, cols]` matrix.
    pub fn row_major(bytes: &'a [u8], dtype: WeightDtype, rows: usize, cols: usize) -> WeightView<'a> {
        WeightView { bytes, dtype, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// The `[rows, cols]` view of a row-major `[cols, rows]` matrix.
    pub fn transposed(bytes: &'a [u8], dtype: WeightDtype, rows: usize, cols: usize) -> WeightView<'a> {
        WeightView { bytes, dtype, rows, cols, row_stride: 1, col_stride: rows }
    }

    /// Fails unless every element lies inside the bytes.
    pub fn check(&self) -> Result<(), KernelError> {
        let last = |count: usize, stride: usize| count.checked_sub(1)?.checked_mul(stride);
        let needed = if self.rows == 0 || self.cols == 0 {
            Some(0)
        } else {
            last(self.rows, self.row_stride)
                .zip(last(self.cols, self.col_stride))
                .and_then(|(row, col)| row.checked_add(col)?.checked_add(1)?.checked_mul(self.dtype.bytes()))
        };
        match needed {
            Some(needed) if needed <= self.bytes.len() => Ok(()),
            _ => Err(KernelError::ViewBytes {
                dtype: self.dtype,
                rows: self.rows,
                cols: self.cols,
                row_stride: self.row_stride,
                col_stride: self.col_stride,
                needed: needed.unwrap_or(usize::MAX),
                got: self.bytes.len(),
            }),
        }
    }

    /// Element (row, col) as f32.
    pub fn get(&self, row: usize, col: usize) -> f32 {
        let index = row * self.row_stride + col * self.col_stride;
        match self.dtype {
            WeightDtype::F32 => f32::from_le_bytes(self.array(index)),
            WeightDtype::BF16 => bf16::from_le_bytes(self.array(index)).to_f32(),
            WeightDtype::F16 => f16::from_le_bytes(self.array(index)).to_f32(),
        }
    }

    /// Row `row` as f32.
    pub(crate) fn read_row(&self, row: usize, to: &mut [f32]) {
        let width = self.dtype.bytes();
        if self.col_stride != 1 {
            return to.iter_mut().enumerate().for_each(|(col, value)| *value = self.get(row, col));
        }
        let bytes = &self.bytes[row * self.row_stride * width..][..self.cols * width];
        let pairs = to.iter_mut().zip(bytes.chunks_exact(width));
        match self.dtype {
            WeightDtype::F32 => pairs.for_each(|(to, b)| *to = f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            WeightDtype::BF16 => pairs.for_each(|(to, b)| *to = bf16::from_le_bytes([b[0], b[1]]).to_f32()),
            WeightDtype::F16 => pairs.for_each(|(to, b)| *to = f16::from_le_bytes([b[0], b[1]]).to_f32()),
        }
    }

    /// The bits of element (row, col) of a 16-bit view.
    pub(crate) fn bits16(&self, row: usize, col: usize) -> u16 {
        u16::from_le_bytes(self.array(row * self.row_stride + col * self.col_stride))
    }

    fn array<const N: usize>(&self, index: usize) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.bytes[index * N..][..N]);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_read_both_orders_and_refuse_short_bytes() {
        let bytes: Vec<u8> = (0..6).flat_map(|value| (value as f32).to_le_bytes()).collect();
        let plain = WeightView::row_major(&bytes, WeightDtype::F32, 2, 3);
        let transposed = WeightView::transposed(&bytes, WeightDtype::F32, 3, 2);
        assert_eq!(plain.get(1, 2), 5.0);
        assert_eq!(transposed.get(2, 1), 5.0);
        assert_eq!(transposed.get(1, 0), 1.0);
        plain.check().unwrap();
        transposed.check().unwrap();
        let error = WeightView::row_major(&bytes, WeightDtype::F32, 2, 4).check().unwrap_err();
        assert!(error.to_string().contains("needs 32 bytes, got 24"), "{error}");
        WeightView::row_major(&bytes, WeightDtype::BF16, usize::MAX, 4).check().unwrap_err();
    }
}
