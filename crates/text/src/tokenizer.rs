//! The checkpoint's tokenizer, with Hugging Face's semantics.

use std::path::Path;

use serde_json::Value;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, PostProcessorWrapper};

use crate::chat::ChatTemplate;
use crate::error::{ChatError, TextError};
use crate::special::SpecialTokens;

/// Turns text into token ids and back; shared by every request.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special: SpecialTokens,
    template: Result<ChatTemplate, ChatError>,
}

impl Tokenizer {
    /// Loads `tokenizer.json`, `tokenizer_config.json` and the chat template of a checkpoint folder.
    ///
    /// `None` if there is no `tokenizer.json`. A chat template that does not compile is reported by
    /// [`Tokenizer::chat_template`], because completions work without one.
    ///
    /// # Errors
    /// [`TextError::Read`] and [`TextError::Malformed`] name the file.
    pub fn from_dir(dir: &Path) -> Result<Option<Self>, TextError> {
        let path = dir.join("tokenizer.json");
        let Some(bytes) = read_if_present(&path)? else { return Ok(None) };
        let inner = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|error| TextError::Malformed { path, message: error.to_string() })?;
        let config = read_json(&dir.join("tokenizer_config.json"))?.unwrap_or(Value::Null);
        let map = read_json(&dir.join("special_tokens_map.json"))?;
        let jinja_path = dir.join("chat_template.jinja");
        let jinja = match read_if_present(&jinja_path)? {
            Some(bytes) => Some(String::from_utf8(bytes).map_err(|_| TextError::Malformed {
                path: jinja_path,
                message: "the chat template is not UTF-8".into(),
            })?),
            None => None,
        };
        Ok(Some(Self::new(inner, &config, map.as_ref(), jinja)))
    }

    /// Puts a tokenizer together from its parts.
    pub fn new(
        mut inner: tokenizers::Tokenizer,
        config: &Value,
        special_tokens_map: Option<&Value>,
        jinja: Option<String>,
    ) -> Self {
        // Truncation and padding belong to training; a server encodes what it is given.
        let _ = inner.with_truncation(None);
        inner.with_padding(None);
        let special = SpecialTokens::from_config(config, special_tokens_map);
        add_missing_tokens(&mut inner, config, &special);
        apply_bos_and_eos_flags(&mut inner, config, &special);
        let template = ChatTemplate::from_config(config, jinja, special.clone());
        Self { inner, special, template }
    }

    /// Token ids of a text; `add_special_tokens` lets the post-processor add BOS and the like.
    ///
    /// # Errors
    /// [`TextError::Encode`] if a piece is unknown and the vocabulary has no unknown token.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TextError> {
        let encoding = self.inner.encode_fast(text, add_special_tokens);
        encoding.map(|found| found.get_ids().to_vec()).map_err(|error| TextError::Encode(error.to_string()))
    }

    /// Text of token ids; ids outside the vocabulary are skipped, as Hugging Face does.
    ///
    /// A decoder that refuses the pieces (none of the usual ones does) gives the pieces themselves.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        self.inner
            .decode(ids, skip_special_tokens)
            .unwrap_or_else(|_| ids.iter().filter_map(|id| self.token(*id)).collect())
    }

    /// Text of one token by itself, special or not; bytes that are no character become U+FFFD.
    pub fn decode_one(&self, id: u32) -> String {
        self.decode(&[id], false)
    }

    /// The piece behind an id as the vocabulary spells it, such as `Ġthe` or `<0x0A>`.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a piece as the vocabulary spells it.
    pub fn token_id(&self, piece: &str) -> Option<u32> {
        self.inner.token_to_id(piece)
    }

    /// Number of pieces, added tokens included; the model's logits may be wider.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The named special tokens.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special
    }

    /// Id of the token that begins a text, if the checkpoint has one.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.token_id(self.special.get("bos_token")?)
    }

    /// Id of the token that ends a text, if the checkpoint has one.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.token_id(self.special.get("eos_token")?)
    }

    /// The checkpoint's chat template.
    ///
    /// # Errors
    /// [`ChatError::NoTemplate`] if it has none, [`ChatError::Syntax`] if it does not compile.
    pub fn chat_template(&self) -> Result<&ChatTemplate, ChatError> {
        self.template.as_ref().map_err(Clone::clone)
    }
}

/// Adds tokens that only `tokenizer_config.json` knows, in the order of their ids, as transformers does.
fn add_missing_tokens(inner: &mut tokenizers::Tokenizer, config: &Value, special: &SpecialTokens) {
    let mut declared: Vec<(u32, AddedToken)> = config
        .get("added_tokens_decoder")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .filter_map(|(id, token)| Some((id.parse().ok()?, serde_json::from_value(token.clone()).ok()?)))
        .collect();
    declared.sort_by_key(|(id, _)| *id);
    let named = special.iter().map(|(_, text)| AddedToken::from(text, true));
    let missing: Vec<AddedToken> = declared
        .into_iter()
        .map(|(_, token)| token)
        .chain(named)
        .filter(|token| inner.token_to_id(&token.content).is_none())
        .collect();
    // Adding can only fail on a malformed normalizer, which loading would have refused.
    let _ = inner.add_tokens(missing);
}

/// `add_bos_token` in the config overrides the post-processor of `tokenizer.json`, as in transformers 5.
fn apply_bos_and_eos_flags(inner: &mut tokenizers::Tokenizer, config: &Value, special: &SpecialTokens) {
    let flag = |name: &str| config.get(name).and_then(Value::as_bool);
    if flag("add_bos_token").is_none() && flag("add_eos_token") != Some(true) {
        return;
    }
    let named = |asked: &str, name: &str| {
        let text = special.get(name).filter(|_| flag(asked) == Some(true))?;
        Some((text.to_owned(), inner.token_to_id(text)?))
    };
    let (bos, eos) = (named("add_bos_token", "bos_token"), named("add_eos_token", "eos_token"));
    let mut pieces: Vec<String> = Vec::new();
    pieces.extend(bos.iter().map(|(text, _)| format!("{text}:0")));
    pieces.push("$A:0".into());
    pieces.extend(eos.iter().map(|(text, _)| format!("{text}:0")));
    let template = TemplateProcessing::builder()
        .try_single(pieces)
        .map(|builder| builder.special_tokens(bos.into_iter().chain(eos).collect::<Vec<_>>()).build());
    // A token text that the template language cannot hold leaves the post-processor of tokenizer.json in place.
    if let Ok(Ok(template)) = template {
        inner.with_post_processor(Some(PostProcessorWrapper::Template(template)));
    }
}

fn read_if_present(path: &Path) -> Result<Option<Vec<u8>>, TextError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TextError::Read { path: path.to_owned(), source }),
    }
}

fn read_json(path: &Path) -> Result<Option<Value>, TextError> {
    let Some(bytes) = read_if_present(path)? else { return Ok(None) };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| TextError::Malformed { path: path.to_owned(), message: error.to_string() })
}
