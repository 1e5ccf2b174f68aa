//! The tokenizer inside a GGUF file, through candle's reader.

use std::path::Path;

use candle_core::quantized::gguf_file::{Content, Value as GgufValue};
use candle_core::quantized::tokenizer::TokenizerFromGguf;
use serde_json::{Map, Value, json};
use tokenizers::Tokenizer;

/// A tokenizer, and what `tokenizer_config.json` would say beside it.
#[derive(Debug, Clone)]
pub struct GgufTokenizer {
    /// Text to ids and back.
    pub tokenizer: Tokenizer,
    /// Special tokens and chat template.
    pub config: Value,
}

/// The file's tokenizer. None where it has none, or one that is not byte-level BPE, which the log tells.
pub(super) fn read(path: &Path, content: &Content) -> Option<GgufTokenizer> {
    let kind = content.metadata.get("tokenizer.ggml.model")?.to_string().ok()?;
    if kind == "no_vocab" {
        return None;
    }
    match Tokenizer::from_gguf(content) {
        Ok(tokenizer) => Some(GgufTokenizer { tokenizer, config: config(content) }),
        Err(error) => {
            let path = path.display();
            tracing::warn!(%path, %error, "the file's tokenizer is not read; --tokenizer names a folder with another");
            None
        }
    }
}

fn config(content: &Content) -> Value {
    let mut config = Map::new();
    if let Some(Ok(template)) = content.metadata.get("tokenizer.chat_template").map(GgufValue::to_string) {
        config.insert("chat_template".into(), json!(template));
    }
    let tokens = content.metadata.get("tokenizer.ggml.tokens").and_then(|tokens| tokens.to_vec().ok());
    for (key, name) in [("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"), ("padding", "pad_token")]
    {
        let id = content.metadata.get(&format!("tokenizer.ggml.{key}_token_id")).and_then(|id| id.to_u32().ok());
        let token = id.and_then(|id| tokens?.get(id as usize)?.to_string().ok());
        config.extend(token.map(|token| (name.to_owned(), json!(token))));
    }
    Value::Object(config)
}
