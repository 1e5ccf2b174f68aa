//! Ids in the signed dtypes that other engines and trainers use.

use std::io::{self, Write};

use crate::dtype::ExpertDtype;
use crate::format::base64_text;
use crate::format::error::FormatError;
use crate::layout::RowLayout;
use crate::rows::ExpertRows;

/// The dtypes of ids on the wire beside our own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SignedDtype {
    I8,
    I16,
    I32,
    I64,
}

impl SignedDtype {
    pub(crate) fn itemsize(self) -> usize {
        match self {
            Self::I8 => 1,
            Self::I16 => 2,
            Self::I32 => 4,
            Self::I64 => 8,
        }
    }

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        match name {
            "int8" => Some(Self::I8),
            "int16" => Some(Self::I16),
            "int32" => Some(Self::I32),
            "int64" => Some(Self::I64),
            _ => None,
        }
    }
}

/// Ids of one, two, four or eight bytes each, little-endian.
pub(crate) fn ids(dtype: SignedDtype, bytes: &[u8]) -> impl Iterator<Item = i64> {
    bytes.chunks_exact(dtype.itemsize()).map(|id| {
        let mut wide = [if id.last().is_some_and(|byte| *byte > 127) { 255 } else { 0 }; 8];
        wide[..id.len()].copy_from_slice(id);
        i64::from_le_bytes(wide)
    })
}

/// Writes the base64 of ids in a signed dtype that holds them.
pub(crate) fn write(dtype: SignedDtype, ids: impl Iterator<Item = u16>, out: &mut dyn Write) -> io::Result<()> {
    match dtype {
        SignedDtype::I8 => base64_text::write_ids(ids.map(|id| [id as u8]), out),
        SignedDtype::I16 => base64_text::write_ids(ids.map(u16::to_le_bytes), out),
        SignedDtype::I32 => base64_text::write_ids(ids.map(|id| u32::from(id).to_le_bytes()), out),
        SignedDtype::I64 => base64_text::write_ids(ids.map(|id| u64::from(id).to_le_bytes()), out),
    }
}

/// Rows of ids whose model is not known: the narrowest of our dtypes that holds them.
///
/// There is no id for "none": a negative one is refused, as is one beyond 16 bits.
pub(crate) fn narrow(
    start: usize,
    [rows, num_layers, top_k]: [usize; 3],
    ids: impl Iterator<Item = i64>,
) -> Result<ExpertRows, FormatError> {
    let mut narrowed = Vec::new();
    for id in ids {
        let id = u16::try_from(id).map_err(|_| FormatError::new("data", format!("{id} is no expert id")))?;
        narrowed.push(id);
    }
    let dtype = ExpertDtype::for_largest_id(narrowed.iter().copied().max().unwrap_or(0));
    let data = match dtype {
        ExpertDtype::U8 => narrowed.into_iter().map(|id| id as u8).collect(),
        ExpertDtype::U16 => narrowed.into_iter().flat_map(u16::to_le_bytes).collect(),
    };
    build(start, [rows, num_layers, top_k], dtype, data)
}

/// Rows of bytes that must be exactly those of the shape.
pub(crate) fn build(
    start: usize,
    shape: [usize; 3],
    dtype: ExpertDtype,
    data: Vec<u8>,
) -> Result<ExpertRows, FormatError> {
    check_bytes(shape, dtype.itemsize(), data.len())?;
    let [_, num_layers, top_k] = shape;
    let rows = ExpertRows::new(start, RowLayout { num_layers, top_k, dtype }, data);
    rows.map_err(|error| FormatError::new("start", error.to_string()))
}

/// Refuses a number of bytes that is not the shape's.
pub(crate) fn check_bytes(shape: [usize; 3], itemsize: usize, found: usize) -> Result<(), FormatError> {
    let [_, num_layers, top_k] = shape;
    if num_layers == 0 || top_k == 0 {
        return Err(FormatError::new("shape", format!("it is {shape:?}; layers and experts per token are at least 1")));
    }
    let expected = shape.into_iter().try_fold(itemsize, usize::checked_mul);
    if expected != Some(found) {
        let needed = expected.map_or("more than can be counted".to_owned(), |expected| expected.to_string());
        return Err(FormatError::new("data", format!("it has {found} bytes, the shape {shape:?} needs {needed}")));
    }
    Ok(())
}
