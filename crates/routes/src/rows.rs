//! Rows of consecutive positions, ready to be sent.

use crate::dtype::ExpertDtype;
use crate::layout::RowLayout;
use crate::span::TokenSpan;

/// The rows of consecutive absolute positions, `[rows, num_layers, top_k]`, C order, little-endian.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertRows {
    start: usize,
    layout: RowLayout,
    data: Vec<u8>,
}

/// Why bytes are not rows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RowsError {
    /// The byte count is no whole number of rows.
    #[error("{bytes} bytes are no whole number of rows of {row_bytes} bytes")]
    PartialRow {
        /// Bytes given.
        bytes: usize,
        /// Bytes of one row.
        row_bytes: usize,
    },
    /// A row has more ids than [`RowLayout::MAX_ROW_IDS`].
    #[error("rows of {num_layers} layers and {top_k} experts per token; {} ids are the most", RowLayout::MAX_ROW_IDS)]
    TooWide {
        /// Layers given.
        num_layers: usize,
        /// Experts per token given.
        top_k: usize,
    },
    /// The positions are beyond what can be counted.
    #[error("{rows} rows from position {start} on are more positions than can be counted")]
    TooFar {
        /// Absolute position of the first row.
        start: usize,
        /// Number of rows.
        rows: usize,
    },
}

impl ExpertRows {
    /// Rows from position `start` on.
    ///
    /// # Errors
    /// [`RowsError::PartialRow`] if `data` is no whole number of rows, [`RowsError::TooWide`] if the axes are longer
    /// than those of any model, [`RowsError::TooFar`] if the rows end beyond `usize`.
    pub fn new(start: usize, layout: RowLayout, data: Vec<u8>) -> Result<Self, RowsError> {
        if !layout.is_bounded() {
            let RowLayout { num_layers, top_k, .. } = layout;
            return Err(RowsError::TooWide { num_layers, top_k });
        }
        let row_bytes = layout.row_bytes();
        let whole = if row_bytes == 0 { data.is_empty() } else { data.len().is_multiple_of(row_bytes) };
        if !whole {
            return Err(RowsError::PartialRow { bytes: data.len(), row_bytes });
        }
        let rows = data.len().checked_div(row_bytes).unwrap_or(0);
        if start.checked_add(rows).is_none() {
            return Err(RowsError::TooFar { start, rows });
        }
        Ok(Self { start, layout, data })
    }

    /// Absolute position of the first row.
    pub fn start(&self) -> usize {
        self.start
    }

    /// Number of rows.
    pub fn num_rows(&self) -> usize {
        self.data.len().checked_div(self.layout.row_bytes()).unwrap_or(0)
    }

    /// The positions covered.
    pub fn span(&self) -> TokenSpan {
        TokenSpan::new(self.start, self.start + self.num_rows())
    }

    /// Axis sizes and dtype.
    pub fn layout(&self) -> RowLayout {
        self.layout
    }

    /// `[rows, num_layers, top_k]`.
    pub fn shape(&self) -> [usize; 3] {
        [self.num_rows(), self.layout.num_layers, self.layout.top_k]
    }

    /// The bytes, C order, little-endian.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// The bytes, owned and writable, without a copy.
    pub fn into_data(self) -> Vec<u8> {
        self.data
    }

    /// The rows of the positions that are in both these rows and `span`.
    pub fn slice(&self, span: TokenSpan) -> Self {
        let kept = span.intersection(self.span());
        let row_bytes = self.layout.row_bytes();
        let first = (kept.start - self.start).min(self.num_rows());
        let data = self.data[first * row_bytes..(first + kept.len()) * row_bytes].to_vec();
        Self { start: kept.start, layout: self.layout, data }
    }

    /// The same ids, widened if `dtype` is the wider one; ids are never narrowed.
    pub fn into_dtype(self, dtype: ExpertDtype) -> Self {
        if self.layout.dtype.wider(dtype) == self.layout.dtype {
            return self;
        }
        let data = self.data.iter().flat_map(|id| [*id, 0]).collect();
        Self { start: self.start, layout: RowLayout { dtype, ..self.layout }, data }
    }

    /// The bytes of the row at absolute `position`.
    ///
    /// Returns `None` outside the rows.
    pub fn row(&self, position: usize) -> Option<&[u8]> {
        let row = position.checked_sub(self.start).filter(|row| *row < self.num_rows())?;
        let row_bytes = self.layout.row_bytes();
        Some(&self.data[row * row_bytes..(row + 1) * row_bytes])
    }

    /// All ids in C order, widened.
    pub fn iter_ids(&self) -> impl Iterator<Item = u16> {
        let size = self.layout.dtype.itemsize();
        self.data.chunks_exact(size).map(|id| u16::from_le_bytes([id[0], id.get(1).copied().unwrap_or(0)]))
    }

    /// The ids at absolute `position` and `layer`, widened.
    ///
    /// Returns `None` outside the rows.
    pub fn ids(&self, position: usize, layer: usize) -> Option<Vec<u16>> {
        let row = position.checked_sub(self.start).filter(|row| *row < self.num_rows())?;
        if layer >= self.layout.num_layers {
            return None;
        }
        let size = self.layout.dtype.itemsize();
        let first = (row * self.layout.num_layers + layer) * self.layout.top_k * size;
        let cell = &self.data[first..first + self.layout.top_k * size];
        Some(match size {
            1 => cell.iter().map(|id| u16::from(*id)).collect(),
            _ => cell.chunks_exact(2).map(|id| u16::from_le_bytes([id[0], id[1]])).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_found_by_absolute_position() {
        let layout = RowLayout { num_layers: 2, top_k: 2, dtype: ExpertDtype::U16 };
        let data = (0u16..8).flat_map(|id| (id + 300).to_le_bytes()).collect();
        let rows = ExpertRows::new(5, layout, data).unwrap();
        assert_eq!(rows.span(), TokenSpan::new(5, 7));
        assert_eq!(rows.ids(6, 1), Some(vec![306, 307]));
        assert_eq!(rows.ids(4, 0), None);
        assert_eq!(rows.ids(7, 0), None);
    }

    #[test]
    fn slices_keep_absolute_positions() {
        let layout = RowLayout { num_layers: 1, top_k: 2, dtype: ExpertDtype::U8 };
        let rows = ExpertRows::new(5, layout, vec![1, 2, 3, 4, 5, 6]).unwrap();
        let slice = |start, end| {
            let slice = rows.slice(TokenSpan::new(start, end));
            (slice.start(), slice.into_data())
        };
        assert_eq!(slice(6, 7), (6, vec![3, 4]));
        assert_eq!(slice(0, 6), (5, vec![1, 2]));
        assert_eq!(slice(7, 99), (7, vec![5, 6]));
        assert_eq!(slice(9, 12).1, Vec::<u8>::new());
        assert_eq!(slice(0, 3).1, Vec::<u8>::new());
        let wide = rows.clone().into_dtype(ExpertDtype::U16);
        assert_eq!((wide.span(), wide.data()[..6].to_vec()), (rows.span(), vec![1, 0, 2, 0, 3, 0]));
        assert!(wide.iter_ids().eq(rows.iter_ids()));
        assert!(ExpertRows::new(usize::MAX, layout, vec![1, 2]).is_err());
    }

    #[test]
    fn a_partial_row_is_refused() {
        let layout = RowLayout { num_layers: 2, top_k: 2, dtype: ExpertDtype::U8 };
        let error = ExpertRows::new(0, layout, vec![0; 7]).unwrap_err();
        assert_eq!(error.to_string(), "7 bytes are no whole number of rows of 4 bytes");
    }
}
