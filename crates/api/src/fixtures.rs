//! A toy model's facts and a tokenizer of six words; for tests.

use std::sync::Arc;

use moetrail_engine::{EngineInfo, RoutingShape};
use moetrail_routes::format::Format;
use moetrail_routes::{ExpertDtype, RowLayout};
use moetrail_text::Tokenizer;
use serde_json::json;

use crate::head::Head;
use crate::rows::RowsFormat;
use crate::rows_reply::RowsWriter;
use crate::stream_options::Streaming;

/// Words by id: `<s>`, a, b, éé, `<user>`, `<assistant>`.
pub(crate) fn tokenizer() -> Arc<Tokenizer> {
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {
            "type": "WordLevel", "unk_token": "<s>",
            "vocab": {"<s>": 0, "a": 1, "b": 2, "éé": 3, "<user>": 4, "<assistant>": 5},
        },
    });
    let inner = tokenizers::Tokenizer::from_bytes(file.to_string()).expect("the fixture is a valid tokenizer");
    let template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}\
        {% if add_generation_prompt %}<assistant>{% endif %}";
    Arc::new(Tokenizer::new(inner, &json!({"chat_template": template}), None, None))
}

/// A server of 64 positions with 8 blocks of 4 slots, capture on.
pub(crate) fn info() -> EngineInfo {
    EngineInfo {
        model_name: "toy".into(),
        model_aliases: vec!["toy-alias".into()],
        max_model_len: 64,
        max_num_seqs: 4,
        max_live_requests: 8,
        max_logprobs: 5,
        vocab_size: 6,
        eos_token_ids: vec![0],
        routing: Some(RoutingShape { num_layers: 1, moe_layers: vec![0], top_k: 2, num_experts: 4 }),
        row_layout: Some(RowLayout { num_layers: 1, top_k: 2, dtype: ExpertDtype::U8 }),
        return_routed_experts: false,
        num_blocks: 32,
        block_size: 4,
        tokenizer: Some(tokenizer()),
        created: 7,
    }
}

/// The head of an answer to one prompt of two tokens.
pub(crate) fn head() -> Head {
    Head {
        id: "x".into(),
        created: 7,
        model: "toy".into(),
        tokenizer: Some(tokenizer()),
        streaming: Streaming::default(),
        rows: RowsWriter::new(RowsFormat::InChoice(Format::Object), 4),
        prompts: vec![[1, 2].into()],
        n: 1,
        with_logprobs: false,
        return_token_ids: false,
        tokens_as_ids: false,
        kv_transfer_params: None,
    }
}
