//! The network on a GPU, which is emulated: as on the CPU, and the same bits whatever the schedule.

use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use moetrail_kernels::WeightDtype;
use moetrail_kernels::gpu::{Gpu, SampleParams};
use serde_json::json;

use super::{BLOCK_SIZE, ids, replayed, run, written};
use crate::{
    Awaited, Checkpoint, Decoder, DtypeChoice, HiddenOutput, PendingReport, PendingTokens, Quantization, SeqSpan,
    StepInput, WeightChoice,
};
use moetrail_synthetic::{Layout, Synthetic};

fn gpu(seed: u64) -> Option<Gpu> {
    moetrail_emulation::gpu(seed, 1 << 30)
}

fn open(folder: &Path) -> Checkpoint {
    Checkpoint::open_folder(folder, "test").unwrap()
}

/// Every family; a dense layer; ids of two bytes; tied and stored heads, biases, windows as the goldens have them.
fn checkpoints() -> Vec<(String, Checkpoint)> {
    let small = [
        Synthetic::new("qwen3_moe").set("mlp_only_layers", json!([1])),
        Synthetic::new("qwen3_moe").set("num_experts", json!(300)).set("num_experts_per_tok", json!(8)),
        Synthetic::new("olmoe"),
        Synthetic::new("mixtral"),
    ];
    let small = small.into_iter().map(|synthetic| {
        let folder = written(&synthetic, Layout::EachExpert);
        let checkpoint = open(folder.path());
        // The files stay mapped.
        (synthetic.config_json(), checkpoint)
    });
    let golden = ["qwen3_moe-a", "qwen3_moe-b", "olmoe-b", "mixtral-b"].map(|name| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name);
        (name.to_owned(), open(&folder))
    });
    small.chain(golden).collect()
}

fn floats(row: &[u32]) -> impl Iterator<Item = f32> {
    row.iter().map(|bits| f32::from_bits(*bits))
}

/// The largest difference of two sets of logits, relative to the largest logit.
fn difference(one: &[Vec<u32>], other: &[Vec<u32>]) -> f32 {
    let largest = one.iter().flat_map(|row| floats(row)).fold(0f32, |most, logit| most.max(logit.abs()));
    let pairs = one.iter().zip(other).flat_map(|(one, other)| floats(one).zip(floats(other)));
    pairs.fold(0f32, |most, (one, other)| most.max((one - other).abs())) / largest
}

#[test]
fn logits_and_experts_are_the_cpus() {
    let Some(gpu) = gpu(1) else { return };
    for (name, checkpoint) in checkpoints() {
        let host = run(&checkpoint.load(DtypeChoice::Float32, false).unwrap(), &ids(21), 21, BLOCK_SIZE);
        let decoder = checkpoint.load_on(Some(&gpu), DtypeChoice::Float32, false).unwrap();
        let device = run(&decoder, &ids(21), 21, BLOCK_SIZE);
        assert_eq!(device.ids, host.ids, "{name}");
        let off = difference(&host.logits, &device.logits);
        assert!(off < 3e-6, "{name}: logits differ by {off}");
    }
}

#[test]
fn schedules_change_no_bit() {
    let Some(gpu) = gpu(2) else { return };
    let dtypes = [DtypeChoice::BFloat16, DtypeChoice::Float32, DtypeChoice::Float16];
    for ((name, checkpoint), dtype) in checkpoints().into_iter().zip(dtypes.into_iter().cycle()) {
        let decoder = checkpoint.load_on(Some(&gpu), dtype, false).unwrap();
        let whole = run(&decoder, &ids(21), 21, 4);
        // Single rows are a recorded step from the second on.
        for (chunk, block_size) in [(1, 4), (5, 1), (8, 16)] {
            let other = run(&decoder, &ids(21), chunk, block_size);
            assert_eq!(other.ids, whole.ids, "{name} {dtype:?} chunk {chunk} block {block_size}");
            assert!(other.logits == whole.logits, "{name} {dtype:?} chunk {chunk} block {block_size}");
        }
        assert_eq!(decoder.recorded(), 1);
    }
}

