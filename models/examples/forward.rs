//! Prints logits and routed experts for given token ids, to compare with another implementation.
//!
//! ```text
//! cargo run --release -p moetrail-models --example forward -- MODEL [--dtype float32] [--chunk N] IDS...
//! ```
//! Output: JSON, `{"logits": [[f32; vocab]; tokens], "topk_ids": [[[id; top_k]; moe_layers]; tokens]}`.

use moetrail_models::{Checkpoint, DtypeChoice, RingCells, SeqSpan, StepInput};

const BLOCK_SIZE: usize = 16;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let model = args.next().ok_or("usage: forward MODEL [--dtype D] [--chunk N] IDS...")?;
    let (mut dtype, mut chunk, mut ids) = (DtypeChoice::Auto, usize::MAX, Vec::<u32>::new());
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--dtype" => dtype = args.next().ok_or("--dtype needs a value")?.parse()?,
            "--chunk" => chunk = args.next().ok_or("--chunk needs a value")?.parse::<usize>()?.max(1),
            id => ids.push(id.parse()?),
        }
    }
    let decoder = Checkpoint::open(&model, None)?.load(dtype, true)?;
    let config = decoder.config();
    let (layers, top_k) = (config.moe_layers.len(), config.num_experts_per_tok);
    let num_blocks = ids.len().div_ceil(BLOCK_SIZE);
    let mut kv = decoder.new_kv(num_blocks, BLOCK_SIZE)?;
    let mut ring = vec![0u16; num_blocks * BLOCK_SIZE * layers * top_k];
    let block_table: Vec<u32> = (0..num_blocks as u32).collect();
    let mut logits: Vec<Vec<f32>> = Vec::new();
    let began = std::time::Instant::now();
    for (index, chunk_ids) in ids.chunks(chunk.min(ids.len().max(1))).enumerate() {
        let first = (index * chunk.min(ids.len())) as u32;
        let positions: Vec<u32> = (first..first + chunk_ids.len() as u32).collect();
        let rows: Vec<u32> = (0..chunk_ids.len() as u32).collect();
        let seqs = [SeqSpan { rows: 0..chunk_ids.len(), first_position: first, block_table: &block_table }];
        let input = StepInput {
            token_ids: chunk_ids,
            positions: &positions,
            slot_mapping: &positions,
            seqs: &seqs,
            logit_rows: &rows,
            replay: None,
            awaited: None,
        };
        let output = decoder.forward(&input, &mut kv, Some(RingCells::U16(&mut ring).into()))?;
        logits.extend(output.logits.to_vec2::<f32>()?);
    }
    eprintln!(
        "{} tokens in {:.3} s, weights {} MiB",
        ids.len(),
        began.elapsed().as_secs_f64(),
        decoder.weight_bytes() >> 20
    );
    let row = |position: usize| -> Vec<&[u16]> {
        ring[position * layers * top_k..][..layers * top_k].chunks(top_k.max(1)).collect()
    };
    let topk_ids: Vec<Vec<&[u16]>> = (0..ids.len()).map(row).collect();
    println!("{}", serde_json::json!({ "logits": logits, "topk_ids": topk_ids }));
    Ok(())
}
