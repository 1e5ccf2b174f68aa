//! However a checkpoint is stored, it is the same model to the last bit.

use moetrail_kernels::WeightDtype;
use serde_json::json;

use super::{BLOCK_SIZE, folder, ids, load, run, written};
use crate::{Checkpoint, DtypeChoice};
use moetrail_synthetic::{Layout, Synthetic, write_shards, write_single};

const FAMILIES: [&str; 3] = ["qwen3_moe", "olmoe", "mixtral"];

#[test]
fn fused_experts_equal_separate_ones() {
    for family in FAMILIES {
        let synthetic = Synthetic::new(family);
        let logits =
            |layout| run(&load(&written(&synthetic, layout), DtypeChoice::Auto), &ids(9), 9, BLOCK_SIZE).logits;
        let expected = logits(Layout::EachExpert);
        assert_eq!(logits(Layout::Fused), expected, "{family}");
        assert_eq!(logits(Layout::FusedTurned), expected, "{family}");
    }
}

#[test]
fn a_shape_that_fits_both_fused_layouts_is_read_as_transformers_reads_it() {
    // 2 * 24 = 48 = hidden: gate_up fits both, so that down decides; and with inter = hidden, gate_up does.
    for width in [24, 48] {
        let synthetic = Synthetic::new("qwen3_moe").set("moe_intermediate_size", json!(width));
        let logits =
            |layout| run(&load(&written(&synthetic, layout), DtypeChoice::Auto), &ids(9), 9, BLOCK_SIZE).logits;
        let expected = logits(Layout::EachExpert);
        assert_eq!(logits(Layout::Fused), expected);
        assert_eq!(logits(Layout::FusedTurned), expected);
    }
}

#[test]
fn shards_equal_a_single_file() {
    let synthetic = Synthetic::new("qwen3_moe");
    let expected = run(&load(&written(&synthetic, Layout::EachExpert), DtypeChoice::Auto), &ids(9), 9, BLOCK_SIZE);
    for count in [1, 3] {
        let folder = folder();
        synthetic.write_config(folder.path());
        write_shards(folder.path(), &synthetic.tensors(Layout::EachExpert), WeightDtype::F32, count);
        let sharded = run(&load(&folder, DtypeChoice::Auto), &ids(9), 9, BLOCK_SIZE);
        assert_eq!(sharded.logits, expected.logits);
        assert_eq!(sharded.ids, expected.ids);
    }
}

#[test]
fn the_stored_dtype_does_not_matter_to_the_packed_one() {
    let synthetic = Synthetic::new("olmoe");
    let mut by_choice = Vec::new();
    for choice in [DtypeChoice::Float32, DtypeChoice::BFloat16, DtypeChoice::Float16] {
        let logits = [WeightDtype::F32, WeightDtype::BF16].map(|stored| {
            let folder = folder();
            synthetic.write_config(folder.path());
            write_single(folder.path(), &synthetic.tensors(Layout::EachExpert), stored);
            let decoder = load(&folder, choice);
            assert_eq!(decoder.dtype(), choice.resolve(WeightDtype::F32));
            run(&decoder, &ids(5), 5, BLOCK_SIZE).logits
        });
        assert_eq!(logits[0], logits[1], "{choice:?}");
        by_choice.push(logits[0].clone());
    }
    // The packed dtypes are near each other, and not the same.
    for other in &by_choice[1..] {
        assert_ne!(*other, by_choice[0]);
        for (a, b) in other.iter().flatten().zip(by_choice[0].iter().flatten()) {
            let (a, b) = (f32::from_bits(*a), f32::from_bits(*b));
            assert!((a - b).abs() < 0.2, "{a} against {b}");
        }
    }
}

