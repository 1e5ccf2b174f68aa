//! `/openapi.json`: what this server answers to.

use serde_json::{Map, Value, json};

use crate::body::write;
use crate::rows::RowsFormat;

/// Method, path, what it does, the schema of its body and of its answer.
type Route = (&'static str, &'static str, &'static str, Option<&'static str>, Option<&'static str>);

const ROUTES: [Route; 26] = [
    ("get", "/health", "200 while requests are taken", None, None),
    ("get", "/ping", "as /health", None, None),
    ("post", "/ping", "as /health", None, None),
    ("get", "/version", "the server's version", None, None),
    ("get", "/metrics", "Prometheus metrics", None, None),
    ("get", "/openapi.json", "this description", None, None),
    ("get", "/v1/models", "the model served, with max_model_len", None, None),
    ("get", "/v1/models/{id}", "one model", None, None),
    ("post", "/v1/completions", "OpenAI completions", Some("CompletionRequest"), Some("Completion")),
    ("post", "/v1/chat/completions", "OpenAI chat completions", Some("ChatRequest"), Some("Completion")),
    ("post", "/inference/v1/generate", "tokens in, tokens out (vLLM)", Some("GenerateRequest"), Some("Generation")),
    ("post", "/generate", "SGLang's native endpoint", Some("SglangRequest"), None),
    ("put", "/generate", "SGLang's native endpoint", Some("SglangRequest"), None),
    ("post", "/inference/v1/abort_requests", "end live requests", Some("AbortRequest"), None),
    ("post", "/abort_requests", "end live requests", Some("AbortRequest"), None),
    ("post", "/tokenize", "text or conversation to token ids", None, None),
    ("post", "/detokenize", "token ids to text", None, None),
    ("post", "/pause", "stop computing: mode=abort|wait|keep, clear_cache=true|false", Some("PauseRequest"), None),
    ("post", "/resume", "end a pause", None, None),
    ("get", "/is_paused", "whether the engine is paused", None, None),
    ("post", "/reset_prefix_cache", "forget cached KV; live requests are computed again", None, None),
    ("get", "/flush_cache", "as /reset_prefix_cache (SGLang)", None, None),
    ("post", "/flush_cache", "as /reset_prefix_cache (SGLang)", None, None),
    ("post", "/update_weights", "serve the weights of another folder", Some("UpdateRequest"), None),
    ("get", "/server_info", "what is served, and within which limits", None, None),
    ("get", "/get_server_info", "as /server_info (SGLang)", None, None),
];

/// The description as JSON.
pub fn openapi() -> Vec<u8> {
    let mut paths = Map::new();
    for (method, path, summary, request, answer) in ROUTES {
        let schema =
            |name: &str| json!({"application/json": {"schema": {"$ref": format!("#/components/schemas/{name}")}}});
        let mut ok = json!({"description": "done"});
        if let Some(answer) = answer {
            ok["content"] = schema(answer);
        }
        let refusal = json!({"description": "refused", "content": schema("Error")});
        let mut operation = json!({"summary": summary, "responses": {"200": ok, "default": refusal}});
        if let Some(request) = request {
            operation["requestBody"] = json!({"content": schema(request)});
        }
        paths.entry(path).or_insert_with(|| json!({}))[method] = operation;
    }
    write(&json!({
        "openapi": "3.1.0",
        "info": {"title": "moetrail", "version": env!("CARGO_PKG_VERSION")},
        "paths": paths,
        "components": {"schemas": schemas()},
    }))
}

/// The fields that every generation request may have, with those of one endpoint.
fn request(own: Value, required: &[&str]) -> Value {
    let mut properties = json!({
        "model": {"type": "string"},
        "request_id": {"type": "string"},
        "stream": {"type": "boolean"},
        "stream_options": {"type": "object"},
        "cache_salt": {"type": "string", "minLength": 1, "maxLength": 1024},
        "priority": {"type": "integer"},
        "return_routed_experts": {"type": "boolean"},
        "routed_experts_prompt_start": {"type": "integer", "minimum": 0},
        "routed_experts_format": {"enum": RowsFormat::NAMES},
        "routed_experts_stream": {"enum": ["final", "delta"]},
        "routed_experts_replay": {"$ref": "#/components/schemas/Rows"},
        "kv_transfer_params": {"type": "object"},
    });
    if let (Value::Object(all), Value::Object(own)) = (&mut properties, own) {
        all.extend(own);
    }
    json!({"type": "object", "required": required, "properties": properties})
}

fn schemas() -> Value {
    let ids = json!({"type": "array", "items": {"type": "integer", "minimum": 0}});
    let sampling = json!({
        "n": {"type": "integer", "minimum": 1}, "max_tokens": {"type": "integer", "minimum": 0},
        "min_tokens": {"type": "integer", "minimum": 0}, "temperature": {"type": "number", "minimum": 0},
        "top_p": {"type": "number"}, "top_k": {"type": "integer"}, "min_p": {"type": "number"},
        "seed": {"type": "integer"}, "stop": {}, "stop_token_ids": ids, "ignore_eos": {"type": "boolean"},
        "repetition_penalty": {"type": "number"}, "presence_penalty": {"type": "number"},
        "frequency_penalty": {"type": "number"}, "logit_bias": {"type": "object"}, "allowed_token_ids": ids,
        "logprobs": {}, "prompt_logprobs": {"type": "integer", "minimum": 0},
    });
    let openai = |own: Value, required: &[&str]| {
        let mut fields = sampling.clone();
        if let (Value::Object(fields), Value::Object(own)) = (&mut fields, own) {
            fields.extend(own);
        }
        request(fields, required)
    };
    let choice = json!({"type": "object", "properties": {
        "index": {"type": "integer"}, "finish_reason": {"enum": ["stop", "length", "abort", null]},
        "token_ids": ids, "routed_experts": {}, "routed_experts_start": {"type": "integer"},
        "routed_experts_error": {"type": "object"}, "routed_experts_recomputed": {"type": "boolean"},
        "weight_versions": {"type": "array"},
    }});
    let answer = json!({"type": "object", "properties": {
        "choices": {"type": "array", "items": choice}, "usage": {"type": "object"}, "nvext": {"type": "object"},
        "routed_experts_replay_stats": {"type": "object"},
    }});
    let settings = json!({"type": "object", "properties": sampling});
    json!({
        "Rows": {"type": "object", "required": ["data", "shape", "start"], "properties": {
            "data": {"type": "string", "contentEncoding": "base64"}, "shape": {"type": "array", "minItems": 3, "maxItems": 3},
            "start": {"type": "integer", "minimum": 0}, "dtype": {"enum": ["uint8", "uint16"]},
        }},
        "CompletionRequest": openai(json!({"prompt": {}, "echo": {"type": "boolean"}, "nvext": {"type": "object"}}), &["prompt"]),
        "ChatRequest": openai(json!({"messages": {"type": "array"}, "nvext": {"type": "object"}}), &["messages"]),
        "GenerateRequest": request(json!({"token_ids": ids, "sampling_params": settings}), &["token_ids"]),
        "SglangRequest": request(json!({
            "text": {}, "input_ids": {}, "sampling_params": settings, "rid": {"type": "string"},
            "return_logprob": {"type": "boolean"}, "logprob_start_len": {"type": "integer"},
            "top_logprobs_num": {"type": "integer"}, "routed_experts_start_len": {"type": "integer", "minimum": 0},
        }), &[]),
        "Completion": answer,
        "Generation": answer,
        "AbortRequest": {"type": "object", "properties": {"request_ids": {"type": "array", "items": {"type": "string"}}}},
        "PauseRequest": {"type": "object", "properties": {
            "mode": {"enum": ["abort", "wait", "keep"]}, "clear_cache": {"type": "boolean"},
        }},
        "UpdateRequest": {"type": "object", "required": ["path"], "properties": {
            "path": {"type": "string"}, "weight_version": {"type": ["string", "number"]},
        }},
        "Error": {"type": "object", "properties": {"error": {"type": "object", "properties": {
            "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]},
            "code": {"type": "integer"},
        }}}},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_schema_that_is_named_is_there() {
        let text = String::from_utf8(openapi()).expect("UTF-8");
        let value: Value = serde_json::from_str(&text).expect("JSON");
        for reference in text.split("#/components/schemas/").skip(1) {
            let name = &reference[..reference.find('"').expect("a closing quote")];
            assert!(value["components"]["schemas"][name].is_object(), "{name}");
        }
        assert_eq!(value["paths"]["/generate"].as_object().map(Map::len), Some(2));
    }
}
