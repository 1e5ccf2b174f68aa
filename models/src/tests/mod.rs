//! Tests of the whole crate on small random checkpoints.

mod configs;
mod forward;
mod gguf;
mod gpu;
mod layouts;
mod refusals;
mod replay;

use candle_core::Tensor;
use moetrail_kernels::gpu::DeviceRing;
use moetrail_kernels::{RingCells, SeqSpan};
use tempfile::TempDir;

use crate::{Checkpoint, Decoder, DtypeChoice, KvCache, Replay, Ring, StepInput};
use moetrail_synthetic::{Layout, Synthetic};

const BLOCK_SIZE: usize = 4;

/// The token ids that every test of a forward pass uses.
fn ids(len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| (i * 37 + 11) % 96).collect()
}

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn written(synthetic: &Synthetic, layout: Layout) -> TempDir {
    let folder = folder();
    synthetic.write(folder.path(), layout);
    folder
}

fn load(folder: &TempDir, dtype: DtypeChoice) -> Decoder {
    Checkpoint::open_folder(folder.path(), "test").unwrap().load(dtype, false).unwrap()
}

/// One sequence in blocks that are not in order, run in chunks: the bits of every row's logits, and its expert ids.
struct Run {
    logits: Vec<Vec<u32>>,
    ids: Vec<Vec<u16>>,
    /// Of the replay, by row; empty without one.
    changed_cells: Vec<u32>,
}

fn run(decoder: &Decoder, ids: &[u32], chunk: usize, block_size: usize) -> Run {
    replayed(decoder, ids, None, chunk, block_size)
}

/// As [`run`], with the row of experts given for each position, if any.
fn replayed(
    decoder: &Decoder,
    ids: &[u32],
    given: Option<&[Option<Vec<u16>>]>,
    chunk: usize,
    block_size: usize,
) -> Run {
    let config = decoder.config();
    let width = config.moe_layers.len() * config.num_experts_per_tok;
    let num_blocks = ids.len().div_ceil(block_size) + 1;
    let block_table: Vec<u32> = (0..num_blocks as u32).rev().collect();
    let slot =
        |position: usize| block_table[position / block_size] * block_size as u32 + (position % block_size) as u32;
    let mut kv = decoder.new_kv(num_blocks, block_size).unwrap();
    let mut ring = vec![u16::MAX; num_blocks * block_size * width];
    let (moe_layers, top_k) = (config.moe_layers.len(), config.num_experts_per_tok);
    let on_device =
        decoder.gpu().map(|gpu| DeviceRing::new(gpu, num_blocks * block_size, moe_layers, top_k, true).unwrap());
    let (mut logits, mut changed_cells) = (Vec::new(), Vec::new());
    for (index, tokens) in ids.chunks(chunk).enumerate() {
        let first = index * chunk;
        let positions: Vec<u32> = (first..first + tokens.len()).map(|p| p as u32).collect();
        let slots: Vec<u32> = (first..first + tokens.len()).map(slot).collect();
        let rows: Vec<u32> = (0..tokens.len() as u32).collect();
        let seqs = [SeqSpan { rows: 0..tokens.len(), first_position: first as u32, block_table: &block_table }];
        let given = given.map(|given| table(&given[first..first + tokens.len()]));
        let input = StepInput {
            token_ids: tokens,
            positions: &positions,
            slot_mapping: &slots,
            seqs: &seqs,
            logit_rows: &rows,
            replay: given.as_ref().map(|(row_of, ids)| Replay { row_of, ids }),
            awaited: None,
        };
        let cells = match &on_device {
            None => RingCells::U16(&mut ring).into(),
            Some(ring) => Ring::Device(ring),
        };
        let output = decoder.forward(&input, &mut kv, Some(cells)).unwrap();
        assert!(output.nan_rows.is_empty());
        logits.extend(bits(&output.logits));
        changed_cells.extend(output.changed_cells);
    }
    if let (Some(gpu), Some(on_device)) = (decoder.gpu(), &on_device) {
        ring = gpu.read(on_device.address(), ring.len()).unwrap();
    }
    let ids = (0..ids.len()).map(|p| ring[slot(p) as usize * width..][..width].to_vec()).collect();
    Run { logits, ids, changed_cells }
}

/// The given rows one after the other, and where each of them is.
fn table(given: &[Option<Vec<u16>>]) -> (Vec<u32>, Vec<u16>) {
    let (mut row_of, mut ids, mut replayed) = (Vec::new(), Vec::new(), 0);
    for row in given {
        row_of.push(if row.is_some() { replayed } else { Replay::FREE });
        replayed += u32::from(row.is_some());
        ids.extend(row.iter().flatten());
    }
    (row_of, ids)
}

fn bits(logits: &Tensor) -> Vec<Vec<u32>> {
    let rows = logits.to_vec2::<f32>().unwrap();
    rows.iter().map(|row| row.iter().map(|x| x.to_bits()).collect()).collect()
}

/// A single-row step of a sequence of one token.
fn one_token(decoder: &Decoder, kv: &mut KvCache, token: u32) -> crate::Result<crate::StepOutput> {
    let seqs = [SeqSpan { rows: 0..1, first_position: 0, block_table: &[0] }];
    let input = StepInput {
        token_ids: &[token],
        positions: &[0],
        slot_mapping: &[0],
        seqs: &seqs,
        logit_rows: &[0],
        replay: None,
        awaited: None,
    };
    decoder.forward(&input, kv, None)
}