#[test]
fn given_experts_are_taken() {
    let Some(gpu) = gpu(3) else { return };
    for (name, checkpoint) in checkpoints() {
        let decoder = checkpoint.load_on(Some(&gpu), DtypeChoice::BFloat16, false).unwrap();
        let free = run(&decoder, &ids(21), 21, BLOCK_SIZE);
        let mut own: Vec<Option<Vec<u16>>> = free.ids.iter().cloned().map(Some).collect();
        own[4] = None;
        let again = replayed(&decoder, &ids(21), Some(&own), 5, BLOCK_SIZE);
        assert!((&again.logits, &again.ids) == (&free.logits, &free.ids), "{name}");
        assert_eq!(again.changed_cells, [0; 21], "{name}");
        // The row of the next position, on the CPU and here.
        let given: Vec<_> = (0..21).map(|i| (i + 3 < 21).then(|| free.ids[i + 1].clone())).collect();
        let shifted = replayed(&decoder, &ids(21), Some(&given), 21, BLOCK_SIZE);
        assert!(shifted.logits != free.logits, "{name}");
        assert!(given.iter().zip(&shifted.ids).all(|(given, used)| given.as_ref().is_none_or(|given| given == used)));
        let chunks = replayed(&decoder, &ids(21), Some(&given), 4, BLOCK_SIZE);
        assert!((&chunks.logits, &chunks.changed_cells) == (&shifted.logits, &shifted.changed_cells), "{name}");
        assert!(shifted.changed_cells.iter().sum::<u32>() > 0, "{name}");
    }
}

/// Two sequences of one token whose logits are wanted in either order, from recordings as well.
#[test]
fn logits_come_in_the_order_wanted() {
    let Some(gpu) = gpu(5) else { return };
    let folder = written(&Synthetic::new("olmoe"), Layout::EachExpert);
    let decoder = open(folder.path()).load_on(Some(&gpu), DtypeChoice::BFloat16, false).unwrap();
    let mut kv = decoder.new_kv(2, 4).unwrap();
    let seqs = [0, 1].map(|seq| SeqSpan { rows: seq..seq + 1, first_position: 0, block_table: &[[0], [1]][seq] });
    let mut logits = |rows: [u32; 2]| {
        let input = StepInput {
            token_ids: &[7, 30],
            positions: &[0, 0],
            slot_mapping: &[0, 4],
            seqs: &seqs,
            logit_rows: &rows,
            replay: None,
            awaited: None,
        };
        decoder.forward(&input, &mut kv, None).unwrap().logits.to_vec2::<f32>().unwrap()
    };
    let first = logits([0, 1]);
    assert!(first[0] != first[1]);
    for _ in 0..2 {
        assert_eq!(logits([1, 0]), [&first[1][..], &first[0]]);
        assert_eq!(logits([0, 1]), first);
    }
    assert_eq!(decoder.recorded(), 1);
}

/// Seventeen sequences are a recorded step of twenty-four rows, seven of which choose no expert: each gives the bits that
/// it gives alone.
#[test]
fn rows_that_pad_a_recording_change_nothing() {
    let Some(gpu) = gpu(8) else { return };
    let folder = written(&Synthetic::new("qwen3_moe"), Layout::EachExpert);
    let decoder = open(folder.path()).load_on(Some(&gpu), DtypeChoice::BFloat16, false).unwrap();
    let (tokens, tables) = (ids(17 + 3), Vec::from_iter((0..17).map(|block| [block])));
    let steps = |rows: Range<usize>| -> Vec<Vec<Vec<f32>>> {
        let decoder = decoder.clone();
        let mut kv = decoder.new_kv(17, 4).unwrap();
        let mut step = |position: usize| {
            let seqs = rows.clone().enumerate().map(|(at, row)| SeqSpan {
                rows: at..at + 1,
                first_position: position as u32,
                block_table: &tables[row],
            });
            let slots: Vec<u32> = rows.clone().map(|row| (4 * row + position) as u32).collect();
            let input = StepInput {
                token_ids: &tokens[position..][rows.clone()],
                positions: &vec![position as u32; rows.len()],
                slot_mapping: &slots,
                seqs: &Vec::from_iter(seqs),
                logit_rows: &Vec::from_iter(0..rows.len() as u32),
                replay: None,
                awaited: None,
            };
            decoder.forward(&input, &mut kv, None).unwrap().logits.to_vec2::<f32>().unwrap()
        };
        let logits = (0..3).map(&mut step).collect();
        assert_eq!(decoder.recorded(), 1);
        logits
    };
    let all = steps(0..17);
    for row in [0, 8, 16] {
        let alone = steps(row..row + 1);
        assert!(alone.iter().zip(&all).all(|(alone, all)| alone[0] == all[row]), "row {row}");
    }
}

