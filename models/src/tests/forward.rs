//! The forward pass: schedules, dense layers, rows and refusals.

use moetrail_kernels::{RingCells, SeqSpan, WeightDtype};
use serde_json::json;

use super::{BLOCK_SIZE, bits, folder, ids, load, one_token, run, written};
use crate::{DtypeChoice, StepInput};
use moetrail_synthetic::{Layout, Synthetic, write_single};

#[test]
fn chunks_and_blocks_change_no_bit() {
    for family in ["qwen3_moe", "olmoe", "mixtral"] {
        let folder = written(&Synthetic::new(family), Layout::EachExpert);
        for dtype in [DtypeChoice::Float32, DtypeChoice::BFloat16, DtypeChoice::Float16] {
            let decoder = load(&folder, dtype);
            let whole = run(&decoder, &ids(21), 21, 4);
            for (chunk, block_size) in [(1, 4), (5, 1), (8, 16)] {
                let other = run(&decoder, &ids(21), chunk, block_size);
                assert_eq!(other.logits, whole.logits, "{family} {dtype:?} chunk {chunk} block {block_size}");
                assert_eq!(other.ids, whole.ids);
            }
        }
    }
}

#[test]
fn capture_changes_no_bit_and_writes_only_the_slots_of_the_step() {
    let decoder = load(&written(&Synthetic::new("qwen3_moe"), Layout::EachExpert), DtypeChoice::Auto);
    let tokens = ids(6);
    let positions = [0, 1, 2, 0, 1, 2];
    let slots = [8, 9, 10, 3, 2, 1];
    // The second sequence lies backwards in its block, which only a table of one-slot blocks can say.
    let tables: [&[u32]; 2] = [&[8, 9, 10], &[3, 2, 1]];
    let seqs = [0, 1].map(|i| SeqSpan { rows: 3 * i..3 * i + 3, first_position: 0, block_table: tables[i] });
    let input = StepInput {
        token_ids: &tokens,
        positions: &positions,
        slot_mapping: &slots,
        seqs: &seqs,
        logit_rows: &[5, 2],
        replay: None,
        awaited: None,
    };
    let free = decoder.forward(&input, &mut decoder.new_kv(12, 1).unwrap(), None).unwrap();
    let width = 3 * 2;
    let mut ring = vec![u8::MAX; 12 * width];
    let cells = RingCells::U8(&mut ring);
    let captured = decoder.forward(&input, &mut decoder.new_kv(12, 1).unwrap(), Some(cells.into())).unwrap();
    assert_eq!(bits(&captured.logits), bits(&free.logits));
    assert_eq!(captured.logits.dims(), [2, 96]);
    for slot in 0..12u32 {
        let row = &ring[slot as usize * width..][..width];
        let written = slots.contains(&slot);
        assert!(row.iter().all(|&id| if written { id < 6 } else { id == u8::MAX }), "slot {slot}: {row:?}");
    }
    // Each sequence by itself gives the same logits: rows 5 and 2 are the last of the second and the first.
    let alone = |range: std::ops::Range<usize>| run(&decoder, &tokens[range], 3, BLOCK_SIZE).logits[2].clone();
    assert_eq!(bits(&free.logits), [alone(3..6), alone(0..3)]);
}

#[test]
fn dense_layers_have_no_place_in_the_ring() {
    let synthetic = Synthetic::new("qwen3_moe").set("mlp_only_layers", json!([1]));
    let decoder = load(&written(&synthetic, Layout::EachExpert), DtypeChoice::Auto);
    assert_eq!(decoder.config().moe_layers, [0, 2]);
    let routed = run(&decoder, &ids(4), 4, BLOCK_SIZE).ids;
    assert!(routed.iter().all(|row| row.len() == 4 && row.iter().all(|&id| id < 6)));

    let dense = Synthetic::new("qwen3_moe").set("mlp_only_layers", json!([0, 1, 2]));
    let decoder = load(&written(&dense, Layout::EachExpert), DtypeChoice::Auto);
    assert!(decoder.config().moe_layers.is_empty());
    assert_eq!(run(&decoder, &ids(4), 4, BLOCK_SIZE).ids, vec![Vec::<u16>::new(); 4]);
}

#[test]
fn biases_of_attention_count() {
    let plain = Synthetic::new("olmoe");
    let biased = plain.clone().set("attention_bias", json!(true));
    let logits = |synthetic: &Synthetic| {
        run(&load(&written(synthetic, Layout::EachExpert), DtypeChoice::Auto), &ids(4), 4, BLOCK_SIZE).logits
    };
    assert_ne!(logits(&plain), logits(&biased));
    // Biases of zero are none.
    let mut tensors = biased.tensors(Layout::EachExpert);
    let zero = tensors.iter_mut().filter(|(name, _)| name.ends_with(".bias"));
    assert_eq!(zero.map(|(_, (_, values))| values.fill(0.0)).count(), 12);
    let folder = folder();
    biased.write_config(folder.path());
    write_single(folder.path(), &tensors, WeightDtype::F32);
    assert_eq!(run(&load(&folder, DtypeChoice::Auto), &ids(4), 4, BLOCK_SIZE).logits, logits(&plain));
}

