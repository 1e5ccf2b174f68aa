//! Rows of a prefill and of a decode, as one.

use crate::rows::ExpertRows;
use crate::span::TokenSpan;

/// Whose rows count where both sides have a position.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Overlap {
    /// Prefill's.
    #[default]
    First,
    /// Decode's.
    Last,
    /// Nobody's: rows that differ are an error.
    Strict,
}

impl Overlap {
    /// The policy of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "first" => Some(Self::First),
            "last" => Some(Self::Last),
            "strict" => Some(Self::Strict),
            _ => None,
        }
    }
}

/// What a merge gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Merged {
    /// The rows, from prefill's start on.
    pub rows: ExpertRows,
    /// Positions that both sides had.
    pub overlapping: usize,
    /// Of these, positions whose rows differ.
    pub differing: usize,
}

/// Why rows cannot be merged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// One side has rows and the other has none.
    #[error("{side} has no rows, the other side has")]
    Missing {
        /// `prefill` or `decode`.
        side: &'static str,
    },
    /// Rows in between are missing.
    #[error("rows [{end}, {start}) are missing: prefill ends at {end}, decode starts at {start}")]
    Gap {
        /// Where prefill ends.
        end: usize,
        /// Where decode starts.
        start: usize,
    },
    /// The rows are of different models.
    #[error("prefill's rows are [{}, {}], decode's are [{}, {}] (layers, top_k)", prefill[0], prefill[1], decode[0], decode[1])]
    Shape {
        /// Layers and experts per token of prefill.
        prefill: [usize; 2],
        /// Layers and experts per token of decode.
        decode: [usize; 2],
    },
    /// Rows of the same position differ.
    #[error("{differing} of {overlapping} rows that both sides have differ, the first at position {position}")]
    Differing {
        /// Positions whose rows differ.
        differing: usize,
        /// Positions that both sides have.
        overlapping: usize,
        /// The first position that differs.
        position: usize,
    },
}

