//! Loading a tokenizer from a checkpoint folder.

use std::fs;
use std::path::PathBuf;

use moetrail_text::{TextError, Tokenizer};
use serde_json::{Value, json};

/// A folder with the given files, removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str, files: &[(&str, String)]) -> Self {
        let path = std::env::temp_dir().join(format!("moetrail-text-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).expect("a writable temporary folder");
        for (file, text) in files {
            fs::write(path.join(file), text).expect("a writable temporary folder");
        }
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn words(post_processor: Value) -> String {
    json!({
        "version": "1.0",
        "truncation": {"max_length": 1, "stride": 0, "strategy": "LongestFirst", "direction": "Right"},
        "padding": null, "normalizer": null, "decoder": null, "post_processor": post_processor,
        "added_tokens": [{"id": 0, "content": "<s>", "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": {"<s>": 0, "a": 1, "b": 2}, "unk_token": "<unk>"},
    })
    .to_string()
}

fn load(name: &str, files: &[(&str, String)]) -> Result<Option<Tokenizer>, TextError> {
    let folder = Folder::new(name, files);
    Tokenizer::from_dir(&folder.0)
}

#[test]
fn a_folder_without_a_tokenizer_gives_none() {
    assert!(load("none", &[]).expect("no file is no error").is_none());
}

#[test]
fn truncation_of_the_file_is_off_and_the_config_adds_bos_and_tokens() {
    let added = json!({"content": "<end>", "special": true, "lstrip": false, "rstrip": false, "single_word": false, "normalized": false});
    let config = json!({
        "bos_token": "<s>", "eos_token": "<end>", "add_bos_token": true, "added_tokens_decoder": {"3": added},
        "chat_template": "{{ bos_token }}{{ messages[0].content }}",
    });
    let files = [("tokenizer.json", words(Value::Null)), ("tokenizer_config.json", config.to_string())];
    let tokenizer = load("bos", &files).expect("loads").expect("is there");
    assert_eq!(tokenizer.encode("a b <end>", true).expect("known words"), [0, 1, 2, 3]);
    assert_eq!(tokenizer.encode("a b", false).expect("known words"), [1, 2]);
    assert_eq!((tokenizer.bos_token_id(), tokenizer.eos_token_id(), tokenizer.vocab_size()), (Some(0), Some(3), 4));
    assert_eq!(tokenizer.decode(&[0, 1, 3, 99], true), "a");
    assert_eq!(tokenizer.token(2).as_deref(), Some("b"));
    assert!(tokenizer.chat_template().is_ok());
}

#[test]
fn a_post_processor_stays_unless_the_config_speaks() {
    let adds_bos = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    });
    let file = ("tokenizer.json", words(adds_bos));
    let silent = load("silent", std::slice::from_ref(&file)).expect("loads").expect("is there");
    assert_eq!(silent.encode("a", true).expect("known words"), [0, 1]);
    let config = json!({"bos_token": "<s>", "add_bos_token": false}).to_string();
    let off = load("off", &[file, ("tokenizer_config.json", config)]).expect("loads").expect("is there");
    assert_eq!(off.encode("a", true).expect("known words"), [1]);
}

#[test]
fn malformed_files_and_unknown_words_are_named() {
    let broken = load("broken", &[("tokenizer.json", "{".into())]).err().expect("not JSON");
    assert!(broken.to_string().contains("tokenizer.json"), "{broken}");
    let files = [("tokenizer.json", words(Value::Null)), ("tokenizer_config.json", "[".into())];
    let broken = load("config", &files).err().expect("not JSON");
    assert!(broken.to_string().contains("tokenizer_config.json"), "{broken}");
    let tokenizer = load("unknown", &files[..1]).expect("loads").expect("is there");
    assert!(matches!(tokenizer.encode("zzz", false), Err(TextError::Encode(_))));
}
