//! Writing JSON bodies, and reading them so that every error names the parameter at fault.
//!
//! Each concern (sampling, rows, the endpoint's own fields) reads the same body for itself and ignores what is not
//! its own. That keeps paths exact, which `#[serde(flatten)]` does not, and reading JSON twice is cheap.

use std::marker::PhantomData;
use std::{fmt, io};

use serde::Serialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde_json::ser::Formatter;

use crate::error::ApiError;
use crate::rows_reply::Payloads;

/// Reads a body that must be an object.
pub(crate) fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let Object(value) = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        refuse(path, &error.into_inner())
    })?;
    json.end().map_err(|error| refuse(".".into(), &error))?;
    Ok(value)
}

/// Writes a body. Ours consist of strings, numbers and lists, which always serialise.
pub(crate) fn write(body: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(body).expect("strings, numbers and lists always serialise")
}

/// Writes a body that names payloads, which are encoded straight into it.
pub(crate) fn write_with(body: &impl Serialize, payloads: &Payloads) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(payloads.size() + 1024);
    let mut json = serde_json::Serializer::with_formatter(&mut bytes, WithPayloads(payloads));
    body.serialize(&mut json).expect("strings, numbers and lists always serialise, and every payload has its number");
    bytes
}

/// Compact JSON in which a number of 128 bits stands for a payload.
struct WithPayloads<'a>(&'a Payloads);

impl Formatter for WithPayloads<'_> {
    fn write_u128<W: io::Write + ?Sized>(&mut self, mut writer: &mut W, value: u128) -> io::Result<()> {
        self.0.write(value, &mut writer)
    }
}

fn refuse(path: String, error: &serde_json::Error) -> ApiError {
    if !error.is_data() {
        return ApiError::new(400, format!("the body is not valid JSON: {error}"));
    }
    // The root's path is a dot.
    if path == "." {
        return ApiError::new(400, format!("the body is malformed: {error}"));
    }
    let message = format!("{path}: {error}");
    ApiError::invalid(path, message)
}

/// A value that must be written as an object; derived structs alone would take an array, field by field.
#[derive(Debug, Clone, Default)]
pub(crate) struct Object<T>(pub(crate) T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OnlyMap<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for OnlyMap<T> {
            type Value = T;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map))
            }
        }

        deserializer.deserialize_map(OnlyMap(PhantomData)).map(Object)
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Default, Deserialize)]
    #[serde(default)]
    struct Inner {
        count: Option<i64>,
    }

    #[derive(Debug, Deserialize)]
    struct Outer {
        inner: Option<Object<Inner>>,
        ids: Option<Vec<u32>>,
    }

    fn check(body: &str, param: Option<&str>, part: &str) {
        let error = read::<Outer>(body.as_bytes()).expect_err("malformed");
        assert_eq!((error.status, error.param.as_deref()), (400, param), "{error}");
        assert!(error.message.contains(part), "{error}");
    }

    #[test]
    fn errors_name_the_path_and_the_value() {
        check(r#"{"inner":{"count":true}}"#, Some("inner.count"), "boolean `true`");
        check(r#"{"inner":{"count":1.0}}"#, Some("inner.count"), "floating point `1.0`");
        check(r#"{"inner":[1]}"#, Some("inner"), "expected an object");
        check(r#"{"ids":[1,-2]}"#, Some("ids[1]"), "-2");
        check("[1]", None, "expected an object");
        check("{", None, "not valid JSON");
        check("{} x", None, "not valid JSON");
    }

    #[test]
    fn null_is_absent_and_unknown_fields_are_ignored() {
        let outer: Outer = read(br#"{"inner":null,"ids":[7],"other":{"a":[1]}}"#).expect("well-formed");
        assert!(outer.inner.is_none());
        assert_eq!(outer.ids, Some(vec![7]));
        let outer: Outer = read(br#"{"inner":{"count":null}}"#).expect("well-formed");
        assert_eq!(outer.inner.expect("an object").0.count, None);
    }
}
