//! Rows by reference: stretches of files, as PrimeIntellect's router passes them on.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The rows `[pos, pos + rows)` of one field, in a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// What the rows are, such as `routed_experts`.
    pub field: String,
    /// Where they are.
    pub file: String,
    /// Bytes in the file before the first of them.
    pub offset: usize,
    /// Absolute position of the first of them.
    pub pos: usize,
    /// How many they are.
    pub rows: usize,
    /// Dtype of their elements: `uint8`, `uint16`, `int32` or `float32`.
    pub dtype: String,
    /// Axes of one row.
    pub shape: Vec<usize>,
}

/// Why segments cannot be merged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SegmentError {
    /// The size of a row is not known.
    #[error("{field}: rows of {shape:?} {dtype:?} have no size that is known")]
    Size {
        /// The field.
        field: String,
        /// Axes of one row.
        shape: Vec<usize>,
        /// Dtype of the elements.
        dtype: String,
    },
    /// A side lacks a field that the other has.
    #[error("{side} has no segment of {field}, the other side has")]
    Missing {
        /// `prefill` or `decode`.
        side: &'static str,
        /// The field.
        field: String,
    },
    /// Rows in between are missing.
    #[error("{field}: rows [{end}, {start}) are missing")]
    Gap {
        /// The field.
        field: String,
        /// Where the rows before end.
        end: usize,
        /// Where the next ones start.
        start: usize,
    },
}

impl Segment {
    /// Bytes of a row, and that the positions and the bytes can be counted.
    fn row_bytes(&self) -> Result<usize, SegmentError> {
        let itemsize = match self.dtype.as_str() {
            "uint8" => Some(1),
            "uint16" => Some(2),
            "int32" | "float32" => Some(4),
            _ => None,
        };
        let size = self.shape.iter().try_fold(itemsize.unwrap_or(0), |size: usize, axis| size.checked_mul(*axis));
        let end = size.and_then(|size| size.checked_mul(self.rows)).and_then(|bytes| bytes.checked_add(self.offset));
        let counted = itemsize.is_some() && end.is_some() && self.pos.checked_add(self.rows).is_some();
        size.filter(|_| counted).ok_or_else(|| SegmentError::Size {
            field: self.field.clone(),
            shape: self.shape.clone(),
            dtype: self.dtype.clone(),
        })
    }

    fn end(&self) -> usize {
        self.pos + self.rows
    }
}

/// Merges by absolute position and field: decode's rows that prefill has are dropped, also from within a segment.
///
/// # Errors
/// [`SegmentError`].
pub fn merge_segments(prefill: &[Segment], decode: &[Segment]) -> Result<Vec<Segment>, SegmentError> {
    let mut covered: BTreeMap<&str, usize> = BTreeMap::new();
    for segment in prefill {
        segment.row_bytes()?;
        let end = covered.entry(&segment.field).or_insert(segment.pos);
        *end = (*end).max(segment.end());
    }
    if let Some(field) = covered.keys().find(|field| decode.iter().all(|segment| segment.field != **field)) {
        return Err(SegmentError::Missing { side: "decode", field: (*field).to_owned() });
    }
    let mut merged = prefill.to_vec();
    for segment in decode {
        let row_bytes = segment.row_bytes()?;
        let Some(end) = covered.get_mut(segment.field.as_str()) else {
            return Err(SegmentError::Missing { side: "prefill", field: segment.field.clone() });
        };
        if segment.pos > *end {
            return Err(SegmentError::Gap { field: segment.field.clone(), end: *end, start: segment.pos });
        }
        let known = *end - segment.pos;
        if known < segment.rows {
            let offset = segment.offset + known * row_bytes;
            merged.push(Segment { offset, pos: *end, rows: segment.rows - known, ..segment.clone() });
            *end = segment.end();
        }
    }
    Ok(merged)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(field: &str, offset: usize, pos: usize, rows: usize) -> Segment {
        let (file, dtype) = ("f".to_owned(), "uint16".to_owned());
        Segment { field: field.into(), file, offset, pos, rows, dtype, shape: vec![3, 2] }
    }

    #[test]
    fn straddling_segments_are_cut() {
        let prefill = [segment("a", 0, 0, 5), segment("b", 0, 2, 3)];
        let decode = [segment("a", 100, 1, 3), segment("a", 200, 4, 4), segment("b", 0, 5, 1), segment("a", 300, 8, 2)];
        let merged = merge_segments(&prefill, &decode).unwrap();
        let expect = [
            segment("a", 0, 0, 5),
            segment("b", 0, 2, 3),
            segment("a", 212, 5, 3),
            segment("b", 0, 5, 1),
            segment("a", 300, 8, 2),
        ];
        assert_eq!(merged, expect);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = |prefill: &[Segment], decode: &[Segment]| merge_segments(prefill, decode).unwrap_err().to_string();
        let a = segment("a", 0, 0, 5);
        assert_eq!(error(std::slice::from_ref(&a), &[segment("a", 0, 6, 1)]), "a: rows [5, 6) are missing");
        assert_eq!(error(std::slice::from_ref(&a), &[]), "decode has no segment of a, the other side has");
        assert_eq!(error(&[], std::slice::from_ref(&a)), "prefill has no segment of a, the other side has");
        let odd = Segment { dtype: "bool".into(), ..a.clone() };
        assert_eq!(error(&[odd], std::slice::from_ref(&a)), "a: rows of [3, 2] \"bool\" have no size that is known");
        assert!(error(&[Segment { pos: usize::MAX, ..a.clone() }], &[a]).contains("no size"));
    }
}
