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
    /// The most layers and the most experts per token that rows can have: what a payload says of itself is no reason
    /// to count beyond what any model has.
    pub const MAX_AXIS: usize = 1 << 16;

    /// Bytes of a row.
    pub fn row_bytes(self) -> usize {
        self.num_layers.saturating_mul(self.top_k).saturating_mul(self.dtype.itemsize())
    }
}
