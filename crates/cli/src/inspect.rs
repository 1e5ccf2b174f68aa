//! `moetrail inspect`: what a checkpoint is, and what serving it takes.

use anyhow::Result;
use moetrail_kernels::KvPool;
use moetrail_models::Checkpoint;
use moetrail_routes::{ExpertDtype, RowLayout};
use serde_json::{Value, json};

use crate::args::InspectArgs;
use crate::load;

/// Prints what the checkpoint's own files say; no weights are loaded.
pub fn inspect(args: &InspectArgs) -> Result<()> {
    let checkpoint = load::open_stored(args.model.as_deref(), args.revision.as_deref())?;
    let found = describe(&checkpoint);
    match args.json {
        true => println!("{found}"),
        false => print!("{}", lines(&found)),
    }
    Ok(())
}

fn describe(checkpoint: &Checkpoint) -> Value {
    let (config, contents) = (checkpoint.config(), checkpoint.contents());
    let (layers, moe_layers, top_k) = (config.num_hidden_layers, config.moe_layers.len(), config.num_experts_per_tok);
    let dtype = ExpertDtype::for_num_experts(config.num_experts);
    let row = RowLayout { num_layers: layers, top_k, dtype };
    let own = checkpoint.own_dtype();
    let kv = KvPool::bytes_per_block(layers, 1, config.num_key_value_heads, config.head_dim, own);
    json!({
        "model": checkpoint.name(),
        "architecture": config.architecture,
        "model_type": config.model_type,
        "files": {"tensors": contents.tensors, "bytes": contents.bytes, "stored_as": contents.types},
        "parameters": {"all": contents.parameters, "active": contents.active_parameters},
        "dtype": own.to_string(),
        "layers": {"all": layers, "moe": config.moe_layers},
        "experts": {
            "routed": config.num_experts,
            "per_token": top_k,
            "width": config.moe_intermediate_size,
            "norm_topk_prob": config.norm_topk_prob,
        },
        "hidden_size": config.hidden_size,
        "attention": {
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "sliding_window": config.sliding_window,
        },
        "vocab_size": config.vocab_size,
        "max_model_len": config.max_model_len(),
        "eos_token_ids": checkpoint.eos_token_ids(),
        "bytes_per_token": {
            "kv": kv,
            "ring": moe_layers * top_k * dtype.itemsize(),
            "returned_row": row.row_bytes(),
        },
        "returned_row": {"shape": [layers, top_k], "dtype": dtype.name()},
    })
}

/// One line a field, nested fields behind each other.
fn lines(found: &Value) -> String {
    let short = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Array(items) if items.iter().all(Value::is_string) => {
            items.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", ")
        }
        // A list of all layers says less than their number.
        Value::Array(items) if items.len() > 8 => {
            format!("{} ({} to {})", items.len(), items[0], items[items.len() - 1])
        }
        other => other.to_string(),
    };
    let line = |(name, value): (&String, &Value)| {
        let text = match value {
            Value::Object(fields) => {
                fields.iter().map(|(name, value)| format!("{name} {}", short(value))).collect::<Vec<_>>().join("; ")
            }
            other => short(other),
        };
        format!("{name:<16} {text}\n")
    };
    found.as_object().into_iter().flatten().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_says_what_it_takes() {
        let checkpoint = load::open_stored(None, None).unwrap();
        let found = describe(&checkpoint);
        let config = checkpoint.config();
        let cells = config.moe_layers.len() * config.num_experts_per_tok;
        assert_eq!(found["bytes_per_token"]["ring"], cells);
        let sum = |name: &str| found["parameters"][name].as_u64().unwrap();
        assert!(sum("active") < sum("all") && sum("all") > 1_000_000);
        let text = lines(&found);
        assert_eq!(text.lines().count(), found.as_object().unwrap().len());
        assert!(text.contains("returned_row     shape [6,"), "{text}");
    }
}
