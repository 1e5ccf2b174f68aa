//! `/tokenize` and `/detokenize`, in vLLM's shapes.

use std::sync::Arc;

use moetrail_engine::EngineInfo;
use moetrail_text::Tokenizer;
use serde::{Deserialize, Serialize};

use crate::accept::check_model;
use crate::body::{read, write};
use crate::chat::Conversation;
use crate::error::ApiError;

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct TokenizeFields {
    model: Option<String>,
    prompt: Option<String>,
    add_special_tokens: Option<bool>,
    return_token_strs: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct DetokenizeFields {
    model: Option<String>,
    tokens: Option<Vec<u32>>,
}

#[derive(Serialize)]
struct Tokens {
    count: usize,
    max_model_len: usize,
    tokens: Vec<u32>,
    token_strs: Option<Vec<String>>,
}

#[derive(Serialize)]
struct Text {
    prompt: String,
}

/// The body of `POST /tokenize`, for a `prompt` or for `messages`.
///
/// # Errors
/// A 400 naming the parameter, or a 404 for an unknown model.
pub fn tokenize(body: &[u8], info: &EngineInfo) -> Result<Vec<u8>, ApiError> {
    let fields: TokenizeFields = read(body)?;
    check_model(fields.model.as_deref(), info)?;
    let tokenizer = tokenizer(info)?;
    let conversation: Conversation = read(body)?;
    let tokens = match (&fields.prompt, &conversation.messages) {
        (Some(prompt), None) => tokenizer.encode(prompt, fields.add_special_tokens.unwrap_or(true))?,
        (None, Some(_)) => conversation.tokenize(info)?,
        (None, None) => return Err(ApiError::invalid("prompt", "give a prompt or messages; both are missing")),
        (Some(_), Some(_)) => return Err(ApiError::invalid("prompt", "give a prompt or messages, not both")),
    };
    let spelled = |id: &u32| tokenizer.token(*id).unwrap_or_default();
    let token_strs = fields.return_token_strs.unwrap_or(false).then(|| tokens.iter().map(spelled).collect());
    Ok(write(&Tokens { count: tokens.len(), max_model_len: info.max_model_len, tokens, token_strs }))
}

/// The body of `POST /detokenize`.
///
/// # Errors
/// A 400 naming the parameter, or a 404 for an unknown model.
pub fn detokenize(body: &[u8], info: &EngineInfo) -> Result<Vec<u8>, ApiError> {
    let fields: DetokenizeFields = read(body)?;
    check_model(fields.model.as_deref(), info)?;
    let tokens = fields.tokens.ok_or_else(|| ApiError::invalid("tokens", "tokens is missing"))?;
    if let Some(at) = tokens.iter().position(|id| *id as usize >= info.vocab_size) {
        let message = format!("token id {} is not below the vocabulary size {}", tokens[at], info.vocab_size);
        return Err(ApiError::invalid(format!("tokens[{at}]"), message));
    }
    Ok(write(&Text { prompt: tokenizer(info)?.decode(&tokens, false) }))
}

fn tokenizer(info: &EngineInfo) -> Result<&Arc<Tokenizer>, ApiError> {
    info.tokenizer.as_ref().ok_or_else(|| ApiError::new(400, "the checkpoint has no tokenizer"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;

    fn check(found: Result<Vec<u8>, ApiError>, expect: Result<&str, (Option<&str>, &str)>) {
        match (found, expect) {
            (Ok(body), Ok(expect)) => assert_eq!(String::from_utf8_lossy(&body), expect),
            (Err(error), Err((param, part))) => {
                assert_eq!(error.param.as_deref(), param, "{error}");
                assert!(error.message.contains(part), "{error}");
            }
            (found, expect) => panic!("{found:?}, expected {expect:?}"),
        }
    }

    #[test]
    fn text_and_conversations_are_tokenized() {
        let info = fixtures::info();
        let plain = |body: &str| tokenize(body.as_bytes(), &info);
        let expect = r#"{"count":2,"max_model_len":64,"tokens":[1,2],"token_strs":null}"#;
        check(plain(r#"{"prompt":"a b"}"#), Ok(expect));
        let expect = r#"{"count":2,"max_model_len":64,"tokens":[3,1],"token_strs":["éé","a"]}"#;
        check(plain(r#"{"prompt":"éé a","return_token_strs":true,"model":"toy"}"#), Ok(expect));
        let expect = r#"{"count":3,"max_model_len":64,"tokens":[4,1,5],"token_strs":null}"#;
        check(plain(r#"{"messages":[{"role":"user","content":"a"}]}"#), Ok(expect));
    }

    #[test]
    fn ids_become_text() {
        check(detokenize(br#"{"tokens":[1,2]}"#, &fixtures::info()), Ok(r#"{"prompt":"a b"}"#));
    }

    #[test]
    fn every_fault_is_named() {
        let info = fixtures::info();
        check(tokenize(b"{}", &info), Err((Some("prompt"), "missing")));
        check(tokenize(br#"{"prompt":"a","messages":[]}"#, &info), Err((Some("prompt"), "not both")));
        check(tokenize(br#"{"messages":[]}"#, &info), Err((Some("messages"), "empty")));
        check(tokenize(br#"{"prompt":7}"#, &info), Err((Some("prompt"), "integer `7`")));
        check(tokenize(br#"{"prompt":"a","model":"x"}"#, &info), Err((Some("model"), "\"x\"")));
        check(detokenize(b"{}", &info), Err((Some("tokens"), "missing")));
        check(detokenize(br#"{"tokens":[1,99]}"#, &info), Err((Some("tokens[1]"), "99")));
        check(detokenize(br#"{"tokens":[-1]}"#, &info), Err((Some("tokens[0]"), "-1")));
        let silent = EngineInfo { tokenizer: None, ..fixtures::info() };
        check(tokenize(br#"{"prompt":"a"}"#, &silent), Err((None, "no tokenizer")));
    }
}
