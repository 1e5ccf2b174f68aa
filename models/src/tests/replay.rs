//! Given routing, at the seam where routing is captured.

use moetrail_kernels::{RouterReplay, SeqSpan};
use serde_json::json;

use super::{BLOCK_SIZE, ids, load, run, run_given, written};
use crate::{DtypeChoice, StepInput};
use moetrail_synthetic::{Layout, Synthetic};

fn models() -> Vec<Synthetic> {
    let dense_between = Synthetic::new("qwen3_moe").set("mlp_only_layers", json!([1]));
    let wide = Synthetic::new("qwen3_moe").set("num_experts", json!(300));
    vec![dense_between, wide, Synthetic::new("olmoe"), Synthetic::new("mixtral")]
}

#[test]
fn ones_own_routing_changes_no_bit() {
    for model in models() {
        let folder = written(&model, Layout::EachExpert);
        for dtype in [DtypeChoice::Float32, DtypeChoice::BFloat16] {
            let decoder = load(&folder, dtype);
            let free = run(&decoder, &ids(21), 21, BLOCK_SIZE);
            for (chunk, given) in [(21, 21), (5, 21), (8, 13)] {
                let again = run_given(&decoder, &ids(21), chunk, BLOCK_SIZE, &free.ids[..given]);
                assert_eq!(again.logits, free.logits);
                assert_eq!(again.ids, free.ids);
                assert_eq!(again.changed_cells, [0; 21]);
            }
        }
    }
}

#[test]
fn other_routing_is_used_captured_and_counted() {
    for model in models() {
        let decoder = load(&written(&model, Layout::EachExpert), DtypeChoice::Float32);
        let top_k = decoder.config().num_experts_per_tok;
        let free = run(&decoder, &ids(21), 21, BLOCK_SIZE);
        let mut shifted = free.ids.clone();
        shifted.rotate_left(1);
        let forced = run_given(&decoder, &ids(21), 21, BLOCK_SIZE, &shifted);
        assert_eq!(forced.ids, shifted);
        assert_ne!(forced.logits, free.logits);
        assert_eq!(run_given(&decoder, &ids(21), 4, BLOCK_SIZE, &shifted).logits, forced.logits);
        // The first layer that routes sees what it saw before (in all of these, the first layer of all): there the free
        // choice is known.
        let set = |row: &[u16]| {
            let mut set = row[..top_k].to_vec();
            set.sort_unstable();
            set
        };
        let first_layer = free.ids.iter().zip(&shifted).map(|(free, given)| u32::from(set(free) != set(given)));
        let layers = decoder.config().moe_layers.len() as u32;
        for (changed, first) in forced.changed_cells.iter().zip(first_layer) {
            assert!((first..=first + layers - 1).contains(changed), "{changed} cells, {first} in the first layer");
        }
        assert!(forced.changed_cells.iter().any(|cells| *cells > 0));
        // A prefix alone: positions behind it route freely, under changed KV.
        let prefix = run_given(&decoder, &ids(21), 21, BLOCK_SIZE, &shifted[..10]);
        assert_eq!(prefix.ids[..10], shifted[..10]);
        assert_eq!(prefix.changed_cells[..10], forced.changed_cells[..10]);
        assert_eq!(prefix.changed_cells[10..], [0; 11]);
    }
}

#[test]
fn what_cannot_be_used_is_refused_before_any_kernel_runs() {
    let decoder = load(&written(&Synthetic::new("olmoe"), Layout::EachExpert), DtypeChoice::Float32);
    let (layers, experts) = (decoder.config().moe_layers.len(), decoder.config().num_experts as u16);
    let refused = |row: &[u16], moe_layers: usize, part: &str| {
        let seqs = [SeqSpan { rows: 0..1, first_position: 0, block_table: &[0] }];
        let input = StepInput {
            token_ids: &[1],
            positions: &[0],
            slot_mapping: &[0],
            seqs: &seqs,
            logit_rows: &[0],
            replay: Some(RouterReplay { row_of: &[0], ids: row, moe_layers }),
        };
        let error = decoder.forward(&input, &mut decoder.new_kv_pool(1, 1), None).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    let good = run(&decoder, &ids(1), 1, BLOCK_SIZE).ids.remove(0);
    refused(&vec![experts; good.len()], layers, "expert 6 is not below 6");
    refused(&vec![0; good.len()], layers, "expert 0 occurs twice");
    refused(&good[1..], layers, "ids is");
    refused(&[], layers, "row of ids 0 is not below 0");
    refused(&good, layers + 1, "replay: expected 3 MoE layers, found 4");
}
