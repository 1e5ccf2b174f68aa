//! Given experts: the model's own change nothing, others are taken as they are.

use std::collections::BTreeSet;
use std::path::Path;

use moetrail_kernels::{SeqSpan, WeightDtype};
use serde_json::json;

use super::{BLOCK_SIZE, Run, folder, ids, load, replayed, run, written};
use crate::{Checkpoint, Decoder, DtypeChoice, Replay, StepInput};
use moetrail_synthetic::{Layout, Synthetic, write_single};

/// Every family; a dense layer between sparse ones; ids that need two bytes.
fn small() -> [Synthetic; 4] {
    [
        Synthetic::new("qwen3_moe").set("mlp_only_layers", json!([1])),
        Synthetic::new("qwen3_moe").set("num_experts", json!(300)).set("num_experts_per_tok", json!(8)),
        Synthetic::new("olmoe"),
        Synthetic::new("mixtral"),
    ]
}

/// The small ones, and a golden checkpoint of every family; the first of those has a dense layer.
fn models() -> Vec<(String, Decoder)> {
    let small = small();
    let small = small.iter().map(|synthetic| {
        (synthetic.config_json(), load(&written(synthetic, Layout::EachExpert), DtypeChoice::Float32))
    });
    let golden = ["qwen3_moe-b", "olmoe-b", "mixtral-b"].map(|name| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name);
        (name.to_owned(), Checkpoint::open_folder(&folder, name).unwrap().load(DtypeChoice::Auto, false).unwrap())
    });
    small.chain(golden).collect()
}

fn as_given(rows: &[Vec<u16>]) -> Vec<Option<Vec<u16>>> {
    rows.iter().cloned().map(Some).collect()
}

#[test]
fn the_captured_rows_give_the_same_bits() {
    for (name, decoder) in models() {
        let free = run(&decoder, &ids(21), 21, BLOCK_SIZE);
        assert!(free.changed_cells.is_empty());
        let mut rows = as_given(&free.ids);
        for chunk in [21, 5] {
            let again = replayed(&decoder, &ids(21), Some(&rows), chunk, BLOCK_SIZE);
            assert_eq!((&again.logits, &again.ids), (&free.logits, &free.ids), "{name} chunk {chunk}");
            assert_eq!(again.changed_cells, [0; 21], "{name} chunk {chunk}");
            // Then with free rows among them, and a chunk that is free throughout.
            rows[3] = None;
            rows[5..10].fill(None);
        }
    }
}

/// Position `i` takes the row of `i + 1`; the last three stay free.
fn shifted(free: &Run) -> Vec<Option<Vec<u16>>> {
    (0..free.ids.len()).map(|i| (i + 3 < free.ids.len()).then(|| free.ids[i + 1].clone())).collect()
}

/// Cells of a row whose sets differ.
fn differing(own: &[u16], given: &[u16], top_k: usize) -> u32 {
    let set = |cell: &[u16]| cell.iter().copied().collect::<BTreeSet<u16>>();
    own.chunks(top_k).zip(given.chunks(top_k)).filter(|(own, given)| set(own) != set(given)).count() as u32
}

#[test]
fn other_rows_are_taken_as_given_whatever_the_chunks() {
    for (name, decoder) in models() {
        let tokens = ids(21);
        let top_k = decoder.config().num_experts_per_tok;
        let free = run(&decoder, &tokens, 21, BLOCK_SIZE);
        let given = shifted(&free);
        let whole = replayed(&decoder, &tokens, Some(&given), 21, BLOCK_SIZE);
        assert_ne!(whole.logits, free.logits, "{name}");
        for (i, row) in given.iter().enumerate() {
            let Some(row) = row else {
                assert_eq!(whole.changed_cells[i], 0, "{name} position {i} is free");
                continue;
            };
            assert_eq!(&whole.ids[i], row, "{name} position {i}");
            // No expert has run before the first router, so that it would have chosen as in the free run.
            let (first, layers) = (..top_k, row.len() / top_k);
            let least = differing(&free.ids[i][first], &row[first], top_k);
            assert!((least..=least + layers as u32 - 1).contains(&whole.changed_cells[i]), "{name} position {i}");
        }
        for chunk in [1, 4] {
            let other = replayed(&decoder, &tokens, Some(&given), chunk, BLOCK_SIZE);
            assert_eq!((&other.logits, &other.ids), (&whole.logits, &whole.ids), "{name} chunk {chunk}");
            assert_eq!(other.changed_cells, whole.changed_cells, "{name} chunk {chunk}");
        }
    }
}

