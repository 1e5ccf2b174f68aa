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

/// Rows of little-endian ids in a signed dtype, in the narrowest of ours.
pub(crate) fn read(
    dtype: SignedDtype,
    start: usize,
    shape: [usize; 3],
    bytes: &[u8],
) -> Result<ExpertRows, FormatError> {
    check_bytes(shape, dtype.itemsize(), bytes.len())?;
    match dtype {
        SignedDtype::I8 => narrow(start, shape, bytes.iter().map(|id| i64::from(*id as i8))),
        SignedDtype::I16 => {
            narrow(start, shape, bytes.as_chunks().0.iter().map(|id| i64::from(i16::from_le_bytes(*id))))
        }
        SignedDtype::I32 => {
            narrow(start, shape, bytes.as_chunks().0.iter().map(|id| i64::from(i32::from_le_bytes(*id))))
        }
        SignedDtype::I64 => narrow(start, shape, bytes.as_chunks().0.iter().map(|id| i64::from_le_bytes(*id))),
    }
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
    ids: impl Iterator<Item = i64> + Clone,
) -> Result<ExpertRows, FormatError> {
    if let Some(id) = ids.clone().find(|id| u16::try_from(*id).is_err()) {
        return Err(FormatError::new("data", format!("{id} is no expert id")));
    }
    // No bit beyond those of the ids: enough to know whether eight hold them all.
    let dtype = ExpertDtype::for_largest_id(ids.clone().fold(0, |bits, id| bits | id as u16));
    let data = match dtype {
        ExpertDtype::U8 => ids.map(|id| id as u8).collect(),
        ExpertDtype::U16 => ids.flat_map(|id| (id as u16).to_le_bytes()).collect(),
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
    let layout = RowLayout { num_layers, top_k, dtype: ExpertDtype::U8 };
    if !layout.is_bounded() {
        let message = format!("it is {shape:?}; no rows of more than {} ids are read", RowLayout::MAX_ROW_IDS);
        return Err(FormatError::new("shape", message));
    }
    let expected = shape.into_iter().try_fold(itemsize, usize::checked_mul);
    if expected != Some(found) {
        let needed = expected.map_or("more than can be counted".to_owned(), |expected| expected.to_string());
        return Err(FormatError::new("data", format!("it has {found} bytes, the shape {shape:?} needs {needed}")));
    }
    Ok(())
}
