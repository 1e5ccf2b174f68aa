//! `nvext`: Dynamo's extension of OpenAI's requests.

use serde::Deserialize;
use serde_json::Value;

use crate::body::{Object, read};
use crate::error::ApiError;

const ROWS: &str = "routed_experts";

/// The fields that mean something here.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Fields {
    routed_experts_prompt_start: Option<i64>,
    extra_fields: Option<Vec<String>>,
    cache_salt: Option<String>,
    agent_hints: Option<Object<AgentHints>>,
    // These would change the answer.
    token_data: Option<Value>,
    backend_instance_id: Option<Value>,
    use_raw_prompt: Option<bool>,
    greed_sampling: Option<bool>,
    max_thinking_tokens: Option<Value>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct AgentHints {
    priority: Option<i64>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Outer {
    nvext: Option<Object<Fields>>,
}

/// What `nvext` asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Nvext {
    /// The start, under its name.
    pub(crate) start: Option<(i64, &'static str)>,
    /// Whether rows are to come in `nvext`.
    pub(crate) wants_rows: bool,
    pub(crate) cache_salt: Option<String>,
    pub(crate) priority: Option<i64>,
}

impl Nvext {
    /// Reads it; refuses what this server would have to ignore.
    pub(crate) fn read(body: &[u8]) -> Result<Self, ApiError> {
        let Some(Object(fields)) = read::<Outer>(body)?.nvext else { return Ok(Self::default()) };
        let refused = [
            ("token_data", fields.token_data.is_some()),
            ("backend_instance_id", fields.backend_instance_id.is_some()),
            ("use_raw_prompt", fields.use_raw_prompt == Some(true)),
            ("greed_sampling", fields.greed_sampling == Some(true)),
            ("max_thinking_tokens", fields.max_thinking_tokens.is_some()),
        ];
        if let Some((name, _)) = refused.iter().find(|(_, given)| *given) {
            let param = format!("nvext.{name}");
            let message = format!("{param} is not supported by this server");
            return Err(ApiError::invalid(param, message));
        }
        let extra = fields.extra_fields.unwrap_or_default();
        if let Some(other) = extra.iter().find(|name| *name != ROWS) {
            let message = format!("nvext.extra_fields names {other:?}; this server has {ROWS:?}");
            return Err(ApiError::invalid("nvext.extra_fields", message));
        }
        Ok(Self {
            start: fields.routed_experts_prompt_start.map(|start| (start, "nvext.routed_experts_prompt_start")),
            wants_rows: !extra.is_empty(),
            cache_salt: fields.cache_salt,
            priority: fields.agent_hints.and_then(|Object(hints)| hints.priority),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_it_asks_for_and_what_it_may_not() {
        let read = |nvext: &str| Nvext::read(format!(r#"{{"nvext":{nvext}}}"#).as_bytes());
        assert_eq!(read("null"), Ok(Nvext::default()));
        let asked = read(
            r#"{"extra_fields":["routed_experts"],"routed_experts_prompt_start":3,"cache_salt":"s","agent_hints":{"priority":2}}"#,
        );
        let expect = Nvext {
            start: Some((3, "nvext.routed_experts_prompt_start")),
            wants_rows: true,
            cache_salt: Some("s".into()),
            priority: Some(2),
        };
        assert_eq!(asked, Ok(expect));
        for (nvext, param) in [
            (r#"{"extra_fields":["engine_data"]}"#, "nvext.extra_fields"),
            (r#"{"token_data":[1]}"#, "nvext.token_data"),
            (r#"{"greed_sampling":true}"#, "nvext.greed_sampling"),
            (r#"{"routed_experts_prompt_start":true}"#, "nvext.routed_experts_prompt_start"),
            ("[1]", "nvext"),
        ] {
            let error = read(nvext).expect_err(nvext);
            assert_eq!((error.status, error.param.as_deref()), (400, Some(param)));
        }
    }
}
