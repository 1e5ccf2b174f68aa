//! Reading `config.json`, as written over the years.

use std::path::Path;

use moetrail_kernels::WeightDtype;
use serde_json::{Value, json};

use super::written;
use crate::{Checkpoint, GenerationConfig, ModelConfig, QkNormKind, RopeScaling};
use moetrail_synthetic::{Layout, Synthetic};

fn read(synthetic: &Synthetic) -> crate::Result<ModelConfig> {
    ModelConfig::from_json(Path::new("config.json"), &synthetic.config_json())
}

fn good(synthetic: &Synthetic) -> ModelConfig {
    read(synthetic).unwrap()
}

#[test]
fn families_differ_where_they_should() {
    let qwen = good(&Synthetic::new("qwen3_moe"));
    assert_eq!((qwen.qk_norm, qwen.norm_topk_prob, qwen.head_dim), (QkNormKind::PerHead, true, 16));
    assert_eq!((qwen.moe_intermediate_size, qwen.intermediate_size), (24, 40));
    let olmoe = good(&Synthetic::new("olmoe").set("clip_qkv", json!(8.0)));
    assert_eq!((olmoe.qk_norm, olmoe.norm_topk_prob, olmoe.head_dim), (QkNormKind::FullWidth, false, 12));
    assert_eq!((olmoe.moe_intermediate_size, olmoe.clip_qkv), (24, Some(8.0)));
    let mixtral = good(&Synthetic::new("mixtral").set("sliding_window", json!(7)));
    assert_eq!((mixtral.qk_norm, mixtral.norm_topk_prob, mixtral.num_experts), (QkNormKind::None, true, 6));
    assert_eq!((mixtral.sliding_window, mixtral.attention_bias), (Some(7), false));
    assert_eq!((mixtral.eos_token_ids, mixtral.bos_token_id), (vec![2], Some(0)));
}

#[test]
fn dense_layers_follow_both_keys() {
    let layers = |step: Value, dense: Value| {
        let synthetic = Synthetic::new("qwen3_moe").set("num_hidden_layers", json!(6));
        good(&synthetic.set("decoder_sparse_step", step).set("mlp_only_layers", dense)).moe_layers
    };
    assert_eq!(layers(json!(1), json!([])), [0, 1, 2, 3, 4, 5]);
    assert_eq!(layers(json!(2), json!(null)), [1, 3, 5]);
    assert_eq!(layers(json!(2), json!([3, 99])), [1, 5]);
    let none = Synthetic::new("qwen3_moe").set("num_experts", json!(0)).set("num_experts_per_tok", json!(0));
    assert!(good(&none).moe_layers.is_empty());
}

#[test]
fn a_sliding_window_of_qwen_needs_its_switch() {
    let windowed = Synthetic::new("qwen3_moe").set("sliding_window", json!(64));
    assert_eq!(good(&windowed).sliding_window, None);
    assert_eq!(good(&windowed.set("use_sliding_window", json!(true))).sliding_window, Some(64));
}

#[test]
fn old_and_new_keys_say_the_same() {
    let new = Synthetic::new("qwen3_moe")
        .set("rope_theta", json!(null))
        .set("rope_parameters", json!({ "rope_type": "default", "rope_theta": 1e6 }))
        .set("torch_dtype", json!(null))
        .set("dtype", json!("bfloat16"))
        .set("num_experts", json!(null))
        .set("num_local_experts", json!(6));
    let new = good(&new);
    assert_eq!((new.rope.theta, new.rope.scaling, new.num_experts), (1e6, RopeScaling::Default, 6));
    assert_eq!(new.dtype, Some(WeightDtype::BF16));
    // A base inside the object wins over one beside it; the old object's type may be called `type`.
    let both =
        Synthetic::new("mixtral").set("rope_scaling", json!({ "type": "linear", "factor": 2, "rope_theta": 5e5 }));
    let both = good(&both);
    assert_eq!((both.rope.theta, both.rope.scaling.clone()), (5e5, RopeScaling::Linear { factor: 2.0 }));
    assert_eq!(both.max_model_len(), 256);
    assert_eq!(good(&Synthetic::new("mixtral").set("rope_theta", json!(null))).rope.theta, 1e6);
    assert_eq!(good(&Synthetic::new("olmoe").set("rope_theta", json!(null))).rope.theta, 1e4);
}

