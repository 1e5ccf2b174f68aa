//! The axes of a row.

use crate::dtype::ExpertDtype;

/// Axis sizes and dtype of a row `[num_layers, top_k]` as the wire carries it.
///
/// The layer axis is every hidden layer of the target model in decoder order; dense layers are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RowLayout {
    /// `num_hidden_layers`.
    pub num_layers: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Width of an id.
    pub dtype: ExpertDtype,
}

impl RowLayout {
    /// The most ids in a row that is read: far beyond any model, and little enough that a few bytes which claim a
    /// huge shape cannot make anyone count for long.
    pub const MAX_ROW_IDS: usize = 1 << 20;

    /// Whether the axes are those of rows that are read.
    pub fn is_bounded(self) -> bool {
        self.num_layers.max(1).saturating_mul(self.top_k.max(1)) <= Self::MAX_ROW_IDS
    }

    /// Bytes of a row.
    pub fn row_bytes(self) -> usize {
        self.num_layers.saturating_mul(self.top_k).saturating_mul(self.dtype.itemsize())
    }
}
