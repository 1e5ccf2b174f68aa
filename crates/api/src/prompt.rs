//! The prompt of a completion: text or token ids, one or several.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, SeqAccess, Visitor};

/// What `prompt` may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PromptField {
    /// A text.
    Text(String),
    /// A list of texts.
    Texts(Vec<String>),
    /// A list of token ids.
    Ids(Vec<u32>),
    /// A list of such lists.
    Lists(Vec<Vec<u32>>),
}

impl PromptField {
    /// Whether several prompts are possible, be it one.
    pub(crate) fn is_list(&self) -> bool {
        matches!(self, Self::Texts(_) | Self::Lists(_))
    }

    /// The texts, or the token ids.
    pub(crate) fn into_prompts(self) -> Prompts {
        match self {
            Self::Text(text) => Prompts::Texts(vec![text]),
            Self::Texts(texts) => Prompts::Texts(texts),
            Self::Ids(ids) => Prompts::Ids(vec![ids]),
            Self::Lists(lists) => Prompts::Ids(lists),
        }
    }
}

/// One or several prompts.
pub(crate) enum Prompts {
    Texts(Vec<String>),
    Ids(Vec<Vec<u32>>),
}

/// One element of a list given as prompt.
enum Item {
    Text(String),
    Id(u32),
    Ids(Vec<u32>),
}

impl<'de> Deserialize<'de> for PromptField {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Prompt;

        impl<'de> Visitor<'de> for Prompt {
            type Value = PromptField;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a list of strings, a list of token ids, or a list of such lists")
            }

            fn visit_str<E>(self, text: &str) -> Result<PromptField, E> {
                Ok(PromptField::Text(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<PromptField, A::Error> {
                let mixed = || A::Error::custom("a list of prompts must not mix strings, token ids and lists");
                let mut texts = Vec::new();
                let mut ids = Vec::new();
                let mut lists = Vec::new();
                while let Some(item) = items.next_element()? {
                    match item {
                        Item::Text(text) if ids.is_empty() && lists.is_empty() => texts.push(text),
                        Item::Id(id) if texts.is_empty() && lists.is_empty() => ids.push(id),
                        Item::Ids(list) if texts.is_empty() && ids.is_empty() => lists.push(list),
                        _ => return Err(mixed()),
                    }
                }
                Ok(if !texts.is_empty() {
                    PromptField::Texts(texts)
                } else if !lists.is_empty() {
                    PromptField::Lists(lists)
                } else {
                    PromptField::Ids(ids)
                })
            }
        }

        deserializer.deserialize_any(Prompt)
    }
}

impl<'de> Deserialize<'de> for Item {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneItem;

        impl<'de> Visitor<'de> for OneItem {
            type Value = Item;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a token id, or a list of token ids")
            }

            fn visit_str<E>(self, text: &str) -> Result<Item, E> {
                Ok(Item::Text(text.to_owned()))
            }

            fn visit_u64<E: Error>(self, id: u64) -> Result<Item, E> {
                u32::try_from(id).map(Item::Id).map_err(|_| E::custom(format!("{id} is no token id")))
            }

            fn visit_i64<E: Error>(self, id: i64) -> Result<Item, E> {
                Err(E::custom(format!("{id} is no token id")))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Item, A::Error> {
                let mut ids = Vec::new();
                while let Some(id) = items.next_element()? {
                    ids.push(id);
                }
                Ok(Item::Ids(ids))
            }
        }

        deserializer.deserialize_any(OneItem)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::read;

    #[derive(Debug, Deserialize)]
    struct Body {
        prompt: PromptField,
    }

    fn prompt(json: &str) -> Result<PromptField, crate::ApiError> {
        read::<Body>(format!("{{\"prompt\":{json}}}").as_bytes()).map(|body| body.prompt)
    }

    #[test]
    fn every_form_is_understood() {
        let texts = |texts: &[&str]| PromptField::Texts(texts.iter().map(|text| text.to_string()).collect());
        assert_eq!(prompt(r#""a""#), Ok(PromptField::Text("a".into())));
        assert_eq!(prompt(r#"["a"]"#), Ok(texts(&["a"])));
        assert_eq!(prompt(r#"["a","b"]"#), Ok(texts(&["a", "b"])));
        assert_eq!(prompt("[1,2]"), Ok(PromptField::Ids(vec![1, 2])));
        assert_eq!(prompt("[[1],[2,3]]"), Ok(PromptField::Lists(vec![vec![1], vec![2, 3]])));
        assert_eq!(prompt("[]"), Ok(PromptField::Ids(vec![])));
    }

    #[test]
    fn every_other_form_is_named() {
        for (json, param, part) in [
            ("7", "prompt", "integer `7`"),
            (r#"[1,"a"]"#, "prompt", "mix"),
            ("[1,-2]", "prompt[1]", "-2"),
            ("[4294967296]", "prompt[0]", "4294967296"),
            ("[[1,true]]", "prompt[0][1]", "boolean `true`"),
            ("[1.5]", "prompt[0]", "floating point `1.5`"),
        ] {
            let error = prompt(json).expect_err(json);
            assert_eq!(error.param.as_deref(), Some(param), "{error}");
            assert!(error.message.contains(part), "{error}");
        }
    }
}
