//! The object form, `{"data","shape","start","dtype"}` (PrimeIntellect's router and trainers).

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;

use crate::rows::ExpertRows;

/// The object form of rows, serialised with `data` first.
///
/// Clients do not parse the payload: they cut the bytes after `"routed_experts":{"data":"` out of the raw body up to
/// the next quote. So `data` stays the first key, the base64 is standard with padding, and the JSON must be compact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ObjectRows {
    /// Base64 of the bytes, C order, little-endian.
    pub data: String,
    /// `[rows, num_layers, top_k]`.
    pub shape: [usize; 3],
    /// Absolute position of the first row.
    pub start: usize,
    /// `uint8` or `uint16`.
    pub dtype: &'static str,
}

impl From<&ExpertRows> for ObjectRows {
    fn from(rows: &ExpertRows) -> Self {
        Self {
            data: STANDARD.encode(rows.data()),
            shape: rows.shape(),
            start: rows.start(),
            dtype: rows.layout().dtype.name(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::ExpertDtype;
    use crate::layout::RowLayout;

    fn check(start: usize, data: Vec<u8>, dtype: ExpertDtype, expect: &str) {
        let rows = ExpertRows::new(start, RowLayout { num_layers: 1, top_k: 2, dtype }, data).unwrap();
        assert_eq!(serde_json::to_string(&ObjectRows::from(&rows)).unwrap(), expect);
    }

    #[test]
    fn data_is_first_and_compact() {
        check(
            3,
            vec![1, 2, 255, 0],
            ExpertDtype::U8,
            r#"{"data":"AQL/AA==","shape":[2,1,2],"start":3,"dtype":"uint8"}"#,
        );
        check(0, vec![], ExpertDtype::U8, r#"{"data":"","shape":[0,1,2],"start":0,"dtype":"uint8"}"#);
        check(
            9,
            vec![44, 1, 0, 0],
            ExpertDtype::U16,
            r#"{"data":"LAEAAA==","shape":[1,1,2],"start":9,"dtype":"uint16"}"#,
        );
    }
}