/// Where experts add nothing, no router depends on what the routers below it are given: the free run then says what each
/// would have chosen.
#[test]
fn every_cell_whose_set_differs_is_counted() {
    for synthetic in small() {
        let mut tensors = synthetic.tensors(Layout::EachExpert);
        let is_down = |name: &str| name.contains(".experts.") && (name.contains("down_proj") || name.contains(".w2."));
        let down = tensors.iter_mut().filter(|(name, _)| is_down(name));
        assert!(down.map(|(_, (_, values))| values.fill(0.0)).count() > 0);
        let folder = folder();
        synthetic.write_config(folder.path());
        write_single(folder.path(), &tensors, WeightDtype::F32);
        let decoder = load(&folder, DtypeChoice::Auto);
        let top_k = decoder.config().num_experts_per_tok;
        let free = run(&decoder, &ids(21), 21, BLOCK_SIZE);
        let given = shifted(&free);
        let count = |(own, given): (&Vec<u16>, &Option<Vec<u16>>)| {
            given.as_ref().map_or(0, |given| differing(own, given, top_k))
        };
        let expected: Vec<u32> = free.ids.iter().zip(&given).map(count).collect();
        let layers = decoder.config().moe_layers.len() as u32;
        assert!(expected.iter().sum::<u32>() > layers, "{expected:?}");
        for chunk in [21, 4] {
            let got = replayed(&decoder, &ids(21), Some(&given), chunk, BLOCK_SIZE);
            assert_eq!(got.changed_cells, expected, "{} chunk {chunk}", synthetic.config_json());
        }
        // Another order is the same set.
        let reversed = |row: &Vec<u16>| row.chunks(top_k).flat_map(|cell| cell.iter().rev().copied()).collect();
        let reversed: Vec<Vec<u16>> = free.ids.iter().map(reversed).collect();
        let got = replayed(&decoder, &ids(21), Some(&as_given(&reversed)), 21, BLOCK_SIZE);
        assert_eq!((got.changed_cells, got.ids), (vec![0; 21], reversed));
    }
}

#[test]
fn replays_that_do_not_fit_are_refused() {
    let synthetic = Synthetic::new("qwen3_moe").set("mlp_only_layers", json!([1]));
    let decoder = load(&written(&synthetic, Layout::EachExpert), DtypeChoice::Auto);
    let seqs = [SeqSpan { rows: 0..2, first_position: 0, block_table: &[0] }];
    let good = Replay { row_of: &[Replay::FREE, 0], ids: &[5, 0, 1, 2] };
    let wrong: [(Replay<'_>, &str); 9] = [
        (Replay { row_of: &[0], ..good }, "replay.row_of: expected 2"),
        (Replay { row_of: &[0, 0, 0], ..good }, "replay.row_of: expected 2"),
        (Replay { row_of: &[0, 1], ..good }, "replay.row_of: expected values below 1, or none, found 1"),
        (Replay { ids: &[5, 0, 1], ..good }, "replay.ids: expected rows of 2 MoE layers with 2 ids each, found 3 ids"),
        (Replay { ids: &[5, 0, 1, 2, 3, 4], ..good }, "found 6 ids"),
        (Replay { ids: &[], ..good }, "replay.row_of: expected values below 0"),
        (Replay { ids: &[5, 0, 6, 2], ..good }, "replay.ids: expected values below 6, found 6"),
        (Replay { ids: &[5, 0, 1, u16::MAX], ..good }, "replay.ids: expected values below 6, found 65535"),
        (Replay { ids: &[5, 0, 2, 2], ..good }, "replay.ids: expected distinct experts in a cell, found [2, 2]"),
    ];
    let mut kv = decoder.new_kv(1, BLOCK_SIZE).unwrap();
    let mut forward = |replay| {
        let input = StepInput {
            token_ids: &[1, 2],
            positions: &[0, 1],
            slot_mapping: &[0, 1],
            seqs: &seqs,
            logit_rows: &[],
            replay: Some(replay),
            awaited: None,
        };
        decoder.forward(&input, &mut kv, None).map_err(|error| error.to_string())
    };
    for (replay, expected) in wrong {
        let error = forward(replay).unwrap_err();
        assert!(error.contains(expected), "{replay:?}: {error}");
    }
    let changed = forward(good).unwrap().changed_cells;
    assert!(changed[0] == 0 && changed.len() == 2, "{changed:?}");
}
