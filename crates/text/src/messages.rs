//! OpenAI messages made into what templates expect.

use serde_json::{Map, Value};

use crate::error::ChatError;

/// The names under which reasoning has been passed; templates read the first, gpt-oss the second.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Checks messages and normalises them: text parts become one string, JSON tool arguments become objects, and
/// reasoning is found under the name that templates use.
pub(crate) fn normalise(messages: &[Value]) -> Result<Vec<Value>, ChatError> {
    if messages.is_empty() {
        return Err(refuse("messages".into(), "messages is empty; give at least one".into()));
    }
    messages.iter().enumerate().map(|(index, message)| normalise_one(index, message).map(Value::Object)).collect()
}

fn normalise_one(index: usize, message: &Value) -> Result<Map<String, Value>, ChatError> {
    let at = format!("messages[{index}]");
    let Value::Object(fields) = message else {
        return Err(refuse(at.clone(), format!("{at} must be an object; it is {message}")));
    };
    if !fields.get("role").is_some_and(Value::is_string) {
        let role = fields.get("role").unwrap_or(&Value::Null);
        return Err(refuse(format!("{at}.role"), format!("{at}.role must be a string; it is {role}")));
    }
    let mut fields = fields.clone();
    let content = flatten(&format!("{at}.content"), fields.get("content"))?;
    fields.insert("content".into(), content);
    parse_tool_arguments(&at, &mut fields)?;
    let reasoning = REASONING.iter().find_map(|name| fields.get(*name).filter(|text| !text.is_null()).cloned());
    if let Some(reasoning) = reasoning {
        fields.entry("thinking").or_insert_with(|| reasoning.clone());
        fields.insert("reasoning_content".into(), reasoning);
    }
    Ok(fields)
}

/// The text of a content field: a string, nothing, or a list of text parts joined by line breaks, as vLLM does.
fn flatten(at: &str, content: Option<&Value>) -> Result<Value, ChatError> {
    let parts = match content {
        None | Some(Value::Null) => return Ok(Value::Null),
        Some(text @ Value::String(_)) => return Ok(text.clone()),
        Some(Value::Array(parts)) => parts,
        Some(other) => {
            let message = format!("{at} must be a string or a list of parts; it is {other}");
            return Err(refuse(at.into(), message));
        }
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (index, part) in parts.iter().enumerate() {
        let at = format!("{at}[{index}]");
        let text = match (part, part.get("type").and_then(Value::as_str)) {
            (Value::String(text), _) => text.as_str(),
            (_, Some("text" | "input_text" | "output_text")) => match part.get("text").and_then(Value::as_str) {
                Some(text) => text,
                None => return Err(refuse(format!("{at}.text"), format!("{at}.text must be a string"))),
            },
            (_, Some(kind)) => {
                let message = format!("{at} is of type {kind:?}; this server takes text parts only");
                return Err(refuse(format!("{at}.type"), message));
            }
            _ => return Err(refuse(at.clone(), format!("{at} must be an object with a type; it is {part}"))),
        };
        texts.push(text);
    }
    Ok(Value::String(texts.join("\n")))
}

/// The API carries a call's arguments as JSON text, templates loop over them as an object.
fn parse_tool_arguments(at: &str, fields: &mut Map<String, Value>) -> Result<(), ChatError> {
    let calls = match fields.get_mut("tool_calls") {
        // Templates test whether the key is there, not whether it holds something.
        Some(Value::Null) => {
            fields.remove("tool_calls");
            return Ok(());
        }
        Some(Value::Array(calls)) => calls,
        _ => return Ok(()),
    };
    for (index, call) in calls.iter_mut().enumerate() {
        let Some(arguments) = call.get_mut("function").and_then(|function| function.get_mut("arguments")) else {
            continue;
        };
        let Value::String(text) = arguments else { continue };
        let parsed = if text.trim().is_empty() { Ok(Value::Object(Map::new())) } else { serde_json::from_str(text) };
        *arguments = parsed.map_err(|error| {
            let param = format!("{at}.tool_calls[{index}].function.arguments");
            let message = format!("{param} must be JSON text; {text:?} is not: {error}");
            refuse(param, message)
        })?;
    }
    Ok(())
}

fn refuse(param: String, message: String) -> ChatError {
    ChatError::Message { param, message }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(message: Value, expect: Result<Value, (&str, &str)>) {
        match (normalise(&[message]), expect) {
            (Ok(found), Ok(expect)) => assert_eq!(found, vec![expect]),
            (Err(error), Err((param, part))) => {
                assert_eq!(error.param(), param);
                assert!(error.to_string().contains(part), "{error}");
            }
            (found, expect) => panic!("{found:?} is not {expect:?}"),
        }
    }

    #[test]
    fn content_becomes_one_string() {
        check(json!({"role": "user", "content": "a"}), Ok(json!({"role": "user", "content": "a"})));
        let parts = json!([{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}]);
        check(json!({"role": "user", "content": parts}), Ok(json!({"role": "user", "content": "a\nb\nc"})));
        check(json!({"role": "assistant"}), Ok(json!({"role": "assistant", "content": null})));
    }

    #[test]
    fn what_is_no_text_is_named() {
        let image = json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]});
        check(image, Err(("messages[0].content[0].type", "\"image_url\"")));
        check(json!({"role": "user", "content": 7}), Err(("messages[0].content", "it is 7")));
        check(json!({"role": "user", "content": [7]}), Err(("messages[0].content[0]", "it is 7")));
        check(json!({"role": "user", "content": [{"type": "text"}]}), Err(("messages[0].content[0].text", "string")));
        check(json!({"content": "a"}), Err(("messages[0].role", "null")));
        check(json!("a"), Err(("messages[0]", "it is \"a\"")));
    }

    #[test]
    fn tool_arguments_are_parsed() {
        let call = |arguments: Value| json!({"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]});
        check(call(json!("{\"x\": 1}")), Ok(call(json!({"x": 1}))));
        check(call(json!("")), Ok(call(json!({}))));
        check(call(json!("{x")), Err(("messages[0].tool_calls[0].function.arguments", "\"{x\"")));
    }

    #[test]
    fn reasoning_is_found_under_every_name() {
        let found = normalise(&[json!({"role": "assistant", "content": "a", "reasoning": "r"})]).expect("valid");
        assert_eq!(found[0]["reasoning_content"], "r");
        assert_eq!(found[0]["thinking"], "r");
    }
}
