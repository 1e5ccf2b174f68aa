//! The network on a GPU, which is emulated: as on the CPU, and the same bits whatever the schedule.

use std::path::Path;

use moetrail_kernels::WeightDtype;
use moetrail_kernels::gpu::Gpu;
use serde_json::json;

use super::{BLOCK_SIZE, ids, replayed, run, written};
use crate::{Checkpoint, DtypeChoice, Quantization, WeightChoice};
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
