//! What rows say about the load of experts.

use serde::Serialize;

use crate::rows::ExpertRows;

/// The routing of some rows, layer by layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RoutingStats {
    /// Number of rows.
    pub rows: usize,
    /// Absolute position of the first.
    pub start: usize,
    /// Experts of a token.
    pub top_k: usize,
    /// The layers.
    pub layers: Vec<LayerStats>,
}

/// The routing of one layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerStats {
    /// Decoder index.
    pub layer: usize,
    /// Whether the layer has no experts: its cells are all zero, which no router with `top_k > 1` chooses.
    pub dense: bool,
    /// Selections of each expert, as many as the largest id needs.
    pub selections: Vec<u64>,
    /// Experts selected at least once.
    pub experts_used: usize,
    /// Selections of the busiest expert over the mean of those used; 1 is even.
    pub peak_over_mean: f64,
    /// Entropy of the selections in bits.
    pub entropy_bits: f64,
    /// Share of the selections that the token before had, too: 1 where tokens are routed alike.
    pub reuse: f64,
}

impl RoutingStats {
    /// Counts.
    pub fn new(rows: &ExpertRows) -> Self {
        let [num_rows, num_layers, top_k] = rows.shape();
        let layers = (0..num_layers).map(|layer| LayerStats::new(rows, layer)).collect();
        Self { rows: num_rows, start: rows.start(), top_k, layers }
    }
}

impl LayerStats {
    fn new(rows: &ExpertRows, layer: usize) -> Self {
        let cells: Vec<Vec<u16>> = rows.span().iter().filter_map(|position| rows.ids(position, layer)).collect();
        let top_k = rows.layout().top_k;
        let dense = top_k > 1 && !cells.is_empty() && cells.iter().flatten().all(|id| *id == 0);
        let mut selections: Vec<u64> = Vec::new();
        for id in cells.iter().flatten().filter(|_| !dense) {
            selections.resize(selections.len().max(usize::from(*id) + 1), 0);
            selections[usize::from(*id)] += 1;
        }
        let total: u64 = selections.iter().sum();
        let used: Vec<f64> = selections.iter().filter(|count| **count > 0).map(|count| *count as f64).collect();
        let mean = total as f64 / used.len().max(1) as f64;
        let share = |count: &f64| count / total as f64;
        let again =
            cells.windows(2).map(|pair| pair[1].iter().filter(|id| pair[0].contains(id)).count()).sum::<usize>();
        let pairs = cells.len().saturating_sub(1) * top_k;
        Self {
            layer,
            dense,
            experts_used: used.len(),
            peak_over_mean: if used.is_empty() { 0.0 } else { used.iter().copied().fold(0.0, f64::max) / mean },
            entropy_bits: -used.iter().map(|count| share(count) * share(count).log2()).sum::<f64>(),
            reuse: if dense || pairs == 0 { 0.0 } else { again as f64 / pairs as f64 },
            selections,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::ExpertDtype;
    use crate::layout::RowLayout;

    #[test]
    fn load_entropy_and_reuse() {
        let layout = RowLayout { num_layers: 2, top_k: 2, dtype: ExpertDtype::U8 };
        let rows = ExpertRows::new(3, layout, vec![0, 0, 0, 1, 0, 0, 1, 2, 0, 0, 2, 1]).unwrap();
        let stats = RoutingStats::new(&rows);
        assert_eq!((stats.rows, stats.start, stats.top_k), (3, 3, 2));
        assert!(stats.layers[0].dense && stats.layers[0].selections.is_empty());
        let layer = &stats.layers[1];
        assert_eq!((layer.dense, &layer.selections[..], layer.experts_used), (false, &[1, 3, 2][..], 3));
        assert_eq!((layer.peak_over_mean, layer.reuse), (1.5, 0.75));
        assert!((layer.entropy_bits - 1.459).abs() < 1e-3);
        let nothing = RoutingStats::new(&ExpertRows::new(0, layout, vec![]).unwrap());
        assert_eq!((nothing.layers[1].entropy_bits, nothing.layers[1].peak_over_mean), (0.0, 0.0));
    }
}
