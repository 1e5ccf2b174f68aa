//! The layout the products read: panels of 64 outputs, in chunks of 32 inputs.
//!
//! ```text
//! float32, float16   [out / 64][in][64]             one weight an output
//! bfloat16           [out / 64][in / 2][64][2]      one pair of neighbouring inputs an output
//! int8               [out / 64]( scales [64] f32, [in / 4][64][4] )
//! q8_0               [out / 64][in / 32]( scales [64] f16, [8][64][4] )
//! q4_k               [out / 64][in / 32]( scales [64] f16, negated minima [64] f16, [4][64][4] )
//! ```
//! Codes lie in fours of neighbouring inputs, as instructions for bytes multiply them; those of int8 and q8_0 have
//! [`CENTRE`] added, as those instructions want one factor unsigned. A byte of q4_k has the code of input `i` in its low
//! half and that of `i + 16` in its high half. `out` is padded to whole panels and `in` to whole chunks, with weights of
//! zero: whatever the codes, a scale of zero, or an activation of zero, makes them so.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};

use crate::buffer::{Buffer, Plain, Shared, elements};
use crate::error::KernelError;
use crate::format::WeightFormat;
use crate::pack::{PanelPart, WeightRows, pack_panel};
use crate::pool;
use crate::upcoming::NextRead;
use crate::weights::WeightDtype;

/// Outputs of one panel.
pub const PANEL: usize = 64;

/// Inputs of one chunk: what a matrix tile multiplies at once.
pub(crate) const CHUNK: usize = 32;

/// What is added to signed codes.
pub(crate) const CENTRE: u8 = 128;

/// A weight matrix `[out, in]` in the layout the products read; a clone shares the bytes.
#[derive(Clone)]
pub struct PackedMatrix {
    buffer: Arc<Buffer>,
    shape: PackedShape,
}

/// What a packed matrix holds, apart from its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PackedShape {
    pub(crate) out: usize,
    pub(crate) inp: usize,
    pub(crate) format: WeightFormat,
}

impl PackedShape {
    /// Inputs of a panel, padding included.
    pub(crate) fn depth(self) -> usize {
        self.inp.next_multiple_of(CHUNK)
    }

    pub(crate) fn panels(self) -> usize {
        self.out.div_ceil(PANEL)
    }

    /// Bytes of one panel.
    pub(crate) fn panel_bytes(self) -> usize {
        self.format.head_bytes() + self.depth() / CHUNK * self.format.chunk_bytes()
    }

    /// Where the float of (lane, col) lies inside its panel.
    pub(crate) fn position(self, lane: usize, col: usize) -> usize {
        match self.format {
            WeightFormat::Float(WeightDtype::BF16) => (col / 2) * 2 * PANEL + lane * 2 + col % 2,
            _ => col * PANEL + lane,
        }
    }

    /// Where the code of (lane, input) lies among those of a chunk.
    pub(crate) fn code_position(lane: usize, input: usize) -> usize {
        4 * (input / 4 * PANEL + lane) + input % 4
    }

    /// The weights of an output of a panel.
    fn unpack(self, panel: &[u8], lane: usize, to: &mut [f32]) {
        let (head, chunks) = panel.split_at(self.format.head_bytes());
        let chunks =
            chunks.chunks_exact(self.format.chunk_bytes()).map(|chunk| chunk.split_at(self.format.scale_bytes()));
        let half = |scales: &[u8], at: usize| f16::from_bits(elements::<u16>(scales)[at]).to_f32();
        match self.format {
            WeightFormat::Float(WeightDtype::F32) => {
                self.unpack_floats(elements::<f32>(panel), lane, to, |value| value)
            }
            WeightFormat::Float(WeightDtype::BF16) => {
                self.unpack_floats(elements::<u16>(panel), lane, to, |bits| bf16::from_bits(bits).to_f32());
            }
            WeightFormat::Float(WeightDtype::F16) => {
                self.unpack_floats(elements::<u16>(panel), lane, to, |bits| f16::from_bits(bits).to_f32());
            }
            WeightFormat::Int8 | WeightFormat::Q8_0 => {
                for (to, (scales, codes)) in to.chunks_mut(CHUNK).zip(chunks) {
                    let scale = if scales.is_empty() { elements::<f32>(head)[lane] } else { half(scales, lane) };
                    for (input, to) in to.iter_mut().enumerate() {
                        let code = codes[PackedShape::code_position(lane, input)];
                        *to = (f32::from(code) - f32::from(CENTRE)) * scale;
                    }
                }
            }
            WeightFormat::Q4K => {
                for (to, (scales, codes)) in to.chunks_mut(CHUNK).zip(chunks) {
                    let (scale, addition) = (half(scales, lane), half(scales, PANEL + lane));
                    for (input, to) in to.iter_mut().enumerate() {
                        let byte = codes[PackedShape::code_position(lane, input % (CHUNK / 2))];
                        let code = byte >> (input / (CHUNK / 2) * 4) & 15;
                        *to = f32::from(code) * scale + addition;
                    }
                }
            }
        }
    }

