//! What operators send, and what they are told.

use std::path::PathBuf;

use moetrail_engine::{ControlError, EngineInfo, PauseMode};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::body::{read, write};
use crate::error::ApiError;

/// `/pause`: vLLM aborts and clears by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PauseOrder {
    /// What becomes of live requests.
    pub mode: PauseMode,
    /// Whether the cache is reset.
    pub clear_cache: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct PauseFields {
    mode: Option<String>,
    clear_cache: Option<bool>,
}

/// Reads the order from the query, where vLLM has it, or from a body of the same names.
///
/// # Errors
/// A 400 naming the parameter.
pub fn pause_order(query: &[(String, String)], body: &[u8]) -> Result<PauseOrder, ApiError> {
    let mut fields: PauseFields = if body.is_empty() { PauseFields::default() } else { read(body)? };
    for (name, value) in query {
        match name.as_str() {
            "mode" => fields.mode = Some(value.clone()),
            "clear_cache" => fields.clear_cache = Some(flag(name, value)?),
            _ => {}
        }
    }
    let mode = match fields.mode.as_deref() {
        None => PauseMode::Abort,
        Some(name) => PauseMode::from_name(name)
            .ok_or_else(|| ApiError::invalid("mode", format!("mode is {name:?}; it is one of abort, wait and keep")))?,
    };
    Ok(PauseOrder { mode, clear_cache: fields.clear_cache.unwrap_or(true) })
}

fn flag(name: &str, value: &str) -> Result<bool, ApiError> {
    match value.to_ascii_lowercase().as_str() {
        "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        _ => Err(ApiError::invalid(name, format!("{name} is {value:?}; it is true or false"))),
    }
}

/// `/update_weights`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpdateOrder {
    /// The checkpoint's folder.
    pub path: PathBuf,
    /// What the weights are to be called.
    pub version: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct UpdateFields {
    path: Option<String>,
    weight_version: Option<Value>,
}

/// Reads the order.
///
/// # Errors
/// A 400 naming the parameter.
pub fn update_order(body: &[u8]) -> Result<UpdateOrder, ApiError> {
    let fields: UpdateFields = read(body)?;
    let path = fields.path.filter(|path| !path.is_empty());
    let path = path.ok_or_else(|| ApiError::invalid("path", "path is missing: the folder of the new checkpoint"))?;
    let version = match fields.weight_version {
        None => None,
        Some(Value::String(version)) => Some(version),
        Some(Value::Number(version)) => Some(version.to_string()),
        Some(other) => {
            let message = format!("weight_version is {other}; it is a string or a number");
            return Err(ApiError::invalid("weight_version", message));
        }
    };
    Ok(UpdateOrder { path: path.into(), version })
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct AbortFields {
    request_ids: Option<Vec<String>>,
}

/// Reads `/inference/v1/abort_requests`: the names of requests, or `None` for all of them.
///
/// # Errors
/// A 400 naming the parameter.
pub fn abort_order(body: &[u8]) -> Result<Option<Vec<String>>, ApiError> {
    let fields: AbortFields = if body.is_empty() { AbortFields::default() } else { read(body)? };
    Ok(fields.request_ids.filter(|names| !names.is_empty()))
}

impl From<ControlError> for ApiError {
    fn from(error: ControlError) -> Self {
        match error {
            ControlError::Closed => Self::new(503, error.to_string()),
            // Whatever is wrong with the weights, the folder that was named has them.
            _ => Self::invalid("path", error.to_string()),
        }
    }
}

/// What an operator is told once an order has been carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Done {
    /// Nothing runs any more.
    Paused,
    /// The engine computes again.
    Resumed,
    /// Whether the engine is paused.
    IsPaused(bool),
    /// Nothing is cached any more.
    CacheReset,
    /// Weights of that version serve.
    Updated(String),
    /// So many requests were ended.
    Aborted(usize),
}

impl Done {
    /// The JSON body.
    pub fn to_json(&self) -> Vec<u8> {
        write(&match self {
            Self::Paused => json!({"status": "paused"}),
            Self::Resumed => json!({"status": "resumed"}),
            Self::IsPaused(paused) => json!({"is_paused": paused}),
            Self::CacheReset => json!({"success": true}),
            Self::Updated(version) => {
                json!({"success": true, "message": "the weights were updated", "weight_version": version})
            }
            Self::Aborted(count) => json!({"aborted": count}),
        })
    }
}

/// `/server_info`: what is served, and within which limits.
pub fn server_info(info: &EngineInfo, weight_version: &str, paused: bool) -> Vec<u8> {
    let rows = info
        .row_layout
        .map(|layout| json!({"num_layers": layout.num_layers, "top_k": layout.top_k, "dtype": layout.dtype.name()}));
    write(&json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model": info.model_name,
        "model_path": info.model_name,
        "served_model_name": info.model_name,
        "weight_version": weight_version,
        "is_paused": paused,
        "max_model_len": info.max_model_len,
        "max_num_seqs": info.max_num_seqs,
        "vocab_size": info.vocab_size,
        "block_size": info.block_size,
        "num_gpu_blocks": info.num_blocks,
        "capture": info.row_layout.is_some(),
        "enable_return_routed_experts": info.return_routed_experts,
        "routed_experts": rows,
        "num_experts": info.routing.as_ref().map(|routing| routing.num_experts),
        "moe_layers": info.routing.as_ref().map(|routing| &routing.moe_layers),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_read_from_query_and_body() {
        let query = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
            pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
        };
        let order = |mode, clear_cache| Ok(PauseOrder { mode, clear_cache });
        assert_eq!(pause_order(&[], b""), order(PauseMode::Abort, true));
        let given = query(&[("mode", "keep"), ("clear_cache", "False")]);
        assert_eq!(pause_order(&given, b""), order(PauseMode::Keep, false));
        assert_eq!(pause_order(&[], br#"{"mode":"wait","clear_cache":false}"#), order(PauseMode::Wait, false));
        let refused = |query: &[(String, String)], body: &[u8], param: &str| {
            let error = pause_order(query, body).expect_err(param);
            assert_eq!((error.status, error.param.as_deref()), (400, Some(param)));
        };
        refused(&query(&[("mode", "sleep")]), b"", "mode");
        refused(&query(&[("clear_cache", "maybe")]), b"", "clear_cache");
        refused(&[], br#"{"clear_cache":"yes"}"#, "clear_cache");
    }

    #[test]
    fn updates_and_aborts_are_read() {
        let update = |body: &str| update_order(body.as_bytes()).map(|order| order.version);
        assert_eq!(update(r#"{"path":"/w"}"#), Ok(None));
        assert_eq!(update(r#"{"path":"/w","weight_version":7}"#), Ok(Some("7".into())));
        assert_eq!(update(r#"{"path":"/w","weight_version":"step-7"}"#), Ok(Some("step-7".into())));
        assert!(update("{}").is_err_and(|error| error.param.as_deref() == Some("path")));
        assert!(update(r#"{"path":"/w","weight_version":[1]}"#).is_err_and(|e| e.message.contains("[1]")));
        assert_eq!(abort_order(b""), Ok(None));
        assert_eq!(abort_order(br#"{"request_ids":[]}"#), Ok(None));
        assert_eq!(abort_order(br#"{"request_ids":["a"]}"#), Ok(Some(vec!["a".into()])));
    }
}
