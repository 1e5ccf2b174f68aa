//! Reading a payload whose format may not be known.

use serde::Deserialize;
use serde_json::Value;

use crate::format::error::FormatError;
use crate::format::{Format, ObjectFields, list, nemo, npy, sglang, skyrl};
use crate::rows::ExpertRows;

/// What is known of a payload besides itself.
#[derive(Debug, Clone, Copy, Default)]
pub struct Import {
    /// Its format; recognised if absent.
    pub format: Option<Format>,
    /// Where its rows start, if neither it nor what stands beside it says so; 0 if absent.
    pub start: Option<usize>,
    /// `[rows, num_layers, top_k]`, for flat int32 and for lists without rows.
    pub shape: Option<[usize; 3]>,
    /// Whether `{"data","shape","dtype"}` of uint8 without a start is SkyRL's form rather than the object form with its
    /// start left out. Where rows are put together, a missing start must not pass for 0.
    pub bare_skyrl: bool,
}

impl Import {
    /// Reads a payload; `null` is no rows.
    ///
    /// A payload may stand where replies have it: beside `routed_experts_start`, in `meta_info`, `message` or `nvext`,
    /// in a choice, or in a reply with one choice.
    ///
    /// # Errors
    /// [`FormatError`] naming the field at fault.
    pub fn read(&self, value: &Value) -> Result<Option<ExpertRows>, FormatError> {
        let rows = match value {
            Value::Null => return Ok(None),
            Value::String(text) => self.read_text(text)?,
            Value::Array(rows) if matches!(self.format, None | Some(Format::List)) => {
                list::read(rows, self.start.unwrap_or(0), self.shape)?
            }
            Value::Object(fields) if fields.contains_key("data") => self.read_object(value)?,
            Value::Object(fields) => return self.read_around(fields),
            other => return Err(self.unlike(&other.to_string())),
        };
        Ok(Some(rows))
    }

    fn unlike(&self, found: &str) -> FormatError {
        let name = self.format.map_or("any format", Format::name);
        let shown: String = found.chars().take(60).collect();
        FormatError::new("format", format!("{shown} is not a payload of {name}"))
    }

    fn read_text(&self, text: &str) -> Result<ExpertRows, FormatError> {
        let format = self.format.unwrap_or(match text {
            _ if text.starts_with(nemo::PREFIX) => Format::Nemo,
            _ if text.starts_with(npy::TEXT_PREFIX) => Format::Npy,
            _ => Format::Sglang,
        });
        let start = self.start.unwrap_or(0);
        match format {
            Format::Nemo => nemo::read(text),
            Format::Npy => npy::read(text, start),
            Format::Sglang => sglang::read(text, start, self.shape),
            Format::Object | Format::List | Format::Skyrl => Err(self.unlike(text)),
        }
    }

    fn read_object(&self, value: &Value) -> Result<ExpertRows, FormatError> {
        let fields = ObjectFields::deserialize(value)
            .map_err(|error| FormatError::new("format", format!("the object form is malformed: {error}")))?;
        let is_skyrl = match (self.format, fields.start, fields.dtype.as_deref()) {
            (Some(format), ..) => format == Format::Skyrl,
            (None, Some(_), _) | (None, None, None) => false,
            (None, None, Some("uint8")) => self.bare_skyrl,
            (None, None, Some("uint16")) => false,
            (None, None, Some(_)) => true,
        };
        match self.format {
            None | Some(Format::Object | Format::Skyrl) => {}
            Some(_) => return Err(self.unlike("an object")),
        }
        if is_skyrl {
            let dtype = fields.dtype.ok_or_else(|| FormatError::new("dtype", "it is missing"))?;
            return skyrl::read(&fields.data, fields.shape, &dtype, self.start.unwrap_or(0));
        }
        fields.decode()
    }