/// Merges by absolute position: the result begins at prefill's start and ends where the later of the two ends.
///
/// Rows of decode that prefill has, or that lie before prefill's start, are dropped, or replace prefill's under
/// [`Overlap::Last`]. `uint8` and `uint16` widen. No rows on both sides are no rows.
///
/// ```
/// use moetrail_routes::{ExpertDtype, ExpertRows, Overlap, RowLayout, merge};
///
/// let layout = RowLayout { num_layers: 1, top_k: 2, dtype: ExpertDtype::U8 };
/// let prefill = ExpertRows::new(0, layout, vec![1, 2, 3, 4]).unwrap();
/// // The decode worker forwards the last prompt token once more.
/// let decode = ExpertRows::new(1, layout, vec![3, 4, 5, 6]).unwrap();
/// let merged = merge(Some(&prefill), Some(&decode), Overlap::First).unwrap().unwrap();
/// assert_eq!(merged.rows.data(), [1, 2, 3, 4, 5, 6]);
/// assert_eq!((merged.overlapping, merged.differing), (1, 0));
/// ```
///
/// # Errors
/// [`MergeError`].
pub fn merge(
    prefill: Option<&ExpertRows>,
    decode: Option<&ExpertRows>,
    overlap: Overlap,
) -> Result<Option<Merged>, MergeError> {
    let (prefill, decode) = match (prefill, decode) {
        (None, None) => return Ok(None),
        (None, Some(_)) => return Err(MergeError::Missing { side: "prefill" }),
        (Some(_), None) => return Err(MergeError::Missing { side: "decode" }),
        (Some(prefill), Some(decode)) => (prefill, decode),
    };
    let axes = |rows: &ExpertRows| [rows.layout().num_layers, rows.layout().top_k];
    if axes(prefill) != axes(decode) {
        return Err(MergeError::Shape { prefill: axes(prefill), decode: axes(decode) });
    }
    let (end, start) = (prefill.span().end, decode.start());
    if start > end {
        return Err(MergeError::Gap { end, start });
    }
    let dtype = prefill.layout().dtype.wider(decode.layout().dtype);
    let (prefill, decode) = (prefill.clone().into_dtype(dtype), decode.clone().into_dtype(dtype));
    let row_bytes = prefill.layout().row_bytes();
    let both = prefill.span().intersection(decode.span());
    let differs = |position: &usize| prefill.row(*position) != decode.row(*position);
    let differing = both.iter().filter(differs).count();
    if let (Overlap::Strict, Some(position)) = (overlap, both.iter().find(differs)) {
        return Err(MergeError::Differing { differing, overlapping: both.len(), position });
    }
    let (first, layout) = (prefill.start(), prefill.layout());
    let mut data = prefill.into_data();
    if overlap == Overlap::Last {
        let taken = decode.slice(both);
        let at = (both.start.min(end) - first) * row_bytes;
        data[at..at + taken.data().len()].copy_from_slice(taken.data());
    }
    data.extend_from_slice(decode.slice(TokenSpan::new(end, decode.span().end)).data());
    let rows = ExpertRows::new(first, layout, data).expect("whole rows that end where one of the sides ends");
    Ok(Some(Merged { rows, overlapping: both.len(), differing }))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::dtype::ExpertDtype;
    use crate::layout::RowLayout;

    fn rows(start: usize, ids: &[u16], dtype: ExpertDtype) -> ExpertRows {
        let data = match dtype {
            ExpertDtype::U8 => ids.iter().map(|id| *id as u8).collect(),
            ExpertDtype::U16 => ids.iter().flat_map(|id| id.to_le_bytes()).collect(),
        };
        ExpertRows::new(start, RowLayout { num_layers: 1, top_k: 1, dtype }, data).unwrap()
    }

    proptest! {
        /// Against a map from position to id.
        #[test]
        fn agrees_with_a_map(
            (p_start, p_ids, p_wide) in (0usize..12, prop::collection::vec(0u16..3, 0..12), any::<bool>()),
            (d_start, d_ids, d_wide) in (0usize..30, prop::collection::vec(0u16..3, 0..12), any::<bool>()),
            overlap in prop::sample::select(vec![Overlap::First, Overlap::Last, Overlap::Strict]),
        ) {
            let dtype = |wide| if wide { ExpertDtype::U16 } else { ExpertDtype::U8 };
            let (prefill, decode) = (rows(p_start, &p_ids, dtype(p_wide)), rows(d_start, &d_ids, dtype(d_wide)));
            let merged = merge(Some(&prefill), Some(&decode), overlap);
            if d_start > p_start + p_ids.len() {
                prop_assert_eq!(merged, Err(MergeError::Gap { end: p_start + p_ids.len(), start: d_start }));
                return Ok(());
            }
            let mut model: BTreeMap<usize, u16> = (p_start..).zip(p_ids.iter().copied()).collect();
            let (mut overlapping, mut differing) = (0, 0);
            for (position, id) in (d_start..).zip(d_ids.iter().copied()).filter(|(position, _)| *position >= p_start) {
                if let Some(known) = model.get(&position) {
                    overlapping += 1;
                    differing += usize::from(*known != id);
                }
                if overlap == Overlap::Last || !model.contains_key(&position) {
                    model.insert(position, id);
                }
            }
            if overlap == Overlap::Strict && differing > 0 {
                let differs = matches!(merged, Err(MergeError::Differing { differing: d, overlapping: o, .. }) if (d, o) == (differing, overlapping));
                prop_assert!(differs);
                return Ok(());
            }
            let merged = merged.unwrap().unwrap();
            prop_assert_eq!((merged.overlapping, merged.differing), (overlapping, differing));
            prop_assert_eq!(merged.rows.start(), p_start);
            prop_assert_eq!(merged.rows.layout().dtype, dtype(p_wide || d_wide));
            prop_assert!(merged.rows.iter_ids().eq(model.into_values()));
        }
    }

    #[test]
    fn a_missing_side_and_another_model_are_named() {
        let some = rows(0, &[1], ExpertDtype::U8);
        assert_eq!(merge(None, None, Overlap::First), Ok(None));
        let error = merge(None, Some(&some), Overlap::First).unwrap_err();
        assert_eq!(error.to_string(), "prefill has no rows, the other side has");
        let error = merge(Some(&some), None, Overlap::First).unwrap_err();
        assert_eq!(error, MergeError::Missing { side: "decode" });
        let layout = RowLayout { num_layers: 2, top_k: 1, dtype: ExpertDtype::U8 };
        let other = ExpertRows::new(0, layout, vec![1, 2]).unwrap();
        let error = merge(Some(&some), Some(&other), Overlap::First).unwrap_err().to_string();
        assert_eq!(error, "prefill's rows are [1, 1], decode's are [2, 1] (layers, top_k)");
    }
}
