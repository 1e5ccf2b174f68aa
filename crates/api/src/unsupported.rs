//! Parameters that this server knows and does not have: refused, because ignoring them would change the answer.

use serde::Deserialize;
use serde_json::Value;

use crate::error::ApiError;

/// Declares a set of fields, each with the values of it that change nothing.
macro_rules! unsupported {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $harmless:expr,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Default, Deserialize)]
        #[serde(default)]
        pub(crate) struct $name {
            $($field: Option<Value>,)*
        }

        impl $name {
            /// Refuses the first field that would change the answer.
            pub(crate) fn check(&self, prefix: &str) -> Result<(), ApiError> {
                $(
                    let harmless: fn(&Value) -> bool = $harmless;
                    if let Some(value) = self.$field.as_ref().filter(|value| !harmless(value)) {
                        let param = format!("{prefix}{}", stringify!($field));
                        let message = format!("{param} is not supported by this server; it is {}", shown(value));
                        return Err(ApiError::invalid(param, message));
                    }
                )*
                Ok(())
            }
        }
    };
}

unsupported! {
    /// Settings of sampling, spelled alike everywhere.
    UnsupportedSampling {
        use_beam_search: is_false,
        best_of: is_one,
        bad_words: is_empty,
        structured_outputs: never,
        guided_json: never,
        guided_regex: never,
        guided_choice: never,
        guided_grammar: never,
        logits_processors: is_empty,
        logprob_token_ids: never,
        thinking_token_budget: is_minus_one,
        repetition_detection: never,
        watermarking: is_false,
        truncate_prompt_tokens: never,
    }
}

unsupported! {
    /// Settings at the top level of completions and chat.
    UnsupportedOpenAi {
        response_format: is_text_format,
        suffix: is_empty,
        prompt_embeds: never,
        functions: is_empty,
        function_call: never,
        audio: never,
        web_search_options: never,
        chat_template: never,
        ec_transfer_params: never,
    }
}

unsupported! {
    /// Settings at the top level of `/inference/v1/generate`.
    UnsupportedGenerate {
        features: never,
        content_parts: is_empty,
        nvext: is_empty,
        ec_transfer_params: never,
        parse_context: never,
    }
}

unsupported! {
    /// Settings at the top level of SGLang's `/generate`.
    UnsupportedSglang {
        input_embeds: never,
        image_data: never,
        video_data: never,
        audio_data: never,
        lora_path: never,
        session_params: never,
        return_hidden_states: is_false,
        return_indexer_topk: is_false,
        token_ids_logprob: never,
        custom_logit_processor: never,
        bootstrap_host: never,
    }
}

unsupported! {
    /// Settings of sampling that only SGLang's `/generate` spells so.
    UnsupportedSglangSampling {
        json_schema: never,
        regex: never,
        ebnf: never,
        structural_tag: never,
        stop_regex: is_empty,
        custom_params: never,
    }
}

fn never(_: &Value) -> bool {
    false
}

fn is_false(value: &Value) -> bool {
    *value == false
}

fn is_one(value: &Value) -> bool {
    *value == 1
}

fn is_minus_one(value: &Value) -> bool {
    *value == -1
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.values().all(Value::is_null),
        _ => false,
    }
}

fn is_text_format(value: &Value) -> bool {
    value.get("type").is_some_and(|kind| kind == "text")
}

/// A value short enough for a message.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::read;

    fn check(body: &str, expect: Option<&str>) {
        let found = read::<UnsupportedOpenAi>(body.as_bytes())
            .and_then(|fields| fields.check(""))
            .and_then(|()| read::<UnsupportedSampling>(body.as_bytes()))
            .and_then(|fields| fields.check(""));
        match (found, expect) {
            (Ok(()), None) => {}
            (Err(error), Some(param)) => {
                assert_eq!(error.param.as_deref(), Some(param));
                assert!(error.message.contains("not supported"), "{error}");
            }
            (found, expect) => panic!("{body}: {found:?}, expected {expect:?}"),
        }
    }

    #[test]
    fn what_would_change_the_answer_is_refused() {
        check(r#"{"best_of":1,"suffix":"","bad_words":[],"response_format":{"type":"text"},"nvext":null}"#, None);
        check(r#"{"best_of":2}"#, Some("best_of"));
        check(r#"{"suffix":"x"}"#, Some("suffix"));
        check(r#"{"response_format":{"type":"json_object"}}"#, Some("response_format"));
        check(r#"{"use_beam_search":true}"#, Some("use_beam_search"));
        check(r#"{"guided_json":{"type":"object"}}"#, Some("guided_json"));
    }

    #[test]
    fn long_values_are_shortened() {
        let body = format!(r#"{{"chat_template":"{}"}}"#, "é".repeat(300));
        let error =
            read::<UnsupportedOpenAi>(body.as_bytes()).and_then(|fields| fields.check("")).expect_err("refused");
        assert!(error.message.chars().count() < 160, "{error}");
    }
}
