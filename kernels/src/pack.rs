//! From rows as they are stored to the panels that the products read.

use half::{bf16, f16};

use crate::blocks::BlockRows;
use crate::buffer::{Plain, elements_mut};
use crate::error::KernelError;
use crate::format::WeightFormat;
use crate::packed::{CENTRE, CHUNK, PANEL, PackedShape};
use crate::weights::{WeightDtype, WeightView};

/// Rows of weights to be packed.
#[derive(Clone, Copy, Debug)]
pub enum WeightRows<'a> {
    /// Floats.
    Float(WeightView<'a>),
    /// Quantised blocks, which are packed in their own format alone.
    Blocks(BlockRows<'a>),
}

impl<'a> From<WeightView<'a>> for WeightRows<'a> {
    fn from(view: WeightView<'a>) -> Self {
        WeightRows::Float(view)
    }
}

impl<'a> From<BlockRows<'a>> for WeightRows<'a> {
    fn from(rows: BlockRows<'a>) -> Self {
        WeightRows::Blocks(rows)
    }
}

impl WeightRows<'_> {
    /// `[rows, cols]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            WeightRows::Float(view) => [view.rows, view.cols],
            WeightRows::Blocks(blocks) => [blocks.rows(), blocks.cols()],
        }
    }

    /// Fails unless these rows can be packed as `format`.
    pub(crate) fn check(&self, format: WeightFormat) -> Result<(), KernelError> {
        match (self, format) {
            (WeightRows::Float(view), WeightFormat::Float(_) | WeightFormat::Int8) => view.check(),
            (WeightRows::Blocks(blocks), _) if blocks.format() == format => Ok(()),
            (WeightRows::Blocks(blocks), _) => Err(KernelError::Format { from: blocks.format(), to: format }),
            (WeightRows::Float(view), _) => Err(KernelError::Format { from: view.dtype.into(), to: format }),
        }
    }
}

/// Rows `first_row..first_row + rows` of a view, going to lanes `first_lane..` of a panel.
#[derive(Clone, Copy)]
pub(crate) struct PanelPart {
    pub(crate) panel: usize,
    pub(crate) first_lane: usize,
    pub(crate) first_row: usize,
    pub(crate) rows: usize,
}

/// Packs a part into the bytes of its panel; rows and format were checked.
pub(crate) fn pack_panel(shape: PackedShape, bytes: &mut [u8], part: PanelPart, rows: WeightRows<'_>) {
    match (shape.format, rows) {
        (WeightFormat::Float(dtype), WeightRows::Float(view)) => pack_floats(shape, dtype, bytes, part, view),
        (WeightFormat::Int8, WeightRows::Float(view)) => pack_int8(shape, bytes, part, view),
        (_, WeightRows::Blocks(blocks)) => pack_blocks(shape, bytes, part, blocks),
        (_, WeightRows::Float(_)) => unreachable!("rows were checked against the format"),
    }
}

fn pack_floats(shape: PackedShape, dtype: WeightDtype, bytes: &mut [u8], part: PanelPart, view: WeightView<'_>) {
    use WeightDtype::{BF16, F16, F32};
    match (dtype, view.dtype) {
        (BF16, BF16) if view.col_stride == 1 && view.cols.is_multiple_of(CHUNK) => {
            put_pairs(elements_mut::<u32>(bytes), part, view);
        }
        (F32, _) => put(shape, elements_mut::<f32>(bytes), part, view.cols, |r, c| view.get(r, c)),
        (BF16, BF16) | (F16, F16) => put(shape, elements_mut::<u16>(bytes), part, view.cols, |r, c| view.bits16(r, c)),
        (BF16, _) => {
            put(shape, elements_mut::<u16>(bytes), part, view.cols, |r, c| bf16::from_f32(view.get(r, c)).to_bits())
        }
        (F16, _) => {
            put(shape, elements_mut::<u16>(bytes), part, view.cols, |r, c| f16::from_f32(view.get(r, c)).to_bits())
        }
    }
}

