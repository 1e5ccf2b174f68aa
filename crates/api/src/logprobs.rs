//! Log-probabilities in the shapes that clients know.

use moetrail_engine::TokenLogprobs;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use crate::head::Head;

/// A log-probability; JSON has no −∞, vLLM writes −9999.
#[derive(Debug, Clone, Copy)]
struct Logprob(f32);

impl Serialize for Logprob {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f32(if self.0.is_finite() { self.0.max(-9999.0) } else { -9999.0 })
    }
}

/// `{"content":[…]}`: chat's shape, which generate shares.
#[derive(Debug, Serialize)]
pub(crate) struct ContentLogprobs {
    content: Vec<ContentEntry>,
}

#[derive(Debug, Serialize)]
struct ContentEntry {
    #[serde(flatten)]
    chosen: NamedToken,
    top_logprobs: Vec<NamedToken>,
}

#[derive(Debug, Serialize)]
struct NamedToken {
    token: String,
    logprob: Logprob,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<Vec<u8>>,
}

impl ContentLogprobs {
    /// Chat: tokens by text, with their bytes.
    pub(crate) fn by_text(head: &Head, entries: &[TokenLogprobs]) -> Self {
        Self::new(entries, |id, logprob| {
            let token = head.token_name(id);
            NamedToken { bytes: Some(token.clone().into_bytes()), token, logprob: Logprob(logprob) }
        })
    }

    /// Generate: tokens by id.
    pub(crate) fn by_id(entries: &[TokenLogprobs]) -> Self {
        Self::new(entries, |id, logprob| NamedToken { token: id_name(id), logprob: Logprob(logprob), bytes: None })
    }

    fn new(entries: &[TokenLogprobs], name: impl Fn(u32, f32) -> NamedToken) -> Self {
        let content = entries
            .iter()
            .map(|entry| ContentEntry {
                chosen: name(entry.token_id, entry.logprob),
                top_logprobs: entry.top.iter().map(|(id, logprob)| name(*id, *logprob)).collect(),
            })
            .collect();
        Self { content }
    }
}

/// vLLM's name of a token by its id.
pub(crate) fn id_name(id: u32) -> String {
    format!("token_id:{id}")
}

/// The shape of `/v1/completions`: four lists of equal length.
#[derive(Debug, Default, Serialize)]
pub(crate) struct LegacyLogprobs {
    text_offset: Vec<usize>,
    token_logprobs: Vec<Option<Logprob>>,
    tokens: Vec<String>,
    top_logprobs: Vec<Option<Pairs<String, Logprob>>>,
}

impl LegacyLogprobs {
    /// Adds a token. `offset` is where it begins in the text, in characters, and moves behind it.
    pub(crate) fn push(&mut self, head: &Head, token_id: u32, entry: Option<&TokenLogprobs>, offset: &mut usize) {
        let token = head.token_name(token_id);
        self.text_offset.push(*offset);
        *offset += token.chars().count();
        self.token_logprobs.push(entry.map(|entry| Logprob(entry.logprob)));
        self.top_logprobs.push(entry.map(|entry| {
            let mut pairs = Pairs(vec![(token.clone(), Logprob(entry.logprob))]);
            for (id, logprob) in &entry.top {
                pairs.insert(head.token_name(*id), Logprob(*logprob));
            }
            pairs
        }));
        self.tokens.push(token);
    }
}

/// One position of `prompt_logprobs`: token ids, the position's own first, to what is known of them.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub(crate) struct PromptLogprobs(Option<Pairs<u32, RankedToken>>);

#[derive(Debug, Serialize)]
struct RankedToken {
    logprob: Logprob,
    rank: u32,
    decoded_token: String,
}

impl PromptLogprobs {
    /// The list of a whole prompt, if it was asked for.
    pub(crate) fn list(head: &Head, entries: Option<&Vec<Option<TokenLogprobs>>>) -> Option<Vec<Self>> {
        Some(entries?.iter().map(|entry| Self(entry.as_ref().map(|entry| position(head, entry)))).collect())
    }
}

fn position(head: &Head, entry: &TokenLogprobs) -> Pairs<u32, RankedToken> {
    let ranked = |id, logprob, rank| RankedToken { logprob: Logprob(logprob), rank, decoded_token: head.decoded(id) };
    let mut pairs = Pairs(vec![(entry.token_id, ranked(entry.token_id, entry.logprob, entry.rank))]);
    for ((id, logprob), rank) in entry.top.iter().zip(1..) {
        pairs.insert(*id, ranked(*id, *logprob, rank));
    }
    pairs
}

/// A JSON object in the order of insertion.
#[derive(Debug)]
struct Pairs<K, V>(Vec<(K, V)>);

impl<K: PartialEq, V> Pairs<K, V> {
    /// Adds a pair unless the key is there: two tokens can have the same text.
    fn insert(&mut self, key: K, value: V) {
        if self.0.iter().all(|(known, _)| *known != key) {
            self.0.push((key, value));
        }
    }
}

impl<K: Serialize, V: Serialize> Serialize for Pairs<K, V> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (key, value) in &self.0 {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;

    fn entry(token_id: u32, logprob: f32, top: &[(u32, f32)]) -> TokenLogprobs {
        TokenLogprobs { token_id, logprob, rank: 2, top: top.to_vec() }
    }

    fn json(value: &impl Serialize) -> String {
        serde_json::to_string(value).expect("serialises")
    }

    #[test]
    fn generate_names_tokens_by_id() {
        let entries = [entry(5, -0.1, &[(4, -0.05)]), entry(6, f32::NEG_INFINITY, &[])];
        let expect = concat!(
            r#"{"content":[{"token":"token_id:5","logprob":-0.1,"top_logprobs":[{"token":"token_id:4","logprob":-0.05}]},"#,
            r#"{"token":"token_id:6","logprob":-9999.0,"top_logprobs":[]}]}"#
        );
        assert_eq!(json(&ContentLogprobs::by_id(&entries)), expect);
    }

    #[test]
    fn chat_names_tokens_by_text() {
        let head = fixtures::head();
        let expect = r#"{"content":[{"token":"a","logprob":-1.0,"bytes":[97],"top_logprobs":[]}]}"#;
        assert_eq!(json(&ContentLogprobs::by_text(&head, &[entry(1, -1.0, &[])])), expect);
    }

    #[test]
    fn completions_have_four_lists() {
        let head = fixtures::head();
        let mut lists = LegacyLogprobs::default();
        let mut offset = 0;
        lists.push(&head, 3, None, &mut offset);
        lists.push(&head, 1, Some(&entry(1, -1.5, &[(2, -0.5), (1, -1.5)])), &mut offset);
        let expect = concat!(
            r#"{"text_offset":[0,2],"token_logprobs":[null,-1.5],"tokens":["éé","a"],"#,
            r#""top_logprobs":[null,{"a":-1.5,"b":-0.5}]}"#
        );
        assert_eq!((json(&lists).as_str(), offset), (expect, 3));
    }

    #[test]
    fn the_prompt_s_own_token_is_always_listed() {
        let head = fixtures::head();
        let entries = vec![None, Some(entry(2, -3.0, &[(1, -0.25), (2, -3.0)])), Some(entry(1, -2.0, &[]))];
        let expect = concat!(
            r#"[null,{"2":{"logprob":-3.0,"rank":2,"decoded_token":"b"},"1":{"logprob":-0.25,"rank":1,"decoded_token":"a"}},"#,
            r#"{"1":{"logprob":-2.0,"rank":2,"decoded_token":"a"}}]"#
        );
        assert_eq!(json(&PromptLogprobs::list(&head, Some(&entries))), expect);
    }
}
