//! Damaged checkpoints are refused, and the message says what is wrong where.

use std::path::Path;

use moetrail_kernels::WeightDtype;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::json;

use super::folder;
use crate::{Checkpoint, DtypeChoice};
use moetrail_synthetic::{Layout, Synthetic, Tensors, write_shards, write_single};

/// Opens and loads, which must fail with a message that has every part.
fn check(folder: &Path, parts: &[&str]) {
    let loaded = Checkpoint::open_folder(folder, "test").and_then(|open| open.load(DtypeChoice::Auto, false));
    let error = loaded.err().expect("the checkpoint is damaged").to_string();
    for part in parts {
        assert!(error.contains(part), "{error:?} lacks {part:?}");
    }
}

/// A model whose tensors were changed.
fn changed(family: &'static str, layout: Layout, change: impl Fn(&mut Tensors)) -> tempfile::TempDir {
    let synthetic = Synthetic::new(family);
    let mut tensors = synthetic.tensors(layout);
    change(&mut tensors);
    let folder = folder();
    synthetic.write_config(folder.path());
    write_single(folder.path(), &tensors, WeightDtype::F32);
    folder
}

fn reshape(tensors: &mut Tensors, name: &str, shape: &[usize]) {
    let values = vec![0.0; shape.iter().product()];
    tensors.insert(name.to_owned(), (shape.to_vec(), values));
}

#[test]
fn missing_tensors() {
    for name in [
        "model.embed_tokens.weight",
        "model.layers.2.self_attn.v_proj.weight",
        "model.layers.1.self_attn.k_norm.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.0.mlp.experts.5.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ] {
        let folder = changed("qwen3_moe", Layout::EachExpert, |tensors| assert!(tensors.remove(name).is_some()));
        check(folder.path(), &[name, "missing", folder.path().to_str().unwrap()]);
    }
    let fused = changed("mixtral", Layout::Fused, |tensors| {
        tensors.remove("model.layers.1.mlp.experts.down_proj");
    });
    check(fused.path(), &["model.layers.1.mlp.experts.down_proj", "[6, 48, 24]", "missing"]);
}

#[test]
fn wrong_shapes() {
    let cases: [(&str, Layout, &str, &[usize], &str); 5] = [
        ("qwen3_moe", Layout::EachExpert, "model.embed_tokens.weight", &[95, 48], "[96, 48]"),
        ("qwen3_moe", Layout::EachExpert, "model.layers.0.self_attn.q_norm.weight", &[64], "[16]"),
        ("olmoe", Layout::EachExpert, "model.layers.0.self_attn.q_norm.weight", &[12], "[48]"),
        ("mixtral", Layout::EachExpert, "model.layers.2.block_sparse_moe.experts.1.w2.weight", &[24, 48], "[48, 24]"),
        (
            "mixtral",
            Layout::Fused,
            "model.layers.2.mlp.experts.gate_up_proj",
            &[6, 24, 48],
            "expected shape [6, 48, 48], found",
        ),
    ];
    for (family, layout, name, shape, expected) in cases {
        let folder = changed(family, layout, |tensors| reshape(tensors, name, shape));
        check(folder.path(), &["model.safetensors", name, expected, &format!("found {shape:?}")]);
    }
}

#[test]
fn fused_tensors_of_two_layouts() {
    let synthetic = Synthetic::new("qwen3_moe").set("moe_intermediate_size", json!(20));
    let mut tensors = synthetic.tensors(Layout::Fused);
    reshape(&mut tensors, "model.layers.0.mlp.experts.down_proj", &[6, 20, 48]);
    let folder = folder();
    synthetic.write_config(folder.path());
    write_single(folder.path(), &tensors, WeightDtype::F32);
    check(folder.path(), &["gate_up_proj", "expected shape [6, 48, 40]", "found [6, 40, 48]"]);
}

#[test]
fn dtypes_that_do_not_pack() {
    let synthetic = Synthetic::new("qwen3_moe");
    let folder = folder();
    synthetic.write_config(folder.path());
    let bytes = vec![0u8; 96 * 48];
    let view = TensorView::new(Dtype::I8, vec![96, 48], &bytes).unwrap();
    let path = folder.path().join("model.safetensors");
    serialize_to_file([("model.embed_tokens.weight", view)], None, &path).unwrap();
    check(folder.path(), &["model.embed_tokens.weight", "F32, F16 or BF16", "found I8"]);
}

#[test]
fn damaged_files() {
    let synthetic = Synthetic::new("olmoe");
    let folder = folder();
    synthetic.write(folder.path(), Layout::EachExpert);
    let path = folder.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let length = |len: usize| format!("the header says {} bytes, the file has {len}", bytes.len());
    let check_bytes = |content: &[u8], parts: &[&str]| {
        std::fs::write(&path, content).unwrap();
        check(folder.path(), &[&["model.safetensors"], parts].concat());
    };
    let cut = bytes.len() - 1000;
    check_bytes(&bytes[..cut], &["truncated by 1000 bytes", &length(cut)]);
    check_bytes(&[&bytes[..], &[0; 3]].concat(), &["too long by 3 bytes", &length(bytes.len() + 3)]);
    check_bytes(&bytes[..100], &["truncated", "the file has 100"]);
    check_bytes(&bytes[..5], &["bad safetensors header", "found 5"]);
    check_bytes(b"", &["bad safetensors header", "found 0"]);
    check_bytes(&[&u64::MAX.to_le_bytes()[..], &bytes[8..]].concat(), &["bad safetensors header"]);
    check_bytes(&[&8u64.to_le_bytes()[..], b"not json"].concat(), &["bad safetensors header"]);
    // A git-lfs pointer in place of the file.
    check_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", &["bad safetensors header"]);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(folder.path().join("pytorch_model.bin"), "").unwrap();
    check(folder.path(), &["model.safetensors", "found neither"]);
}

