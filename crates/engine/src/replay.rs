//! Routing that a request brings along.

use moetrail_routes::{ExpertRows, TokenSpan};
use xxhash_rust::xxh3::Xxh3;

/// The shape of a model's routing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoutingShape {
    /// All hidden layers.
    pub num_layers: usize,
    /// Decoder indices of those that route, ascending.
    pub moe_layers: Vec<usize>,
    /// Experts of a token.
    pub top_k: usize,
    /// Routed experts of a layer.
    pub num_experts: usize,
}

/// Checked rows of given experts, as the router reads them: `[rows, moe_layers, top_k]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplayRows {
    span: TokenSpan,
    row_len: usize,
    ids: Vec<u16>,
}

/// Why rows cannot be replayed; the message names the offending value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ReplayError(String);

impl ReplayRows {
    /// Checks rows against a model and keeps the cells of its MoE layers; those of dense layers mean nothing.
    ///
    /// # Errors
    /// [`ReplayError`] if the axes differ from the model's, an id is no expert's, or one occurs twice in a cell.
    pub fn new(rows: &ExpertRows, shape: &RoutingShape) -> Result<Self, ReplayError> {
        let [num_rows, num_layers, top_k] = rows.shape();
        if (num_layers, top_k) != (shape.num_layers, shape.top_k) {
            return Err(ReplayError(format!(
                "the shape is [{num_rows}, {num_layers}, {top_k}], the model's rows are [{}, {}]",
                shape.num_layers, shape.top_k
            )));
        }
        let row_len = shape.moe_layers.len() * top_k;
        let mut ids = Vec::with_capacity(num_rows * row_len);
        let itemsize = rows.layout().dtype.itemsize();
        let row_bytes = rows.layout().row_bytes();
        for (index, row) in rows.data().chunks_exact(row_bytes.max(1)).enumerate() {
            for &layer in &shape.moe_layers {
                let cell = &row[layer * top_k * itemsize..(layer + 1) * top_k * itemsize];
                let first = ids.len();
                match itemsize {
                    1 => ids.extend(cell.iter().map(|id| u16::from(*id))),
                    _ => ids.extend(cell.chunks_exact(2).map(|id| u16::from_le_bytes([id[0], id[1]]))),
                }
                check_cell(&ids[first..], shape.num_experts).map_err(|what| {
                    ReplayError(format!("{what} at position {}, layer {layer}", rows.start() + index))
                })?;
            }
        }
        Ok(Self { span: rows.span(), row_len, ids })
    }

    /// Rows that the engine captured itself.
    pub(crate) fn captured(span: TokenSpan, row_len: usize, ids: Vec<u16>) -> Self {
        Self { span, row_len, ids }
    }

    /// A digest of the rows that cover the positions of `span`; `None` if none does.
    pub(crate) fn digest(&self, span: TokenSpan) -> Option<u128> {
        let covered = span.intersection(self.span);
        if covered.is_empty() {
            return None;
        }
        let mut hasher = Xxh3::new();
        // Equal rows at other places of the block are other routing.
        hasher.update(&(covered.start as u64).to_le_bytes());
        for id in covered.iter().filter_map(|position| self.row(position)).flatten() {
            hasher.update(&id.to_le_bytes());
        }
        Some(hasher.digest128())
    }

    /// The positions covered.
    pub fn span(&self) -> TokenSpan {
        self.span
    }

    /// The ids of a covered position, `[moe_layers, top_k]`.
    pub(crate) fn row(&self, position: usize) -> Option<&[u16]> {
        let row = position.checked_sub(self.span.start).filter(|row| *row < self.span.len())?;
        Some(&self.ids[row * self.row_len..(row + 1) * self.row_len])
    }
}

fn check_cell(ids: &[u16], num_experts: usize) -> Result<(), String> {
    if let Some(id) = ids.iter().find(|id| usize::from(**id) >= num_experts) {
        return Err(format!("expert {id} of {num_experts}"));
    }
    match (1..ids.len()).find(|&k| ids[..k].contains(&ids[k])) {
        Some(k) => Err(format!("expert {} occurs twice in {ids:?}", ids[k])),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use moetrail_routes::{ExpertDtype, RowLayout};

    use super::*;

    fn replay(layers: usize, data: Vec<u8>, dtype: ExpertDtype) -> Result<ReplayRows, String> {
        let layout = RowLayout { num_layers: layers, top_k: 2, dtype };
        let rows = ExpertRows::new(5, layout, data).expect("whole rows");
        let shape = RoutingShape { num_layers: 2, moe_layers: vec![1], top_k: 2, num_experts: 4 };
        ReplayRows::new(&rows, &shape).map_err(|error| error.to_string())
    }

    #[test]
    fn digests_tell_rows_and_their_places_apart() {
        let rows = |data| replay(2, data, ExpertDtype::U8).expect("valid");
        let (a, b) = (rows(vec![9, 9, 3, 1, 9, 9, 3, 1]), rows(vec![0, 0, 3, 1, 0, 0, 1, 3]));
        let digest = |rows: &ReplayRows, start, end| rows.digest(TokenSpan::new(start, end));
        assert_eq!(digest(&a, 4, 6), digest(&b, 4, 6));
        assert_ne!(digest(&a, 4, 8), digest(&b, 4, 8));
        assert_ne!(digest(&a, 5, 6), digest(&a, 6, 7));
        assert_eq!((digest(&a, 0, 5), digest(&a, 7, 9)), (None, None));
    }

    #[test]
    fn dense_cells_are_left_out() {
        let rows = replay(2, vec![9, 9, 3, 1, 9, 9, 0, 2], ExpertDtype::U8).expect("valid");
        assert_eq!(rows.span(), TokenSpan::new(5, 7));
        assert_eq!((rows.row(4), rows.row(7)), (None, None));
        assert_eq!((rows.row(5), rows.row(6)), (Some(&[3, 1][..]), Some(&[0, 2][..])));
        let wide = replay(2, vec![0, 0, 0, 0, 3, 0, 1, 0], ExpertDtype::U16).expect("valid");
        assert_eq!(wide.row(5), Some(&[3, 1][..]));
    }

    #[test]
    fn what_no_router_chooses_is_refused() {
        let refused = |data: Vec<u8>, part: &str| {
            let error = replay(2, data, ExpertDtype::U8).expect_err(part);
            assert!(error.contains(part), "{error}");
        };
        refused(vec![0, 0, 4, 1], "expert 4 of 4 at position 5, layer 1");
        refused(vec![0, 0, 1, 2, 0, 0, 2, 2], "expert 2 occurs twice in [2, 2] at position 6, layer 1");
        let error = replay(1, vec![0, 1], ExpertDtype::U8).expect_err("another shape");
        assert_eq!(error, "the shape is [1, 1, 2], the model's rows are [2, 2]");
    }
}