    fn unpack_floats<T: Plain>(self, panel: &[T], lane: usize, to: &mut [f32], widen: impl Fn(T) -> f32) {
        for (col, value) in to.iter_mut().enumerate() {
            *value = widen(panel[self.position(lane, col)]);
        }
    }
}

impl PackedMatrix {
    /// A builder whose weights are all zero until rows are put.
    pub fn zeros(out: usize, inp: usize, format: impl Into<WeightFormat>) -> PackedMatrixBuilder {
        let shape = PackedShape { out, inp, format: format.into() };
        let buffer = Buffer::zeroed(shape.panels() * shape.panel_bytes());
        PackedMatrixBuilder { buffer, shape }
    }

    /// Rows of the matrix.
    pub fn out_features(&self) -> usize {
        self.shape.out
    }

    /// Columns of the matrix.
    pub fn in_features(&self) -> usize {
        self.shape.inp
    }

    /// How the weights are stored.
    pub fn format(&self) -> WeightFormat {
        self.shape.format
    }

    /// Size in memory, padding included.
    pub fn bytes(&self) -> usize {
        self.buffer.len()
    }

    /// Writes row `row` (`[in]`) to `to` as f32.
    ///
    /// # Panics
    /// When `row` or the length of `to` does not fit the matrix.
    pub fn unpack_row(&self, row: usize, to: &mut [f32]) {
        assert!(row < self.shape.out, "row {row} of {} rows", self.shape.out);
        assert_eq!(to.len(), self.shape.inp, "a row has in_features elements");
        self.shape.unpack(self.panel_bytes(row / PANEL), row % PANEL, to);
    }

    pub(crate) fn shape(&self) -> PackedShape {
        self.shape
    }

    /// Says that the weights are read after the next job: threads that have to wait fetch them meanwhile.
    pub(crate) fn announce(&self) {
        pool::announce(NextRead::of(self.buffer.bytes()));
    }

    /// The bytes of one panel.
    pub(crate) fn panel_bytes(&self, panel: usize) -> &[u8] {
        self.panels_bytes(panel..panel + 1)
    }

    /// The bytes of some panels.
    pub(crate) fn panels_bytes(&self, panels: Range<usize>) -> &[u8] {
        let len = self.shape.panel_bytes();
        &self.buffer.bytes()[panels.start * len..panels.end * len]
    }
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "PackedMatrix([{}, {}] {})", self.shape.out, self.shape.inp, self.shape.format)
    }
}

/// A packed matrix while its rows are being put.
pub struct PackedMatrixBuilder {
    buffer: Buffer,
    shape: PackedShape,
}

impl PackedMatrixBuilder {
    /// How the weights will be stored.
    pub fn format(&self) -> WeightFormat {
        self.shape.format
    }