fn put<T: Plain>(shape: PackedShape, panel: &mut [T], part: PanelPart, cols: usize, get: impl Fn(usize, usize) -> T) {
    // Blocks of columns keep both the rows read and the panel lines written in the cache.
    for first in (0..cols).step_by(CHUNK) {
        for row in 0..part.rows {
            for col in first..(first + CHUNK).min(cols) {
                panel[shape.position(part.first_lane + row, col)] = get(part.first_row + row, col);
            }
        }
    }
}

/// As [`put`] for rows of bf16 in whole chunks: a pair of neighbouring inputs is moved as one word.
fn put_pairs(panel: &mut [u32], part: PanelPart, view: WeightView<'_>) {
    const PAIRS: usize = CHUNK / 2;
    for (chunk, panel) in panel.chunks_exact_mut(PAIRS * PANEL).enumerate().take(view.cols / CHUNK) {
        for row in 0..part.rows {
            let first = 2 * ((part.first_row + row) * view.row_stride + chunk * CHUNK);
            let pairs = view.bytes[first..first + 2 * CHUNK].chunks_exact(4);
            for (pair, lanes) in pairs.zip(panel.chunks_exact_mut(PANEL)) {
                lanes[part.first_lane + row] = u32::from_le_bytes([pair[0], pair[1], pair[2], pair[3]]);
            }
        }
    }
}

fn pack_int8(shape: PackedShape, bytes: &mut [u8], part: PanelPart, view: WeightView<'_>) {
    let (head, codes) = bytes.split_at_mut(shape.format.head_bytes());
    let scales = elements_mut::<f32>(head);
    let mut values = vec![0.0; view.cols];
    for row in 0..part.rows {
        view.read_row(part.first_row + row, &mut values);
        // A NaN is no largest value; an infinity gives NaN products, as it must.
        let largest = values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        let scale = largest / 127.0;
        let inverse = if scale > 0.0 { scale.recip() } else { 0.0 };
        let lane = part.first_lane + row;
        scales[lane] = scale;
        for (col, value) in values.iter().enumerate() {
            codes[PackedShape::code_position(lane, col)] = stored(nearest(value * inverse));
        }
    }
}

/// The nearest whole number, ties to even, of a value in -127..=127.
fn nearest(value: f32) -> i8 {
    // Beside this number an f32 has no fraction: the sum is rounded, and its low bits are the number.
    const WHOLE: f32 = 12_582_912.0;
    (value + WHOLE).to_bits() as i8
}

/// A signed code as it is stored.
fn stored(code: i8) -> u8 {
    (code as u8).wrapping_add(CENTRE)
}

fn pack_blocks(shape: PackedShape, bytes: &mut [u8], part: PanelPart, blocks: BlockRows<'_>) {
    let format = shape.format;
    for (chunk, bytes) in bytes.chunks_exact_mut(format.chunk_bytes()).enumerate().take(blocks.cols() / CHUNK) {
        let (scales, codes) = bytes.split_at_mut(format.scale_bytes());
        let (scales, minima) = elements_mut::<u16>(scales).split_at_mut(PANEL);
        for row in 0..part.rows {
            let lane = part.first_lane + row;
            let block = blocks.block(part.first_row + row, chunk);
            scales[lane] = block.scale.to_bits();
            if format == WeightFormat::Q4K {
                // As it is added.
                minima[lane] = (-block.minimum).to_bits();
                for i in 0..CHUNK / 2 {
                    let both = block.codes[i] | block.codes[i + CHUNK / 2] << 4;
                    codes[PackedShape::code_position(lane, i)] = both as u8;
                }
            } else {
                for (i, code) in block.codes.into_iter().enumerate() {
                    codes[PackedShape::code_position(lane, i)] = stored(code);
                }
            }
        }
    }
}
