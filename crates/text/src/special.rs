//! Special tokens: the names that templates use (`bos_token`, …) and the ids behind them.

use serde_json::Value;

/// The names under which `tokenizer_config.json` keeps its special tokens.
const NAMES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The named special tokens of a checkpoint, as text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    named: Vec<(&'static str, String)>,
}

impl SpecialTokens {
    /// Reads the names from `tokenizer_config.json`, and those it lacks from `special_tokens_map.json`.
    pub fn from_config(config: &Value, map: Option<&Value>) -> Self {
        let named = NAMES
            .into_iter()
            .filter_map(|name| {
                let found = content(config.get(name)).or_else(|| content(map?.get(name)))?;
                Some((name, found.to_owned()))
            })
            .collect();
        Self { named }
    }

    /// The text of one named token, such as `bos_token`.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.named.iter().find(|(n, _)| *n == name).map(|(_, text)| text.as_str())
    }

    /// Every named token with its text.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.named.iter().map(|(name, text)| (*name, text.as_str()))
    }
}

/// A token is written as its text, or as an object that has it as `content`.
fn content(token: Option<&Value>) -> Option<&str> {
    match token? {
        Value::String(text) => Some(text),
        Value::Object(fields) => fields.get("content")?.as_str(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn tokens_are_text_or_objects_and_the_config_wins() {
        let config = json!({"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>", "pad_token": null});
        let map = json!({"eos_token": "<other>", "pad_token": "<pad>"});
        let special = SpecialTokens::from_config(&config, Some(&map));
        assert_eq!(special.get("bos_token"), Some("<s>"));
        assert_eq!(special.get("eos_token"), Some("</s>"));
        assert_eq!(special.get("pad_token"), Some("<pad>"));
        assert_eq!(special.get("unk_token"), None);
    }
}
