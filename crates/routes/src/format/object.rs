//! The object form, `{"data","shape","start","dtype"}`.

use std::io::{self, Write};

use serde::Deserialize;

use crate::dtype::ExpertDtype;
use crate::format::error::FormatError;
use crate::format::{base64_text, signed};
use crate::rows::ExpertRows;

/// Clients do not parse the payload: they cut the bytes after `"routed_experts":{"data":"` out of the raw body up to
/// the next quote. So `data` is the first key, and the JSON is compact.
pub(crate) fn write(rows: &ExpertRows, out: &mut dyn Write) -> io::Result<()> {
    out.write_all(br#"{"data":""#)?;
    base64_text::write(&[], rows.data(), out)?;
    let ([n, layers, top_k], dtype) = (rows.shape(), rows.layout().dtype.name());
    write!(out, r#"","shape":[{n},{layers},{top_k}],"start":{},"dtype":"{dtype}"}}"#, rows.start())
}

/// The fields of the object form as a client sends them.
#[derive(Debug, Clone, Deserialize)]
pub struct ObjectFields {
    /// Base64 of the bytes, C order, little-endian.
    pub data: String,
    /// `[rows, num_layers, top_k]`.
    pub shape: [usize; 3],
    /// Absolute position of the first row.
    pub start: Option<usize>,
    /// `uint8` where it is absent, or `uint16`.
    #[serde(default)]
    pub dtype: Option<String>,
}

impl ObjectFields {
    /// Decodes the rows.
    ///
    /// # Errors
    /// [`FormatError`] naming the field: no start, a dtype that is neither `uint8` nor `uint16`, or bytes that are not
    /// the shape's.
    pub fn decode(self) -> Result<ExpertRows, FormatError> {
        let start = self.start.ok_or_else(|| FormatError::new("start", "it is missing"))?;
        let dtype = match self.dtype.as_deref() {
            None => ExpertDtype::U8,
            Some(name) => ExpertDtype::from_name(name)
                .ok_or_else(|| FormatError::new("dtype", format!("it is {name:?}; uint8 and uint16 are possible")))?,
        };
        signed::build(start, self.shape, dtype, base64_text::decode(&self.data)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::RowLayout;

    fn check(start: usize, data: Vec<u8>, dtype: ExpertDtype, expect: &str) {
        let rows = ExpertRows::new(start, RowLayout { num_layers: 1, top_k: 2, dtype }, data).unwrap();
        let mut out = Vec::new();
        write(&rows, &mut out).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), expect);
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

    #[test]
    fn what_is_wrong_is_named() {
        let decode = |json: &str| {
            let fields: ObjectFields = serde_json::from_str(json).unwrap();
            fields.decode().map_err(|error| error.to_string())
        };
        for (json, expect) in [
            (r#"{"data":"AQI=","shape":[1,1,2]}"#, "start: it is missing"),
            (r#"{"data":"AQI=","shape":[1,1,2],"start":0,"dtype":"int32"}"#, "dtype: it is \"int32\""),
            (r#"{"data":"AQI=","shape":[2,1,2],"start":0}"#, "data: it has 2 bytes, the shape [2, 1, 2] needs 4"),
            (r#"{"data":"AQI=","shape":[1,1,2],"start":0,"dtype":"uint16"}"#, "data: it has 2 bytes"),
            (r#"{"data":"A?==","shape":[1,1,2],"start":0}"#, "data: it is not base64"),
            (r#"{"data":"","shape":[5,0,2],"start":0}"#, "shape: it is [5, 0, 2]"),
            (r#"{"data":"","shape":[18446744073709551615,2,2],"start":0}"#, "more than can be counted"),
            (r#"{"data":"AQI=","shape":[1,1,2],"start":18446744073709551615}"#, "start: 1 rows from position"),
        ] {
            let error = decode(json).unwrap_err();
            assert!(error.contains(expect), "{error}");
        }
        assert_eq!(decode(r#"{"data":"AQI=","shape":[1,1,2],"start":4}"#).unwrap().data(), [1, 2]);
    }
}