/// Tokens of hidden rows are those of their logits; several may be of one row, or be given.
#[test]
fn tokens_are_sampled_where_the_logits_are() {
    let Some(gpu) = gpu(4) else { return };
    let folder = written(&Synthetic::new("qwen3_moe"), Layout::EachExpert);
    let decoder = open(folder.path()).load_on(Some(&gpu), DtypeChoice::BFloat16, false).unwrap();
    assert_eq!(decoder.max_sampled_logprobs(), Some(20));
    let tokens = ids(6);
    let seqs = [SeqSpan { rows: 0..6, first_position: 0, block_table: &[1, 0] }];
    let input = StepInput {
        token_ids: &tokens,
        positions: &[0, 1, 2, 3, 4, 5],
        slot_mapping: &[4, 5, 6, 7, 0, 1],
        seqs: &seqs,
        logit_rows: &[5, 0, 2],
        replay: None,
        awaited: None,
    };
    let mut kv = decoder.new_kv(2, 4).unwrap();
    let HiddenOutput { hidden, marks } = decoder.hidden(&input, &mut kv, None).unwrap();
    let best = SampleParams { logprobs: Some(3), ..SampleParams::GREEDY };
    let wanted = [(0, best), (0, SampleParams { given: Some(17), ..best }), (2, SampleParams::GREEDY)];
    let sampled = decoder.sample(&hidden, &wanted).unwrap();
    let (marks, sampled) = marks.finish(&sampled).unwrap();
    assert!(marks.nan_rows.is_empty() && marks.changed_cells.is_empty());
    let logits = decoder.logits(&hidden, 0..3).unwrap().to_vec2::<f32>().unwrap();
    let order = |row: &[f32]| {
        let mut ids: Vec<u32> = (0..row.len() as u32).collect();
        ids.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]));
        ids
    };
    let top = |at: usize| sampled[at].logprobs.iter().flat_map(|found| found.top.iter().map(|(id, _)| *id));
    assert!(top(0).eq(order(&logits[0])[..3].iter().copied()) && top(1).eq(top(0)));
    let ids = [order(&logits[0])[0], 17, order(&logits[2])[0]];
    assert!(sampled.iter().map(|sampled| sampled.token).eq(ids.map(Some)));
    assert!(sampled[2].logprobs.is_none());

    for bad in [&[(3, best)][..], &[(1, best), (0, best)]] {
        assert!(decoder.sample(&hidden, bad).is_err());
    }
    let host = open(folder.path()).load(DtypeChoice::BFloat16, false).unwrap();
    assert_eq!(host.max_sampled_logprobs(), None);
    assert!(host.sample(&hidden, &wanted).is_err());
}

/// Greedy tokens of three sequences, which change places in every step; the last one's inputs are given. With `ahead`,
/// all steps are issued before any token is known.
fn decode(decoder: &Decoder, ahead: bool) -> Vec<[u32; 3]> {
    let mut kv = decoder.new_kv(9, 4).unwrap();
    let tables = [[0, 1, 2], [3, 4, 5], [6, 7, 8]];
    let row_of = |seq: usize, step: usize| (seq + 3 - step % 3) % 3;
    let (mut samples, mut reports, mut seen) = (Vec::<PendingTokens>::new(), Vec::new(), Vec::<[u32; 3]>::new());
    for step in 0..9 {
        if !ahead && step > 0 {
            let report: PendingReport = reports.pop().unwrap();
            let (_, tokens) = report.finish(&samples[step - 1]).unwrap();
            seen.push([0, 1, 2].map(|seq| tokens[row_of(seq, step - 1)].token.unwrap()));
        }
        let seqs = [0, 1, 2].map(|row| (row + step) % 3);
        let given = |seq: usize| step == 0 || seq == 2;
        let token_ids = seqs.map(|seq| match given(seq) || ahead {
            true => 11 + (seq + 2 * step) as u32,
            false => seen[step - 1][seq],
        });
        let sources = seqs.map(|seq| if given(seq) { Awaited::KNOWN } else { row_of(seq, step - 1) as u32 });
        let spans = [0, 1, 2].map(|row| SeqSpan {
            rows: row..row + 1,
            first_position: step as u32,
            block_table: &tables[seqs[row]],
        });
        let input = StepInput {
            token_ids: &token_ids,
            positions: &[step as u32; 3],
            slot_mapping: &seqs.map(|seq| tables[seq][step / 4] * 4 + (step % 4) as u32),
            seqs: &spans,
            logit_rows: &[0, 1, 2],
            replay: None,
            awaited: samples.last().filter(|_| ahead).map(|samples| Awaited { samples, sources: &sources }),
        };
        let HiddenOutput { hidden, marks } = decoder.hidden(&input, &mut kv, None).unwrap();
        samples.push(decoder.sample(&hidden, &[0, 1, 2].map(|row| (row, SampleParams::GREEDY))).unwrap());
        reports.push(marks.send(&samples[step]).unwrap());
    }
    for report in reports {
        let step = seen.len();
        let (_, tokens) = report.finish(&samples[step]).unwrap();
        seen.push([0, 1, 2].map(|seq| tokens[row_of(seq, step)].token.unwrap()));
    }
    seen
}