#[test]
fn a_row_whose_router_sees_nan_is_named() {
    let synthetic = Synthetic::new("mixtral");
    let mut tensors = synthetic.tensors(Layout::EachExpert);
    let (_, table) = tensors.get_mut("model.embed_tokens.weight").unwrap();
    table[7 * 48] = f32::NAN;
    let folder = folder();
    synthetic.write_config(folder.path());
    write_single(folder.path(), &tensors, WeightDtype::F32);
    let decoder = load(&folder, DtypeChoice::Auto);
    let seqs = [0u32, 1, 2].map(|i| (i, [i]));
    let seqs = seqs.each_ref().map(|(i, table)| SeqSpan {
        rows: *i as usize..*i as usize + 1,
        first_position: 0,
        block_table: table,
    });
    let input = StepInput {
        token_ids: &[3, 7, 5],
        positions: &[0, 0, 0],
        slot_mapping: &[0, 4, 8],
        seqs: &seqs,
        logit_rows: &[0],
        replay: None,
        awaited: None,
    };
    let output = decoder.forward(&input, &mut decoder.new_kv(3, BLOCK_SIZE).unwrap(), None).unwrap();
    assert_eq!(output.nan_rows, [1]);
    assert!(bits(&output.logits)[0].iter().all(|&bits| f32::from_bits(bits).is_finite()));
}

#[test]
fn steps_that_do_not_fit_are_refused() {
    let decoder = load(&written(&Synthetic::new("qwen3_moe"), Layout::EachExpert), DtypeChoice::Auto);
    let table = [0u32, 1];
    let seqs = [SeqSpan { rows: 0..2, first_position: 0, block_table: &table }];
    let good = StepInput {
        token_ids: &[1, 2],
        positions: &[0, 1],
        slot_mapping: &[0, 1],
        seqs: &seqs,
        logit_rows: &[1],
        replay: None,
        awaited: None,
    };
    let mut kv = decoder.new_kv(2, BLOCK_SIZE).unwrap();
    decoder.forward(&good, &mut kv, None).unwrap();
    let short = [SeqSpan { rows: 0..1, first_position: 0, block_table: &table }];
    let wrong: [(StepInput<'_>, &str); 8] = [
        (StepInput { token_ids: &[1, 96], ..good }, "token_ids: expected values below 96, found 96"),
        (StepInput { positions: &[0, 128], ..good }, "positions: expected values below 128"),
        (StepInput { positions: &[0], ..good }, "positions: expected 2"),
        (StepInput { slot_mapping: &[0, 8], ..good }, "slot_mapping: expected values below 8"),
        (StepInput { slot_mapping: &[0, 1, 2], ..good }, "slot_mapping: expected 2"),
        (StepInput { logit_rows: &[2], ..good }, "logit_rows: expected values below 2"),
        (StepInput { seqs: &short, ..good }, "rows of seqs: expected 2"),
        (StepInput { seqs: &[], ..good }, "rows of seqs: expected 2"),
    ];
    for (input, expected) in wrong {
        let error = decoder.forward(&input, &mut kv, None).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    // What a table of blocks can get wrong is the kernels' to refuse.
    for table in [&[0u32][..0], &[2], &[u32::MAX]] {
        let seqs = [SeqSpan { rows: 0..2, first_position: 0, block_table: table }];
        decoder.forward(&StepInput { seqs: &seqs, ..good }, &mut kv, None).unwrap_err();
    }
    let mut ring = vec![0u8; 8 * 6 - 1];
    let error = decoder.forward(&good, &mut kv, Some(RingCells::U8(&mut ring).into())).unwrap_err().to_string();
    assert!(error.contains("ring: expected 8 slots of 6 cells, found 47 cells"), "{error}");

    let nothing = StepInput {
        token_ids: &[],
        positions: &[],
        slot_mapping: &[],
        seqs: &[],
        logit_rows: &[],
        replay: None,
        awaited: None,
    };
    assert_eq!(decoder.forward(&nothing, &mut kv, None).unwrap().logits.dims(), [0, 96]);
    one_token(&decoder, &mut kv, 95).unwrap();
}

#[test]
fn the_cache_is_as_large_as_it_says() {
    let decoder = load(&written(&Synthetic::new("qwen3_moe"), Layout::EachExpert), DtypeChoice::BFloat16);
    // K and V, 3 layers, 2 heads of 16, 2 bytes.
    assert_eq!(decoder.kv_bytes_per_block(4), 2 * 3 * 4 * 2 * 16 * 2);
    assert_eq!(decoder.new_kv(5, 4).unwrap().bytes(), 5 * decoder.kv_bytes_per_block(4));
}