    /// Looks for the payload within what surrounds it in a reply.
    fn read_around(&self, fields: &serde_json::Map<String, Value>) -> Result<Option<ExpertRows>, FormatError> {
        if let Some(payload) = fields.get("routed_experts") {
            let beside = ["routed_experts_start", "routed_experts_start_len"].iter().find_map(|name| fields.get(*name));
            let start = match beside.filter(|start| !start.is_null()) {
                None => self.start,
                Some(start) => {
                    let read = start.as_u64().and_then(|start| usize::try_from(start).ok());
                    let read = read.ok_or_else(|| FormatError::new("start", format!("it is {start}, no position")))?;
                    Some(read)
                }
            };
            // A start beside it says that the form has none of its own.
            let bare_skyrl = self.bare_skyrl || start.is_some();
            return Self { start, bare_skyrl, ..*self }.read(payload);
        }
        if let Some(Value::Array(choices)) = fields.get("choices") {
            return match &choices[..] {
                [Value::Object(choice)] => self.read_around(choice),
                _ => Err(FormatError::new("format", format!("the reply has {} choices; give one", choices.len()))),
            };
        }
        let inner = ["meta_info", "message", "nvext"].iter().find_map(|name| fields.get(*name));
        match inner {
            Some(Value::Object(inner)) => self.read_around(inner),
            _ => Err(FormatError::new("format", "there is neither data nor routed_experts in the object")),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: Value, import: Import) -> Result<Option<(usize, Vec<u8>)>, String> {
        let rows = import.read(&value).map_err(|error| error.to_string())?;
        Ok(rows.map(|rows| (rows.start(), rows.into_data())))
    }

    #[test]
    fn a_payload_is_found_where_replies_have_it() {
        let none = Import::default();
        let object = json!({"data": "AQI=", "shape": [1, 1, 2], "start": 7, "dtype": "uint8"});
        let expect = Ok(Some((7, vec![1, 2])));
        assert_eq!(read(object.clone(), none), expect);
        assert_eq!(read(json!({"routed_experts": object}), none), expect);
        assert_eq!(read(json!({"choices": [{"index": 0, "routed_experts": object}]}), none), expect);
        assert_eq!(read(json!({"nvext": {"routed_experts": object}}), none), expect);
        let list = json!([[[1, 2]]]);
        assert_eq!(read(json!({"routed_experts": list, "routed_experts_start": 7}), none), expect);
        assert_eq!(read(list, Import { start: Some(7), ..none }), expect);
        let flat = json!({"meta_info": {"routed_experts": "AQAAAAIAAAA=", "routed_experts_start_len": 7}});
        assert_eq!(read(flat.clone(), Import { shape: Some([1, 1, 2]), ..none }), expect);
        assert!(read(flat, none).is_err_and(|error| error.starts_with("shape:")));
        assert_eq!(read(json!({"routed_experts": null}), none), Ok(None));
    }

    #[test]
    fn an_object_without_a_start_is_refused_where_it_could_be_taken_for_0() {
        let bare = json!({"data": "AQI=", "shape": [1, 1, 2], "dtype": "uint8"});
        let none = Import::default();
        assert_eq!(read(bare.clone(), none), Err("start: it is missing".into()));
        assert_eq!(read(bare.clone(), Import { bare_skyrl: true, ..none }), Ok(Some((0, vec![1, 2]))));
        assert_eq!(read(json!({"routed_experts": bare, "routed_experts_start": 3}), none), Ok(Some((3, vec![1, 2]))));
        let without_dtype = json!({"data": "AQI=", "shape": [1, 1, 2]});
        assert!(read(without_dtype, Import { bare_skyrl: true, ..none }).is_err());
        let signed = json!({"data": "AQACAA==", "shape": [1, 1, 2], "dtype": "int16"});
        assert_eq!(read(signed, none), Ok(Some((0, vec![1, 2]))));
    }

    #[test]
    fn what_is_no_payload_is_refused() {
        let none = Import::default();
        for (value, expect) in [
            (json!(7), "format: 7 is not a payload"),
            (json!({"x": 1}), "neither data nor routed_experts"),
            (json!({"choices": []}), "the reply has 0 choices"),
            (json!([[1]]), "shape: row 0, layer 0 is 1, not a list"),
            (json!([[[1], [2]], [[1]]]), "shape: row 1 has 1 layers"),
            (json!([[[1], [2, 3]]]), "shape: row 0, layer 1 has 2 experts"),
            (json!([[[-1]]]), "data: -1 is no expert id"),
            (json!([[[70000]]]), "data: 70000 is no expert id"),
            (json!([[[1.5]]]), "data: 1.5 is no expert id"),
            (json!([]), "shape: an empty list has none"),
            (json!([[[]]]), "shape: it is [1, 1, 0]"),
            (json!({"data": 3, "shape": [1, 1, 1], "start": 0}), "format: the object form is malformed"),
            (json!({"data": "AA==", "shape": [1, 1, 1], "start": -1}), "format: the object form is malformed"),
        ] {
            let error = read(value, none).unwrap_err();
            assert!(error.contains(expect), "{error}");
        }
    }

    #[test]
    fn a_shape_beyond_any_model_is_refused() {
        let import = Import { shape: Some([usize::MAX; 3]), ..Import::default() };
        for value in [json!([]), json!(""), json!({"data": "", "shape": [0, 1u64 << 40, 1u64 << 40], "start": 0})] {
            let error = read(value, import).unwrap_err();
            assert!(error.starts_with("shape:") || error.starts_with("data:"), "{error}");
        }
    }
}