    /// Packs `rows` as rows `first_row..`, converting the element type where it differs.
    pub fn put_rows<'r>(&mut self, first_row: usize, rows: impl Into<WeightRows<'r>>) -> Result<(), KernelError> {
        let rows = rows.into();
        rows.check(self.shape.format)?;
        let [count, cols] = rows.shape();
        let end = first_row.saturating_add(count);
        if end > self.shape.out || cols != self.shape.inp {
            return Err(KernelError::PutRows {
                first: first_row,
                end,
                cols,
                out_features: self.shape.out,
                in_features: self.shape.inp,
            });
        }
        if count == 0 {
            return Ok(());
        }
        let first_panel = first_row / PANEL;
        let panels = end.div_ceil(PANEL) - first_panel;
        self.put_panels(
            panels,
            |index| {
                let panel = first_panel + index;
                let from = (panel * PANEL).max(first_row);
                let to = ((panel + 1) * PANEL).min(end);
                PanelPart { panel, first_lane: from % PANEL, first_row: from - first_row, rows: to - from }
            },
            rows,
        );
        Ok(())
    }

    /// Packs checked rows panel by panel, in parallel; `part(index)` names a distinct panel for each index.
    pub(crate) fn put_panels(&mut self, count: usize, part: impl Fn(usize) -> PanelPart + Sync, rows: WeightRows<'_>) {
        let shape = self.shape;
        let len = shape.panel_bytes();
        let panels = self.buffer.len() / len.max(1);
        let shared = Shared::new(self.buffer.bytes_mut());
        pool::run(count, &|index| {
            let part = part(index);
            assert!(part.panel < panels && part.first_lane + part.rows <= PANEL, "parts lie inside the matrix");
            // SAFETY: each index has a panel of its own, inside the buffer.
            let bytes = unsafe { shared.slice(part.panel * len, len) };
            pack_panel(shape, bytes, part, rows);
        });
    }

    /// The packed matrix.
    pub fn finish(self) -> PackedMatrix {
        PackedMatrix { buffer: Arc::new(self.buffer), shape: self.shape }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::WeightView;

    #[test]
    fn rows_come_back_as_they_were_put_in_every_dtype_and_order() {
        for dtype in [WeightDtype::F32, WeightDtype::BF16, WeightDtype::F16] {
            for (out, inp) in [(1, 1), (64, 2), (65, 3), (200, 33)] {
                let values: Vec<f32> = (0..out * inp).map(|i| (i % 251) as f32 - 100.0).collect();
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                let mut turned = vec![0u8; 1];
                for c in 0..inp {
                    (0..out).for_each(|r| turned.extend(bf16::from_f32(values[r * inp + c]).to_le_bytes()));
                }
                let mut builder = PackedMatrix::zeros(out, inp, dtype);
                // The first rows come row-major in f32, the rest transposed in unaligned bf16.
                let split = out / 2;
                let first = &bytes[..split * inp * 4];
                builder.put_rows(0, WeightView::row_major(first, WeightDtype::F32, split, inp)).unwrap();
                let rest = WeightView {
                    bytes: &turned[1 + split * 2..],
                    dtype: WeightDtype::BF16,
                    rows: out - split,
                    cols: inp,
                    row_stride: 1,
                    col_stride: out,
                };
                builder.put_rows(split, rest).unwrap();
                let matrix = builder.finish();
                let mut row = vec![0.0; inp];
                for r in 0..out {
                    matrix.unpack_row(r, &mut row);
                    assert_eq!(row, values[r * inp..][..inp], "{dtype} row {r} of [{out}, {inp}]");
                }
            }
        }
    }

    #[test]
    fn rows_of_whole_chunks_come_back_too() {
        let (out, inp) = (150, 96);
        let values: Vec<f32> = (0..out * inp).map(|i| (i * 7 % 509) as f32 - 250.0).collect();
        let mut bytes = vec![0u8; 1];
        values.iter().for_each(|&value| bytes.extend(bf16::from_f32(value).to_le_bytes()));
        let mut builder = PackedMatrix::zeros(out, inp, WeightDtype::BF16);
        for rows in [0..37, 37..150] {
            let part = &bytes[1 + rows.start * inp * 2..];
            builder.put_rows(rows.start, WeightView::row_major(part, WeightDtype::BF16, rows.len(), inp)).unwrap();
        }
        let matrix = builder.finish();
        let mut row = vec![0.0; inp];
        for r in 0..out {
            matrix.unpack_row(r, &mut row);
            let expected: Vec<f32> =
                values[r * inp..][..inp].iter().map(|&value| bf16::from_f32(value).to_f32()).collect();
            assert_eq!(row, expected, "row {r}");
        }
    }

    #[test]
    fn rows_outside_the_matrix_are_refused() {
        let bytes = [0u8; 64];
        let mut builder = PackedMatrix::zeros(4, 4, WeightDtype::F32);
        let view = WeightView::row_major(&bytes, WeightDtype::F32, 2, 4);
        builder.put_rows(2, view).unwrap();
        let error = builder.put_rows(3, view).unwrap_err();
        assert!(error.to_string().contains("rows 3..5 of width 4"), "{error}");
        builder.put_rows(0, WeightView::row_major(&bytes, WeightDtype::F32, 2, 3)).unwrap_err();
    }
}