#[test]
fn rope_frequencies_are_those_of_transformers() {
    // Transformers 5.23, Qwen3MoeRotaryEmbedding, head_dim 32, max_position_embeddings 40960.
    let cases = [
        (
            json!({ "rope_type": "default", "rope_theta": 1e6 }),
            [1.0, 0.421696514, 0.0749894157, 0.00562341325, 0.000421696488, 2.37137374e-06],
            1.0,
        ),
        (
            json!({ "rope_type": "linear", "factor": 4.0, "rope_theta": 1e4 }),
            [0.25, 0.140585333, 0.0444569848, 0.00790569466, 0.00140585331, 4.44569851e-05],
            1.0,
        ),
        (
            json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192, "rope_theta": 5e5 }),
            [1.0, 0.440366626, 0.0853971019, 0.00729266508, 7.78465546e-05, 5.6770881e-07],
            1.0,
        ),
        (
            json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6 }),
            [1.0, 0.421696514, 0.0749894157, 0.00477990136, 0.000168678584, 5.92843435e-07],
            1.138629436111989,
        ),
        (
            json!({ "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "rope_theta": 1e4,
                    "mscale": 1.0, "mscale_all_dim": 0.707, "beta_fast": 16, "beta_slow": 2, "truncate": false }),
            [1.0, 0.562341332, 0.177827939, 0.0316227786, 0.00173821871, 4.44569832e-06],
            1.0857263992561355,
        ),
    ];
    for (rope, expected, scaling) in cases {
        let synthetic = Synthetic::new("qwen3_moe")
            .set("max_position_embeddings", json!(40960))
            .set("rope_theta", json!(null))
            .set("rope_parameters", rope.clone());
        let config = good(&synthetic).rope;
        let found = config.inv_freq(32);
        for (at, expected) in [0, 1, 3, 6, 9, 15].into_iter().zip(expected) {
            let relative = (f64::from(found[at]) - expected).abs() / expected;
            assert!(relative < 3e-7, "{rope}: frequency {at} is {}, expected {expected}", found[at]);
        }
        assert!((f64::from(config.attention_scaling()) - scaling).abs() < 1e-7, "{rope}");
    }
}

