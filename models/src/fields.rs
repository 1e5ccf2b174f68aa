//! A JSON object whose every wrong value is reported with its file and key.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{ModelError, Result};

/// Typed access to the keys of a JSON object; `null` counts as absent, as in transformers.
#[derive(Debug, Clone)]
pub(crate) struct Fields {
    path: PathBuf,
    prefix: String,
    map: Map<String, Value>,
}

impl Fields {
    /// Reads a file that holds one JSON object.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|source| ModelError::Io { path: path.to_owned(), source })?;
        Self::parse(path, &text)
    }

    /// Parses a JSON object; `path` is only for messages.
    pub(crate) fn parse(path: &Path, text: &str) -> Result<Self> {
        let value: Value =
            serde_json::from_str(text).map_err(|source| ModelError::Json { path: path.to_owned(), source })?;
        match value {
            Value::Object(map) => Ok(Self { path: path.to_owned(), prefix: String::new(), map }),
            other => Err(ModelError::Config {
                path: path.to_owned(),
                key: "(the whole file)".into(),
                expected: "a JSON object".into(),
                found: shown(Some(&other)),
            }),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The value under `key`, unless it is absent or `null`.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// The error for `key`, showing what is there.
    pub(crate) fn wrong(&self, key: &str, expected: impl Into<String>) -> ModelError {
        ModelError::Config {
            path: self.path.clone(),
            key: format!("{}{key}", self.prefix),
            expected: expected.into(),
            found: shown(self.get(key)),
        }
    }

    /// A nested object, `None` when absent or empty.
    pub(crate) fn object(&self, key: &str) -> Result<Option<Fields>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) if map.is_empty() => Ok(None),
            Some(Value::Object(map)) => {
                Ok(Some(Fields { path: self.path.clone(), prefix: format!("{}{key}.", self.prefix), map: map.clone() }))
            }
            Some(_) => Err(self.wrong(key, "an object")),
        }
    }

    /// An integer in `1..=max`.
    pub(crate) fn size(&self, key: &str, max: usize) -> Result<usize> {
        self.size_opt(key, max)?.ok_or_else(|| self.wrong(key, format!("an integer in 1..={max}")))
    }

    /// An integer in `1..=max`, or nothing.
    pub(crate) fn size_opt(&self, key: &str, max: usize) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match integer(value) {
            Some(n) if (1..=max as u64).contains(&n) => Ok(Some(n as usize)),
            _ => Err(self.wrong(key, format!("an integer in 1..={max}"))),
        }
    }

    /// An integer in `0..=max` under the first of `keys` that is there.
    pub(crate) fn count_of(&self, keys: &[&str], max: usize) -> Result<usize> {
        let expected = format!("an integer in 0..={max}");
        let Some(key) = keys.iter().find(|key| self.get(key).is_some()) else {
            return Err(self.wrong(&keys.join("|"), expected));
        };
        match self.get(key).and_then(integer) {
            Some(n) if n <= max as u64 => Ok(n as usize),
            _ => Err(self.wrong(key, expected)),
        }
    }

    /// A finite number, or nothing.
    pub(crate) fn number_opt(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_f64().filter(|x| x.is_finite()) {
                Some(x) => Ok(Some(x)),
                None => Err(self.wrong(key, "a finite number")),
            },
        }
    }

    /// A number above zero, or nothing.
    pub(crate) fn positive_opt(&self, key: &str) -> Result<Option<f64>> {
        match self.number_opt(key)? {
            Some(x) if x <= 0.0 => Err(self.wrong(key, "a number above 0")),
            x => Ok(x),
        }
    }

    pub(crate) fn bool_or(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(_) => Err(self.wrong(key, "true or false")),
        }
    }

    pub(crate) fn text_opt(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(_) => Err(self.wrong(key, "a string")),
        }
    }

    /// A list of strings; absent is empty.
    pub(crate) fn texts(&self, key: &str) -> Result<Vec<String>> {
        let Some(value) = self.get(key) else {
            return Ok(Vec::new());
        };
        let list = value.as_array().and_then(|list| list.iter().map(|v| v.as_str().map(str::to_owned)).collect());
        list.ok_or_else(|| self.wrong(key, "a list of strings"))
    }

    /// One integer or a list of them, each below `limit`; absent is empty.
    pub(crate) fn ids(&self, key: &str, limit: u64) -> Result<Vec<u32>> {
        let Some(value) = self.get(key) else {
            return Ok(Vec::new());
        };
        let limit = limit.min(1 << 32);
        let one = |v: &Value| integer(v).filter(|&n| n < limit).map(|n| n as u32);
        let ids = match value {
            Value::Array(list) => list.iter().map(one).collect(),
            value => one(value).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.wrong(key, format!("integers in 0..{limit}")))
    }
}

/// Integers may be written as `8` or `8.0`.
fn integer(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| {
        let x = value.as_f64()?;
        (x >= 0.0 && x.fract() == 0.0 && x < 9e15).then_some(x as u64)
    })
}

/// A value as a message shows it, cut where it is long.
fn shown(value: Option<&Value>) -> String {
    let Some(value) = value else {
        return "nothing".into();
    };
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
