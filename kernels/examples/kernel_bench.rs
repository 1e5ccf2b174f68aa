//! Speeds of the kernels on the shapes of a 1B-A400M model, beside the machine's own limits.
//!
//! `cargo run --release -p moetrail-kernels --example kernel_bench [threads [part]]`; with one thread, time is the thread's
//! time on a processor where the system tells it (Linux), so that a busy machine does not matter.

use std::hint::black_box;
use std::time::{Duration, Instant};

use moetrail_kernels::{
    AttentionCall, AttentionShape, ExpertMatrix, Form, KvPool, PackedExperts, PackedMatrix, QkvCall, RopeTable,
    RouterConfig, SeqSpan, WeightDtype, WeightFormat, experts_rows, linear, pool, rms_norm_rows, select,
};

const HIDDEN: usize = 1024;
const INTER: usize = 256;
const EXPERTS: usize = 64;
const TOP_K: usize = 8;
/// More copies of the weights than any cache holds, used in turn as the layers of a model are.
const COLD_BYTES: usize = 400 << 20;
/// Layers of the KV cache, used in turn: together they leave the caches from some thousand positions on.
const KV_LAYERS: usize = 12;

fn main() {
    if let Some(threads) = std::env::args().nth(1).and_then(|threads| threads.parse().ok()) {
        pool::configure(threads);
    }
    let form = Form::current();
    println!("form {form}, {} threads", pool::threads());
    let read = read_bandwidth();
    println!("memory read {read:.1} GB/s");
    let peak = product_peak(form);
    println!("bf16 products on cached weights {peak:.0} GFLOP/s (100 % below)");
    let part = std::env::args().nth(2);
    let wanted = |name: &str| part.as_ref().is_none_or(|part| part == name);
    if wanted("linear") {
        for (name, out) in [("qkv", 2048), ("qkv-", 1984), ("out", 1024), ("out+", 1088), ("outs", 64), ("head", 32768)]
        {
            products(form, name, HIDDEN, out, WeightDtype::BF16.into(), (read, peak));
        }
        products(form, "qkv f32", HIDDEN, 2048, WeightDtype::F32.into(), (read, peak));
        products(form, "qkv int8", HIDDEN, 2048, WeightFormat::Int8, (read, peak));
        products(form, "router", HIDDEN, EXPERTS, WeightDtype::F32.into(), (read, peak));
    }
    if wanted("experts") {
        experts(form, WeightDtype::BF16.into(), (read, peak));
        experts(form, WeightFormat::Int8, (read, peak));
    }
    if wanted("attention") {
        attentions(form);
    }
    if wanted("small") {
        small(form);
    }
}

/// Best time of many repetitions: other processes of the machine only ever add to it. With one thread, the mean time
/// on a processor, which is counted in ticks too coarse for a single repetition.
fn best(mut body: impl FnMut(usize)) -> f64 {
    let mut best = f64::INFINITY;
    body(0);
    let (start, on_processor) = (Instant::now(), on_processor());
    let mut round = 0;
    while round < 8 || start.elapsed() < Duration::from_millis(600) {
        let begin = Instant::now();
        body(round);
        best = best.min(begin.elapsed().as_secs_f64());
        round += 1;
    }
    match (on_processor, self::on_processor()) {
        (Some(first), Some(last)) if pool::threads() == 1 => (last - first) / round as f64,
        _ => best,
    }
}

/// Seconds this thread has spent on a processor.
fn on_processor() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    Some(stat.split(' ').next()?.parse::<f64>().ok()? / 1e9)
}

fn line(name: &str, rows: usize, seconds: f64, bytes: usize, flops: usize, (read, peak): (f64, f64)) {
    let (bandwidth, rate) = (bytes as f64 / seconds / 1e9, flops as f64 / seconds / 1e9);
    println!(
        "{name:<16} {rows:>4} rows  {:>9.1} us  {bandwidth:>6.1} GB/s ({:>3.0} % of read)  {rate:>7.1} GFLOP/s ({:>3.0} %)",
        seconds * 1e6,
        bandwidth / read * 100.0,
        rate / peak * 100.0,
    );
}

fn read_bandwidth() -> f64 {
    let words = vec![1u64; (512 << 20) / 8];
    let tasks = 64;
    let part = words.len() / tasks;
    let seconds = best(|_| {
        pool::run(tasks, &|task| {
            let mut sums = [0u64; 32];
            for chunk in words[task * part..][..part].chunks_exact(32) {
                sums.iter_mut().zip(chunk).for_each(|(sum, word)| *sum = sum.wrapping_add(*word));
            }
            black_box(sums);
        });
    });
    (words.len() * 8) as f64 / seconds / 1e9
}