#[test]
fn damaged_indices() {
    let synthetic = Synthetic::new("mixtral");
    let folder = folder();
    synthetic.write_config(folder.path());
    write_shards(folder.path(), &synthetic.tensors(Layout::EachExpert), WeightDtype::F32, 2);
    let index = folder.path().join("model.safetensors.index.json");
    let text = std::fs::read_to_string(&index).unwrap();
    let name = "model.safetensors.index.json";
    let check_index = |content: &str, parts: &[&str]| {
        std::fs::write(&index, content).unwrap();
        check(folder.path(), &[&[name], parts].concat());
    };
    check_index(&text.replacen("00002-of-00002", "00003-of-00002", 1), &["model-00003-of-00002", "not in the folder"]);
    check_index(&text.replace("lm_head.weight", "lm_tail.weight"), &["lm_tail.weight", "does not have it"]);
    check_index("{}", &["weight_map", "found nothing"]);
    check_index("{\"weight_map\": {\"a\": 1}}", &["weight_map.a", "found 1"]);
    check_index("{\"weight_map\": {\"a\": \"../secret\"}}", &["weight_map.a", "../secret"]);
    check_index("{\"weight_map\": ", &["not valid JSON", "line 1"]);
    std::fs::write(&index, &text).unwrap();
    std::fs::remove_file(folder.path().join("model-00001-of-00002.safetensors")).unwrap();
    check(folder.path(), &["model-00001-of-00002.safetensors", "not in the folder"]);
}

#[test]
fn sizes_beyond_the_files_are_refused_before_memory_is_taken() {
    let folder = folder();
    let synthetic = Synthetic::new("qwen3_moe");
    synthetic.write(folder.path(), Layout::EachExpert);
    for (key, value) in [
        ("vocab_size", 1 << 28),
        ("hidden_size", 1 << 24),
        ("num_hidden_layers", 1 << 12),
        ("num_experts", 1 << 16),
        ("moe_intermediate_size", 1 << 24),
        ("head_dim", 1 << 20),
    ] {
        synthetic.clone().set(key, json!(value)).write_config(folder.path());
        let loaded =
            Checkpoint::open_folder(folder.path(), "test").and_then(|open| open.load(DtypeChoice::Auto, false));
        assert!(loaded.is_err(), "{key} = {value}");
    }
}

#[test]
fn no_value_of_any_key_panics() {
    let values = [
        json!(null),
        json!(-1),
        json!(0),
        json!(1),
        json!(3),
        json!(1e308),
        json!(u64::MAX),
        json!("x"),
        json!([]),
        json!([1, 2]),
        json!({ "rope_type": "yarn", "factor": 1e300, "original_max_position_embeddings": 1, "beta_fast": 1e-300 }),
        json!({ "rope_type": "llama3", "factor": 1e-300, "low_freq_factor": 1e-300, "high_freq_factor": 1e300 }),
        json!({ "rope_type": "linear", "factor": 1e300 }),
        json!(true),
    ];
    let folder = folder();
    for family in ["qwen3_moe", "olmoe", "mixtral"] {
        let synthetic = Synthetic::new(family);
        synthetic.write(folder.path(), Layout::EachExpert);
        let config: serde_json::Value = serde_json::from_str(&synthetic.config_json()).unwrap();
        let others = ["rope_scaling", "sliding_window", "clip_qkv", "attention_bias", "dtype", "partial_rotary_factor"];
        let keys = config.as_object().unwrap().keys().map(String::as_str).chain(others);
        let mut loaded = 0;
        for key in keys {
            for value in &values {
                synthetic.clone().set(key, value.clone()).write_config(folder.path());
                let open = Checkpoint::open_folder(folder.path(), "test").map(|open| open.with_max_positions(64));
                loaded += usize::from(open.and_then(|open| open.load(DtypeChoice::Auto, false)).is_ok());
            }
        }
        assert!(loaded > 30, "only {loaded} harmless changes loaded");
    }
}

#[test]
fn no_byte_of_a_header_panics() {
    let folder = folder();
    Synthetic::new("olmoe").write(folder.path(), Layout::EachExpert);
    let path = folder.path().join("model.safetensors");
    let good = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    for step in 0..400usize {
        let mut bytes = good.clone();
        let at = (step * 7919) % header;
        bytes[at] ^= 1 << (step % 8);
        std::fs::write(&path, bytes).unwrap();
        // A flipped bit may leave the header valid (in an unused name, say); it must not panic.
        if let Ok(open) = Checkpoint::open_folder(folder.path(), "test") {
            open.load(DtypeChoice::Auto, false).ok();
        }
    }
}

#[test]
fn no_checkpoint_at_all() {
    let folder = folder();
    check(folder.path(), &["config.json", "found none"]);
    let missing = folder.path().join("missing");
    let error = Checkpoint::open(missing.to_str().unwrap(), None).err().unwrap().to_string();
    assert!(error.contains("no such folder") && error.contains("org/name"), "{error}");
}