#[test]
fn tokens_are_taken_from_the_step_before() {
    let Some(gpu) = gpu(8) else { return };
    let folder = written(&Synthetic::new("qwen3_moe"), Layout::EachExpert);
    let decoder = open(folder.path()).load_on(Some(&gpu), DtypeChoice::BFloat16, false).unwrap();
    let expected = decode(&decoder, false);
    assert!(expected.iter().flatten().collect::<HashSet<_>>().len() > 3, "{expected:?}");
    assert_eq!(decode(&decoder, true), expected);
    assert!(decoder.recorded() > 0);
}

/// Other weights are packed while steps run and are recorded: neither changes what the other gives.
#[test]
fn weights_are_loaded_while_others_compute() {
    for seed in [0, 6] {
        let Some(gpu) = gpu(seed) else { return };
        let folder = written(&Synthetic::new("qwen3_moe"), Layout::EachExpert);
        let checkpoint = open(folder.path());
        let load = || checkpoint.load_on(Some(&gpu), DtypeChoice::BFloat16, false).unwrap();
        let decoder = load();
        let alone = run(&decoder, &ids(9), 9, BLOCK_SIZE);
        let packed = AtomicUsize::new(0);
        let others: Vec<_> = thread::scope(|scope| {
            let loader = scope.spawn(|| {
                let counted = |_| {
                    let other = load();
                    packed.fetch_add(1, Ordering::Relaxed);
                    other
                };
                (0..3).map(counted).collect()
            });
            for turn in 0.. {
                // A clone has no recordings yet.
                let decoder = decoder.clone();
                let again = run(&decoder, &ids(9), 1, BLOCK_SIZE);
                assert!((&again.logits, &again.ids) == (&alone.logits, &alone.ids), "seed {seed} turn {turn}");
                assert_eq!(decoder.recorded(), 1);
                if packed.load(Ordering::Relaxed) == 3 {
                    break;
                }
            }
            loader.join().unwrap()
        });
        for other in others {
            let other = run(&other, &ids(9), 9, BLOCK_SIZE);
            assert!((&other.logits, &other.ids) == (&alone.logits, &alone.ids), "seed {seed}");
        }
    }
}

#[test]
fn memory_is_counted_and_given_back() {
    let Some(gpu) = gpu(0) else { return };
    let [before, _] = gpu.driver().memory().unwrap();
    let folder = written(&Synthetic::new("qwen3_moe"), Layout::EachExpert);
    let decoder = open(folder.path()).load_on(Some(&gpu), DtypeChoice::BFloat16, false).unwrap();
    assert_eq!(decoder.dtype(), WeightDtype::BF16);
    let kv = decoder.new_kv(5, 4).unwrap();
    assert_eq!(kv.bytes(), 5 * decoder.kv_bytes_per_block(4));
    let [left, _] = gpu.driver().memory().unwrap();
    assert!(before - left >= decoder.weight_bytes() + kv.bytes());
    drop((decoder, kv));
    assert_eq!(gpu.driver().memory().unwrap()[0], before);
}

#[test]
fn what_a_gpu_cannot_do_is_said() {
    let Some(gpu) = gpu(0) else { return };
    let folder = written(&Synthetic::new("qwen3_moe"), Layout::EachExpert);
    let choice = WeightChoice { quantization: Some(Quantization::Int8), ..WeightChoice::default() };
    let error = open(folder.path()).load_on(Some(&gpu), choice, false).err().unwrap().to_string();
    assert!(error.contains("--device cpu"), "{error}");
    let Some(small) = moetrail_emulation::gpu(0, 1 << 16) else { return };
    let error = open(folder.path()).load_on(Some(&small), DtypeChoice::Auto, false).err().unwrap().to_string();
    assert!(error.contains("out of memory"), "{error}");
}