/// Products whose weights and activations stay in the second-level cache: what the inner loop itself reaches.
fn product_peak(form: Form) -> f64 {
    let (n, ins, outs) = (96, 1024, 256);
    let weight = PackedMatrix::zeros(outs, ins, WeightDtype::BF16).finish();
    let x = vec![0.5; n * ins];
    let mut out = vec![0.0; n * outs];
    let seconds = best(|_| linear(form, &x, &weight, None, &mut out));
    (2 * n * ins * outs) as f64 / seconds / 1e9
}

fn products(form: Form, name: &str, ins: usize, outs: usize, format: WeightFormat, limits: (f64, f64)) {
    let bytes = touched(outs, ins, format, 0).bytes();
    let copies = (COLD_BYTES / bytes).clamp(2, 200);
    let weights: Vec<PackedMatrix> = (0..copies).map(|copy| touched(outs, ins, format, copy)).collect();
    let only = std::env::args().nth(3).and_then(|rows| rows.parse().ok());
    for n in [1, 8, 512].into_iter().filter(|&n| only.is_none_or(|only: usize| only == n)) {
        let x: Vec<f32> = (0..n * ins).map(|i| (i % 17) as f32 * 0.1).collect();
        let mut out = vec![0.0; n * outs];
        let seconds = best(|round| linear(form, &x, &weights[round % copies], None, &mut out));
        line(name, n, seconds, bytes, 2 * n * ins * outs, limits);
    }
}

/// Weights whose pages are really there.
fn touched(outs: usize, ins: usize, format: WeightFormat, seed: usize) -> PackedMatrix {
    let row: Vec<u8> = (0..ins).flat_map(|i| (((i + seed) % 13) as f32 * 0.01).to_le_bytes()).collect();
    let mut builder = PackedMatrix::zeros(outs, ins, format);
    let rows = moetrail_kernels::WeightView {
        bytes: &row,
        dtype: WeightDtype::F32,
        rows: outs,
        cols: ins,
        row_stride: 0,
        col_stride: 1,
    };
    builder.put_rows(0, rows).expect("the view fits");
    builder.finish()
}

fn experts(form: Form, format: WeightFormat, limits: (f64, f64)) {
    let layers: Vec<PackedExperts> = (0..4)
        .map(|_| {
            let mut builder = PackedExperts::builder(EXPERTS, HIDDEN, INTER, format, format);
            let values: Vec<u8> = (0..HIDDEN * INTER).flat_map(|i| ((i % 13) as f32 * 0.01).to_le_bytes()).collect();
            for expert in 0..EXPERTS {
                let view = |rows, cols| moetrail_kernels::WeightView::row_major(&values, WeightDtype::F32, rows, cols);
                builder.put(expert, ExpertMatrix::Gate, view(INTER, HIDDEN)).expect("the view fits");
                builder.put(expert, ExpertMatrix::Up, view(INTER, HIDDEN)).expect("the view fits");
                builder.put(expert, ExpertMatrix::Down, view(HIDDEN, INTER)).expect("the view fits");
            }
            builder.finish()
        })
        .collect();
    let only = std::env::args().nth(3).and_then(|rows| rows.parse().ok());
    for n in [1, 8, 32, 512, 2048].into_iter().filter(|&n| only.is_none_or(|only: usize| only == n)) {
        let x: Vec<f32> = (0..n * HIDDEN).map(|i| (i % 17) as f32 * 0.1).collect();
        let ids = |round: usize| -> Vec<u32> {
            // Eight distinct experts a row, another set in every row and round.
            (0..n).flat_map(|row| (0..TOP_K).map(move |k| ((row * 29 + round * 11 + k * 7) % EXPERTS) as u32)).collect()
        };
        let weights = vec![0.125; n * TOP_K];
        let mut out = vec![0.0; n * HIDDEN];
        let mut touched = ids(0);
        touched.sort_unstable();
        touched.dedup();
        let bytes = touched.len() * layers[0].bytes() / EXPERTS;
        let choices: Vec<Vec<u32>> = (0..16).map(ids).collect();
        let seconds = best(|round| {
            experts_rows(form, &x, &choices[round % 16], &weights, &layers[round % 4], &mut out).expect("ids fit");
        });
        line(&format!("experts {format}"), n, seconds, bytes, n * TOP_K * 6 * HIDDEN * INTER, limits);
    }
}