#[test]
fn wrong_values_name_file_and_key() {
    let wrong = |family, key: &str, value: Value, parts: &[&str]| {
        let error = read(&Synthetic::new(family).set(key, value)).unwrap_err().to_string();
        for part in [&["config.json"], parts].concat() {
            assert!(error.contains(part), "{error:?} lacks {part:?}");
        }
    };
    let supported = "Qwen3MoeForCausalLM, OlmoeForCausalLM, MixtralForCausalLM";
    wrong("qwen3_moe", "architectures", json!(["LlamaForCausalLM"]), &["LlamaForCausalLM", supported]);
    wrong("qwen3_moe", "architectures", json!("Qwen3MoeForCausalLM"), &["architectures", "a list of strings"]);
    wrong("qwen3_moe", "num_experts_per_tok", json!(7), &["num_experts_per_tok", "1..=6", "found 7"]);
    wrong("qwen3_moe", "num_experts_per_tok", json!(0), &["num_experts_per_tok", "found 0"]);
    wrong("qwen3_moe", "num_experts", json!(null), &["num_experts|num_local_experts", "found nothing"]);
    wrong("qwen3_moe", "num_experts", json!(70000), &["num_experts", "0..=65536", "found 70000"]);
    wrong("mixtral", "num_local_experts", json!(0), &["num_experts_per_tok"]);
    wrong("qwen3_moe", "num_key_value_heads", json!(3), &["num_key_value_heads", "divisor", "(4)", "found 3"]);
    wrong("qwen3_moe", "hidden_size", json!(0), &["hidden_size", "found 0"]);
    wrong("qwen3_moe", "hidden_size", json!(-5), &["hidden_size", "found -5"]);
    wrong("qwen3_moe", "hidden_size", json!("48"), &["hidden_size", "found \"48\""]);
    wrong("qwen3_moe", "hidden_size", json!(48.5), &["hidden_size", "found 48.5"]);
    wrong("qwen3_moe", "hidden_size", json!(u64::MAX), &["hidden_size", "18446744073709551615"]);
    wrong("qwen3_moe", "num_hidden_layers", json!(1u64 << 40), &["num_hidden_layers"]);
    wrong("qwen3_moe", "head_dim", json!(15), &["head_dim", "even"]);
    wrong("olmoe", "num_attention_heads", json!(10), &["num_attention_heads", "hidden_size (48)"]);
    wrong("qwen3_moe", "hidden_act", json!("gelu"), &["hidden_act", "silu", "gelu"]);
    wrong("qwen3_moe", "rms_norm_eps", json!(0), &["rms_norm_eps"]);
    wrong("qwen3_moe", "torch_dtype", json!("float8_e4m3fn"), &["torch_dtype", "float8_e4m3fn"]);
    wrong("qwen3_moe", "quantization_config", json!({ "quant_method": "fp8" }), &["quantization_config", "fp8"]);
    wrong("qwen3_moe", "tie_word_embeddings", json!(1), &["tie_word_embeddings", "true or false"]);
    wrong("qwen3_moe", "eos_token_id", json!([1, -2]), &["eos_token_id"]);
    wrong("qwen3_moe", "decoder_sparse_step", json!(0), &["decoder_sparse_step"]);
    wrong("qwen3_moe", "rope_theta", json!(1.0), &["rope_theta", "above 1"]);
    wrong("qwen3_moe", "partial_rotary_factor", json!(0.5), &["partial_rotary_factor"]);
    for kind in ["dynamic", "longrope", "proportional"] {
        let rope = json!({ "rope_type": kind, "factor": 2.0 });
        wrong("qwen3_moe", "rope_scaling", rope, &[kind, "default, linear, llama3, yarn"]);
    }
    wrong("qwen3_moe", "rope_scaling", json!({ "type": "linear" }), &["rope_scaling.factor", "found nothing"]);
    wrong("qwen3_moe", "rope_scaling", json!([1]), &["rope_scaling", "an object"]);
    let error = ModelConfig::from_json(Path::new("config.json"), "[]").unwrap_err().to_string();
    assert!(error.contains("a JSON object"), "{error}");
}

#[test]
fn the_generation_config_adds_ends_and_sampling() {
    let folder = written(&Synthetic::new("qwen3_moe"), Layout::EachExpert);
    let open = || Checkpoint::open_folder(folder.path(), "test");
    assert_eq!(*open().unwrap().generation(), GenerationConfig::default());
    assert_eq!(open().unwrap().eos_token_ids(), [2]);
    let text = json!({ "eos_token_id": [5, 2, 9], "do_sample": true, "temperature": 0.6, "top_p": 0.95, "top_k": 20,
                       "repetition_penalty": 1.05, "max_new_tokens": "ignored" });
    std::fs::write(folder.path().join("generation_config.json"), text.to_string()).unwrap();
    let checkpoint = open().unwrap();
    assert_eq!(checkpoint.eos_token_ids(), [5, 2, 9]);
    let generation = checkpoint.generation();
    assert_eq!((generation.do_sample, generation.temperature, generation.top_k), (Some(true), Some(0.6), Some(20)));
    assert_eq!((generation.top_p, generation.repetition_penalty), (Some(0.95), Some(1.05)));
    std::fs::write(folder.path().join("generation_config.json"), "{\"top_p\": \"high\"}").unwrap();
    let error = open().err().unwrap().to_string();
    assert!(error.contains("generation_config.json") && error.contains("top_p"), "{error}");
}

#[test]
fn positions_are_bounded_by_the_model_and_by_the_caller() {
    let folder = written(&Synthetic::new("qwen3_moe"), Layout::EachExpert);
    let loaded = |limit: Option<usize>| {
        let open = Checkpoint::open_folder(folder.path(), "test").unwrap();
        let open = match limit {
            Some(limit) => open.with_max_positions(limit),
            None => open,
        };
        open.load(crate::DtypeChoice::Auto, false).unwrap().max_positions()
    };
    assert_eq!([loaded(None), loaded(Some(50)), loaded(Some(1000))], [128, 50, 128]);
}
