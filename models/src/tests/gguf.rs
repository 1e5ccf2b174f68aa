//! GGUF files, written by candle's writer, against the same weights in a checkpoint folder.

use std::fs::File;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use moetrail_kernels::WeightDtype;
use moetrail_synthetic::{Layout, Synthetic, Tensors, write_single};
use serde_json::{Value as Json, json};

use super::{BLOCK_SIZE, folder, ids, run};
use crate::{Checkpoint, Decoder, DtypeChoice, Quantization, WeightChoice};

/// A model whose widths are whole blocks of every quantisation.
fn wide(family: &'static str) -> Synthetic {
    let synthetic = Synthetic::new(family).set("hidden_size", json!(256)).set("intermediate_size", json!(256));
    match family {
        "qwen3_moe" => synthetic.set("moe_intermediate_size", json!(256)).set("head_dim", json!(64)),
        _ => synthetic,
    }
}

/// What a matrix is quantised to, by its GGUF name.
type Kind = fn(&str) -> GgmlDType;

fn plain(_: &str) -> GgmlDType {
    GgmlDType::F32
}

/// Writes a model of published layout as llama.cpp's converter would.
fn write(path: &Path, synthetic: &Synthetic, kind: Kind) {
    let config: Json = serde_json::from_str(&synthetic.config_json()).unwrap();
    let tensors = gguf_tensors(&config, &synthetic.tensors(Layout::EachExpert));
    let tensors: Vec<(String, QTensor)> = tensors
        .into_iter()
        .map(|(name, tensor)| {
            // Embeddings are looked up, not multiplied: those of blocks are not rounded to bf16.
            let matrix = tensor.dims().len() > 1 && !name.contains("ffn_gate_inp") && !name.contains("token_embd");
            let kind = if matrix { kind(&name) } else { GgmlDType::F32 };
            let tensor = QTensor::quantize(&tensor, kind).unwrap();
            (name, tensor)
        })
        .collect();
    let metadata = metadata(&config);
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

fn number(config: &Json, key: &str) -> usize {
    config[key].as_u64().unwrap_or(0) as usize
}

fn metadata(config: &Json) -> Vec<(String, Value)> {
    let architecture = match config["model_type"].as_str().unwrap() {
        "qwen3_moe" => "qwen3moe",
        "mixtral" => "llama",
        other => other,
    };
    let experts = number(config, "num_experts").max(number(config, "num_local_experts"));
    let mut found = vec![("general.architecture".to_owned(), Value::String(architecture.into()))];
    let mut put = |key: &str, value| found.push((format!("{architecture}.{key}"), value));
    for (key, name) in [
        ("block_count", "num_hidden_layers"),
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("expert_used_count", "num_experts_per_tok"),
    ] {
        put(key, Value::U32(number(config, name) as u32));
    }
    for (key, name) in [("attention.key_length", "head_dim"), ("expert_feed_forward_length", "moe_intermediate_size")] {
        if number(config, name) > 0 {
            put(key, Value::U32(number(config, name) as u32));
        }
    }
    put("expert_count", Value::U32(experts as u32));
    put("attention.layer_norm_rms_epsilon", Value::F32(config["rms_norm_eps"].as_f64().unwrap() as f32));
    put("rope.freq_base", Value::F32(config["rope_theta"].as_f64().unwrap() as f32));
    found.push(("tokenizer.ggml.eos_token_id".into(), Value::U32(2)));
    found
}

/// The tensors under llama.cpp's names: experts stacked, Mixtral's query and key rows of a head alternating.
fn gguf_tensors(config: &Json, tensors: &Tensors) -> Vec<(String, Tensor)> {
    let dense = |name: &str| {
        let (shape, values) = &tensors[name];
        Tensor::from_vec(values.clone(), shape.as_slice(), &Device::Cpu).unwrap()
    };
    let mixtral = config["model_type"] == "mixtral";
    let alternating = |tensor: Tensor, heads: usize| {
        let (rows, width) = tensor.dims2().unwrap();
        let halves = tensor.reshape((heads, 2, rows / heads / 2, width)).unwrap();
        halves.transpose(1, 2).unwrap().contiguous().unwrap().reshape((rows, width)).unwrap()
    };
    let mut found = vec![
        ("token_embd.weight".to_owned(), dense("model.embed_tokens.weight")),
        ("output_norm.weight".to_owned(), dense("model.norm.weight")),
    ];
    if tensors.contains_key("lm_head.weight") {
        found.push(("output.weight".to_owned(), dense("lm_head.weight")));
    }
    for layer in 0..number(config, "num_hidden_layers") {
        let (from, to) = (format!("model.layers.{layer}"), format!("blk.{layer}"));
        for (name, target) in [
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("self_attn.q_norm", "attn_q_norm"),
            ("self_attn.k_norm", "attn_k_norm"),
        ] {
            for end in ["weight", "bias"] {
                let name = format!("{from}.{name}.{end}");
                if tensors.contains_key(&name) {
                    let tensor = match (mixtral, target) {
                        (true, "attn_q") => alternating(dense(&name), number(config, "num_attention_heads")),
                        (true, "attn_k") => alternating(dense(&name), number(config, "num_key_value_heads")),
                        _ => dense(&name),
                    };
                    found.push((format!("{to}.{target}.{end}"), tensor));
                }
            }
        }
        let block = format!("{from}.{}", if mixtral { "block_sparse_moe" } else { "mlp" });
        let parts = if mixtral { ["w1", "w3", "w2"] } else { ["gate_proj", "up_proj", "down_proj"] };
        found.push((format!("{to}.ffn_gate_inp.weight"), dense(&format!("{block}.gate.weight"))));
        let experts = number(config, "num_experts").max(number(config, "num_local_experts"));
        for (part, target) in parts.into_iter().zip(["gate", "up", "down"]) {
            let each: Vec<Tensor> =
                (0..experts).map(|expert| dense(&format!("{block}.experts.{expert}.{part}.weight"))).collect();
            found.push((format!("{to}.ffn_{target}_exps.weight"), Tensor::stack(&each, 0).unwrap()));
        }
    }
    found
}

fn load(path: &Path, choice: impl Into<WeightChoice>) -> Decoder {
    Checkpoint::open(path.to_str().unwrap(), None).unwrap().load(choice, false).unwrap()
}

#[test]
fn a_file_of_floats_is_the_same_model() {
    for family in ["qwen3_moe", "olmoe", "mixtral"] {
        let tied = Synthetic::new(family).set("tie_word_embeddings", json!(true));
        for synthetic in [Synthetic::new(family), tied] {
            let folder = folder();
            let path = folder.path().join("model.gguf");
            write(&path, &synthetic, plain);
            synthetic.write(folder.path(), Layout::EachExpert);
            let expected = load(folder.path(), DtypeChoice::Auto);
            let got = load(&path, DtypeChoice::Auto);
            assert_eq!(expected.config().difference(got.config()), None);
            assert_eq!(got.config().eos_token_ids, [2]);
            let (expected, got) = (run(&expected, &ids(9), 9, BLOCK_SIZE), run(&got, &ids(9), 9, BLOCK_SIZE));
            assert_eq!(got.logits, expected.logits, "{family}");
            assert_eq!(got.ids, expected.ids, "{family}");
        }
    }
}

/// The weights of a quantised file as floats, in a folder of their own.
fn dequantised(path: &Path, synthetic: &Synthetic, to: &Path) {
    let mut file = File::open(path).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let names = |name: &str| content.tensor(&mut File::open(path).unwrap(), name, &Device::Cpu).unwrap();
    let config: Json = serde_json::from_str(&synthetic.config_json()).unwrap();
    let mut tensors = synthetic.tensors(Layout::EachExpert);
    // Every tensor is found again by writing its index in place of its values.
    let keys: Vec<String> = tensors.keys().cloned().collect();
    let marked: Tensors = keys.iter().map(|key| (key.clone(), tensors[key].clone())).collect();
    for (name, original) in gguf_tensors(&config, &marked) {
        let values = names(&name).dequantize(&Device::Cpu).unwrap();
        assert_eq!(values.dims(), original.dims());
        let original: Vec<f32> = original.flatten_all().unwrap().to_vec1().unwrap();
        let values: Vec<f32> = values.flatten_all().unwrap().to_vec1().unwrap();
        for key in &keys {
            let len = marked[key].1.len();
            if let Some(at) = (0..original.len() / len).find(|i| original[i * len..][..len] == marked[key].1) {
                tensors.get_mut(key).unwrap().1.copy_from_slice(&values[at * len..][..len]);
            }
        }
    }
    synthetic.write_config(to);
    write_single(to, &tensors, WeightDtype::BF16);
}

#[test]
fn a_quantised_file_is_the_model_of_its_weights() {
    let mixed: Kind = |name| match name {
        // Value and query differ, so they share a matrix as floats; one projection of the experts is of a third kind.
        name if name.contains("attn_v") => GgmlDType::Q6K,
        name if name.contains("ffn_down") => GgmlDType::Q8_0,
        _ => GgmlDType::Q4K,
    };
    let kinds: [(&str, Kind); 3] = [("q8_0", |_| GgmlDType::Q8_0), ("q4_k", |_| GgmlDType::Q4K), ("mixed", mixed)];
    for (name, kind) in kinds {
        for family in ["qwen3_moe", "olmoe"] {
            let (folder, floats, synthetic) = (folder(), folder(), wide(family));
            let path = folder.path().join("model.gguf");
            write(&path, &synthetic, kind);
            dequantised(&path, &synthetic, floats.path());
            let decoder = load(&path, DtypeChoice::Auto);
            assert_eq!(decoder.dtype(), WeightDtype::BF16);
            let formats = decoder.weight_formats().to_string();
            assert_eq!(
                formats,
                if name == "mixed" { "bfloat16, q4_k, q8_0".into() } else { format!("bfloat16, {name}") }
            );
            let got = run(&decoder, &ids(9), 9, BLOCK_SIZE);
            let expected = run(&load(floats.path(), DtypeChoice::BFloat16), &ids(9), 9, BLOCK_SIZE);
            // Activations are rounded to eight bits beside quantised weights; wrong weights would route at random.
            let same = got.ids.iter().zip(&expected.ids).filter(|(got, expected)| got == expected).count();
            assert!(same >= 7, "{family} {name}: {same} of 9 rows routed alike");
            let distance = relative_distance(&got.logits, &expected.logits);
            assert!(distance < 0.05, "{family} {name}: logits differ by {distance} of their size");
            // As floats of another dtype it loads, too.
            assert_eq!(load(&path, DtypeChoice::Float32).weight_formats().to_string(), "float32");
        }
    }
}

/// Euclidean, relative to the second; both are bits, row by row.
fn relative_distance(got: &[Vec<u32>], expected: &[Vec<u32>]) -> f32 {
    let values = |rows: &[Vec<u32>]| -> Vec<f32> { rows.iter().flatten().map(|&bits| f32::from_bits(bits)).collect() };
    let (got, expected) = (values(got), values(expected));
    let norm = |values: &[f32]| values.iter().map(|value| value * value).sum::<f32>().sqrt();
    let differences: Vec<f32> = got.iter().zip(&expected).map(|(got, expected)| got - expected).collect();
    norm(&differences) / norm(&expected)
}

#[test]
fn int8_routes_nearly_as_bfloat16() {
    let folder = folder();
    wide("qwen3_moe").write(folder.path(), Layout::EachExpert);
    let choice = |dtype| WeightChoice { dtype, quantization: Some(Quantization::Int8) };
    let int8 = load(folder.path(), choice(DtypeChoice::Auto));
    assert_eq!((int8.dtype(), int8.weight_formats().to_string().as_str()), (WeightDtype::BF16, "int8"));
    let bf16 = load(folder.path(), DtypeChoice::BFloat16);
    assert!(int8.weight_bytes() < bf16.weight_bytes() * 6 / 10);
    let (got, expected) = (run(&int8, &ids(30), 30, BLOCK_SIZE), run(&bf16, &ids(30), 30, BLOCK_SIZE));
    assert_ne!(got.logits, expected.logits);
    let same = got.ids.iter().zip(&expected.ids).filter(|(got, expected)| got == expected).count();
    assert!(same >= 20, "{same} of 30 rows routed alike");
    // What serves loads its updates in the same way.
    assert_eq!(int8.weight_choice(), choice(DtypeChoice::BFloat16));
    let refused = |path: &Path, choice: WeightChoice| {
        let open = Checkpoint::open(path.to_str().unwrap(), None).unwrap();
        open.load(choice, false).err().unwrap().to_string()
    };
    let error = refused(folder.path(), choice(DtypeChoice::Float32));
    assert!(error.contains("quantization int8 goes with dtype bfloat16"), "{error}");
    let path = folder.path().join("model.gguf");
    write(&path, &wide("qwen3_moe"), |_| GgmlDType::Q8_0);
    assert!(refused(&path, choice(DtypeChoice::Auto)).contains("quantised already"));
}

#[test]
fn the_files_of_a_split_model_belong_together() {
    let folder = folder();
    let synthetic = Synthetic::new("qwen3_moe");
    let path = folder.path().join("whole.gguf");
    write(&path, &synthetic, plain);
    let content = gguf_file::Content::read(&mut File::open(&path).unwrap()).unwrap();
    let mut names: Vec<&String> = content.tensor_infos.keys().collect();
    names.sort();
    let (first, second) = names.split_at(names.len() / 2);
    for (index, names) in [first, second].into_iter().enumerate() {
        let tensor = |name: &&String| content.tensor(&mut File::open(&path).unwrap(), name, &Device::Cpu).unwrap();
        let tensors: Vec<QTensor> = names.iter().map(tensor).collect();
        let tensors: Vec<(&str, &QTensor)> = names.iter().map(|name| name.as_str()).zip(&tensors).collect();
        let metadata: Vec<(&str, &Value)> = match index {
            0 => content.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect(),
            _ => Vec::new(),
        };
        let part = folder.path().join(format!("m-{:05}-of-00002.gguf", index + 1));
        gguf_file::write(&mut File::create(part).unwrap(), &metadata, &tensors).unwrap();
    }
    let run_of = |path: &Path| run(&load(path, DtypeChoice::Auto), &ids(9), 9, BLOCK_SIZE).logits;
    let second = folder.path().join("m-00002-of-00002.gguf");
    assert_eq!(run_of(&second), run_of(&path));
    std::fs::remove_file(&second).unwrap();
    let first = folder.path().join("m-00001-of-00002.gguf");
    let error = Checkpoint::open(first.to_str().unwrap(), None).err().unwrap().to_string();
    assert!(error.contains("m-00002-of-00002.gguf") && error.contains("not there"), "{error}");
}

#[test]
fn no_damage_to_a_file_panics() {
    let folder = folder();
    let path = folder.path().join("model.gguf");
    write(&path, &Synthetic::new("mixtral"), plain);
    let good = std::fs::read(&path).unwrap();
    let content = gguf_file::Content::read(&mut File::open(&path).unwrap()).unwrap();
    let header = content.tensor_data_offset as usize;
    let open = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let open = Checkpoint::open(path.to_str().unwrap(), None)?.with_max_positions(64);
        open.load(DtypeChoice::Auto, false)
    };
    for step in 0..400usize {
        let mut bytes = good.clone();
        bytes[step * 7919 % header] ^= 1 << (step % 8);
        let _ = open(&bytes);
    }
    for cut in (0..header).step_by(97).chain([good.len() - 64]) {
        assert!(open(&good[..cut]).is_err(), "cut at {cut}");
    }
    assert!(open(&good).is_ok());
}