fn attentions(form: Form) {
    let shape = AttentionShape { heads: 8, kv_heads: 2, head_dim: 128, scale: 0.088, window: None, clip_qkv: None };
    let (block_size, context, batch) = (16, 4096, 8);
    let blocks = batch * context / block_size;
    let mut kv = KvPool::new(KV_LAYERS, blocks, block_size, shape.kv_heads, shape.head_dim, WeightDtype::BF16);
    let mut tables: Vec<Vec<u32>> =
        (0..batch).map(|seq| (0..context / block_size).map(|block| (block * batch + seq) as u32).collect()).collect();
    // And two that have all of the cache, 32768 positions: as an empty cache gives it out, and in an order that no
    // processor foresees.
    let (whole, scattered) = (batch, batch + 1);
    tables.push((0..blocks as u32).collect());
    tables.push((0..blocks as u32).map(|block| block.wrapping_mul(1173) % blocks as u32).collect());
    let rope = RopeTable::new((0..32).map(|i| 0.8f32.powi(i)).collect(), 1.0, context);
    let width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
    let n = blocks * block_size;
    let slots: Vec<u32> = (0..n as u32).collect();
    let positions: Vec<u32> = slots.iter().map(|slot| slot % context as u32).collect();
    let qkv: Vec<f32> = (0..n * width).map(|i| (i % 23) as f32 * 0.05 - 0.5).collect();
    let call = QkvCall { shape: &shape, norm: None, rope: &rope, positions: &positions, slots: &slots };
    let mut q = vec![0.0; n * shape.q_width()];
    let begin = Instant::now();
    for layer in 0..KV_LAYERS {
        call.run(form, &qkv, &mut q, kv.layer_mut(layer)).expect("the slots fit");
    }
    let rows = n * KV_LAYERS;
    println!("qkv rope store {rows} rows: {:.1} us a row", begin.elapsed().as_secs_f64() * 1e6 / rows as f64);

    let only = std::env::args().nth(3);
    let mut run = |name: &str, spans: &[(usize, usize, usize)]| {
        if only.as_ref().is_some_and(|only| !name.contains(only)) {
            return;
        }
        let mut start = 0;
        let mut pairs = 0;
        let mut keys = 0;
        let seqs: Vec<SeqSpan<'_>> = spans
            .iter()
            .map(|&(seq, first, end)| {
                let rows = start..start + end - first;
                start = rows.end;
                pairs += (first..end).map(|position| position + 1).sum::<usize>();
                keys += end;
                SeqSpan { rows, first_position: first as u32, block_table: &tables[seq] }
            })
            .collect();
        let mut out = vec![0.0; start * shape.q_width()];
        let seconds = best(|round| {
            let kv = kv.layer_mut(round % KV_LAYERS);
            let call = AttentionCall { shape: &shape, seqs: &seqs, kv: &kv };
            call.run(form, &q[..out.len()], &mut out).expect("the tables fit");
        });
        let bytes = keys * 2 * shape.kv_heads * shape.head_dim * 2;
        let flops = pairs * shape.heads * shape.head_dim * 4;
        println!(
            "attention {name:<28} {:>9.1} us  {:>6.1} GB/s  {:>7.1} GFLOP/s",
            seconds * 1e6,
            bytes as f64 / seconds / 1e9,
            flops as f64 / seconds / 1e9
        );
    };
    run("1 row at 512", &[(0, 511, 512)]);
    run("1 row at 4096", &[(0, 4095, 4096)]);
    for context in [8192, 16_384, 32_768] {
        run(&format!("1 row at {context}"), &[(whole, context - 1, context)]);
        run(&format!("1 row at {context}, scattered"), &[(scattered, context - 1, context)]);
    }
    let all: Vec<_> = (0..batch).map(|seq| (seq, 1023, 1024)).collect();
    run("8 sequences, 1 row at 1024", &all);
    run("512 rows from 0", &[(0, 0, 512)]);
    run("2048 rows from 0", &[(0, 0, 2048)]);
    run("512 rows from 3584", &[(0, 3584, 4096)]);
    run("64 rows from 8128", &[(whole, 8128, 8192)]);
    run("64 rows from 32704", &[(whole, 32_704, 32_768)]);
}

fn small(form: Form) {
    for n in [1, 512] {
        let x: Vec<f32> = (0..n * HIDDEN).map(|i| (i % 17) as f32 * 0.1).collect();
        let weight = vec![1.0; HIDDEN];
        let mut out = vec![0.0; n * HIDDEN];
        let norm = best(|_| rms_norm_rows(form, &x, &weight, 1e-5, &mut out));
        let logits: Vec<f32> = (0..n * EXPERTS).map(|i| (i * 7919 % 1000) as f32 * 0.01).collect();
        let cfg = RouterConfig { top_k: TOP_K, num_experts: EXPERTS, norm_topk_prob: false };
        let (mut ids, mut weights) = (vec![0; n * TOP_K], vec![0.0; n * TOP_K]);
        let choose = best(|_| {
            select(form, &logits, &cfg, None, None, &mut ids, &mut weights).expect("the shapes agree");
        });
        println!("{n:>4} rows: rms_norm {:.2} us, top-{TOP_K} of {EXPERTS} {:.2} us", norm * 1e6, choose * 1e6);
    }
}
