//! The axes of the ring: MoE layers only.

use moetrail_routes::{ExpertDtype, RowLayout};

/// Axis sizes of a ring row `[moe_layers, top_k]`, and how it becomes a wire row `[num_layers, top_k]`.
///
/// Dense layers have no cell in the ring and cost no byte of the copy; they come back as zeros on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RingLayout {
    num_layers: usize,
    moe_layers: Vec<usize>,
    top_k: usize,
    dtype: ExpertDtype,
}

impl RingLayout {
    /// For a model of `num_layers` hidden layers, of which `moe_layers` (ascending) route among `num_experts`.
    pub fn new(num_layers: usize, moe_layers: Vec<usize>, top_k: usize, num_experts: usize) -> Self {
        Self { num_layers, moe_layers, top_k, dtype: ExpertDtype::for_num_experts(num_experts) }
    }

    /// Number of layers with cells.
    pub fn num_moe_layers(&self) -> usize {
        self.moe_layers.len()
    }

    /// Decoder indices of the layers with cells.
    pub fn moe_layers(&self) -> &[usize] {
        &self.moe_layers
    }

    /// Experts per token.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// Width of an id.
    pub fn dtype(&self) -> ExpertDtype {
        self.dtype
    }

    /// Bytes of a ring row: what one row costs on its way to the host.
    pub fn row_bytes(&self) -> usize {
        self.moe_layers.len() * self.top_k * self.dtype.itemsize()
    }

    /// The layout of the rows on the wire.
    pub fn wire(&self) -> RowLayout {
        RowLayout { num_layers: self.num_layers, top_k: self.top_k, dtype: self.dtype }
    }

    /// Ring rows as wire rows, zeros where a layer is dense. Without dense layers nothing is copied.
    pub fn to_wire(&self, rows: Vec<u8>) -> Vec<u8> {
        if self.moe_layers.len() == self.num_layers {
            return rows;
        }
        let cell = self.top_k * self.dtype.itemsize();
        let num_rows = rows.len().checked_div(self.row_bytes()).unwrap_or(0);
        // Layers that follow each other are copied at once: this runs where tokens are computed.
        let runs: Vec<(usize, usize)> = self
            .moe_layers
            .chunk_by(|layer, next| layer + 1 == *next)
            .map(|run| (run[0] * cell, run.len() * cell))
            .collect();
        let mut wire = vec![0; num_rows * self.wire().row_bytes()];
        for (row, to) in rows.chunks_exact(self.row_bytes()).zip(wire.chunks_exact_mut(self.wire().row_bytes())) {
            let mut from = 0;
            for (first, len) in &runs {
                to[*first..first + len].copy_from_slice(&row[from..from + len]);
                from += len;
            }
        }
        wire
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dense_layers_are_zero_on_the_wire() {
        let layout = RingLayout::new(4, vec![1, 3], 2, 8);
        assert_eq!(layout.row_bytes(), 4);
        let wire = layout.to_wire(vec![1, 2, 3, 4, 5, 6, 7, 0]);
        assert_eq!(wire, [0, 0, 1, 2, 0, 0, 3, 4, 0, 0, 5, 6, 0, 0, 7, 0]);
        let layout = RingLayout::new(2, vec![0, 1], 1, 300);
        assert_eq!(layout.to_wire(vec![1, 0, 2, 0]), [1, 0, 2, 0]);
    }
}