#[test]
fn auto_is_the_configurations_dtype_then_the_tensors() {
    let check = |synthetic: Synthetic, stored, expected| {
        let folder = folder();
        synthetic.write_config(folder.path());
        write_single(folder.path(), &synthetic.tensors(Layout::EachExpert), stored);
        let checkpoint = Checkpoint::open_folder(folder.path(), "test").unwrap();
        assert_eq!(checkpoint.own_dtype(), expected);
    };
    let synthetic = || Synthetic::new("qwen3_moe");
    check(synthetic(), WeightDtype::BF16, WeightDtype::F32);
    check(synthetic().set("dtype", json!("bfloat16")), WeightDtype::F32, WeightDtype::BF16);
    check(synthetic().set("torch_dtype", json!(null)), WeightDtype::F16, WeightDtype::F16);
    check(synthetic().set("torch_dtype", json!("torch.float16")), WeightDtype::BF16, WeightDtype::F16);
}

#[test]
fn a_tied_head_is_the_embedding() {
    let tied = Synthetic::new("qwen3_moe").set("tie_word_embeddings", json!(true));
    let decoder = load(&written(&tied, Layout::EachExpert), DtypeChoice::Auto);
    let tied_run = run(&decoder, &ids(5), 5, BLOCK_SIZE);
    // The same model with the table stored twice, tied or not.
    let mut tensors = tied.tensors(Layout::EachExpert);
    let table = tensors["model.embed_tokens.weight"].clone();
    tensors.insert("lm_head.weight".into(), table);
    for tie in [true, false] {
        let folder = folder();
        tied.clone().set("tie_word_embeddings", json!(tie)).write_config(folder.path());
        write_single(folder.path(), &tensors, WeightDtype::F32);
        let stored_twice = load(&folder, DtypeChoice::Auto);
        assert_eq!(run(&stored_twice, &ids(5), 5, BLOCK_SIZE).logits, tied_run.logits);
        // 96 tokens are padded to two panels of 64 rows, a width of 48 to two chunks of 32.
        let table_bytes = 128 * 64 * 4;
        let expected = decoder.weight_bytes() + if tie { 0 } else { table_bytes };
        assert_eq!(stored_twice.weight_bytes(), expected);
    }
    // A stored head that differs wins over the configuration, as in transformers.
    tensors.get_mut("lm_head.weight").unwrap().1[0] += 1.0;
    let folder = folder();
    tied.write_config(folder.path());
    write_single(folder.path(), &tensors, WeightDtype::F32);
    assert_ne!(run(&load(&folder, DtypeChoice::Auto), &ids(5), 5, BLOCK_SIZE).logits, tied_run.logits);
}

#[test]
fn a_bare_decoder_loads_without_the_prefix() {
    for family in FAMILIES {
        let tied = Synthetic::new(family).set("tie_word_embeddings", json!(true));
        let expected = run(&load(&written(&tied, Layout::Fused), DtypeChoice::Auto), &ids(5), 5, BLOCK_SIZE);
        let bare = tied.tensors(Layout::Fused).into_iter();
        let bare = bare.map(|(name, tensor)| (name.strip_prefix("model.").unwrap().to_owned(), tensor)).collect();
        let folder = folder();
        tied.clone().set("architectures", json!(["SomeModel"])).write_config(folder.path());
        write_single(folder.path(), &bare, WeightDtype::F32);
        assert_eq!(run(&load(&folder, DtypeChoice::Auto), &ids(5), 5, BLOCK_SIZE).logits, expected.logits, "{family}");
    }
}

#[test]
fn tensors_that_nothing_calls_for_are_left_out() {
    let synthetic = Synthetic::new("mixtral");
    let expected = run(&load(&written(&synthetic, Layout::EachExpert), DtypeChoice::Auto), &ids(5), 5, BLOCK_SIZE);
    let mut tensors = synthetic.tensors(Layout::EachExpert);
    for extra in ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.3.input_layernorm.weight"] {
        tensors.insert(extra.into(), (vec![2], vec![1.0, 2.0]));
    }
    let folder = folder();
    synthetic.write_config(folder.path());
    write_single(folder.path(), &tensors, WeightDtype::F32);
    assert_eq!(run(&load(&folder, DtypeChoice::Auto), &ids(5), 5, BLOCK_SIZE).logits, expected.logits);
}
