//! Two small tokenizers that split characters the ways real ones do; for tests.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::tokenizer::Tokenizer;

/// GPT-2's byte-level alphabet with a few merged pieces: ids 0..256 are the bytes, then pieces, then `<|end|>`.
pub(crate) fn byte_level() -> Arc<Tokenizer> {
    let mut pieces: Vec<String> = (0..=255u8).map(|byte| byte_char(byte).to_string()).collect();
    pieces.extend(["Ġt", "he", "Ġthe", "Ã©", "ðŁ"].map(String::from));
    let merges = [["Ġ", "t"], ["h", "e"], ["Ġt", "he"], ["Ã", "©"], ["ð", "Ł"]];
    build(
        &pieces,
        "<|end|>",
        json!({"type": "BPE", "merges": merges}),
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}),
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}),
    )
}

/// A sentencepiece-like vocabulary: ids 0..256 are byte-fallback pieces, then pieces with `▁`, then `</s>`.
pub(crate) fn byte_fallback() -> Arc<Tokenizer> {
    let mut pieces: Vec<String> = (0..=255u8).map(|byte| format!("<0x{byte:02X}>")).collect();
    pieces.extend(["▁", "▁Hello", "Hello", "▁a", "b", "é", "中", "▁▁", "c"].map(String::from));
    let decoder = json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]});
    build(&pieces, "</s>", json!({"type": "BPE", "merges": [], "byte_fallback": true}), Value::Null, decoder)
}

fn build(pieces: &[String], end: &str, mut model: Value, pre_tokenizer: Value, decoder: Value) -> Arc<Tokenizer> {
    model["vocab"] = pieces.iter().enumerate().map(|(id, piece)| (piece.clone(), Value::from(id))).collect();
    let special = json!({
        "id": pieces.len(), "content": end, "special": true,
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
    });
    let whole = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [special], "normalizer": null,
        "pre_tokenizer": pre_tokenizer, "post_processor": null, "decoder": decoder, "model": model,
    });
    let inner = tokenizers::Tokenizer::from_bytes(whole.to_string()).expect("the fixture is a valid tokenizer");
    Arc::new(Tokenizer::new(inner, &json!({"eos_token": end}), None, None))
}

/// GPT-2 shows bytes that are no printable Latin-1 character as characters from U+0100 on.
fn byte_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|b| !printable(*b)).count() as u32;
    char::from_u32(0x100 + rank).expect("within the basic plane")
}
