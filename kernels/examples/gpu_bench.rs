//! Speeds of the GPU kernels on the shapes of Qwen3-30B-A3B, beside what the device copies.
//!
//! `gpu_bench cuda|emulation [--tiny] [PART ...]`; prints one JSON object. A measure is a recorded graph of equal calls, over
//! weights that take turns so that no cache holds them: time is the median of its launches, divided by the calls. `--tiny`
//! takes small shapes, for the emulation and for the sanitizers.

use std::fmt::Write;
use std::time::Instant;

use moetrail_kernels::gpu::{
    Address, Arena, AttentionPlan, CopyKind, DecodeBucket, DeviceBuffer, DeviceExperts, DeviceKv, DeviceMatrix,
    DeviceMatrixBuilder, DeviceQkNorm, DeviceRing, DeviceRingWrite, DeviceRope, DeviceRouter, DeviceRouterConfig,
    DeviceRows, Gpu, GpuError, PinnedBuffer, Pitched, RowStaging, Stream, add_rms_norm, cuda, expert_ffn, linear,
    paged_attention, qkv_rope_store, route,
};
use moetrail_kernels::{
    AttentionShape, KernelError, QkNorm, RopeTable, RouterConfig, SeqSpan, WeightDtype, WeightView,
};

type Result<T> = std::result::Result<T, KernelError>;

const BF16: WeightDtype = WeightDtype::BF16;
const PARTS: [&str; 8] = ["copy", "launch", "linear", "experts", "attention", "router", "ring", "norm"];

/// Sizes of one layer, and how much memory the copies of its weights take.
struct Sizes {
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    experts: usize,
    top_k: usize,
    inter: usize,
    vocab: usize,
    /// Layers of the ring.
    layers: usize,
    /// Rows of the products.
    rows: &'static [usize],
    /// Rows of the expert networks.
    expert_rows: &'static [usize],
    /// (batch, context) of decode.
    decode: &'static [(usize, usize)],
    prefill: &'static [usize],
    /// Tokens of the KV cache.
    slots: usize,
    /// Rows that are drained.
    drained: usize,
    /// Bytes that no cache holds.
    cold: usize,
}

const LARGE: Sizes = Sizes {
    hidden: 2048,
    heads: 32,
    kv_heads: 4,
    head_dim: 128,
    experts: 128,
    top_k: 8,
    inter: 768,
    vocab: 151_936,
    layers: 48,
    rows: &[1, 8, 32, 64, 512, 2048, 8192],
    expert_rows: &[1, 8, 64, 256, 512, 2048, 8192],
    decode: &[(1, 1024), (1, 8192), (8, 8192), (64, 1024), (64, 8192)],
    prefill: &[512, 2048, 8192],
    slots: 64 * 8192,
    drained: 32_768,
    cold: 512 << 20,
};

const TINY: Sizes = Sizes {
    hidden: 64,
    heads: 4,
    kv_heads: 2,
    head_dim: 32,
    experts: 8,
    top_k: 2,
    inter: 32,
    vocab: 96,
    layers: 3,
    rows: &[1, 70],
    expert_rows: &[1, 9],
    decode: &[(1, 16), (2, 600)],
    prefill: &[40],
    slots: 2 * 608,
    drained: 40,
    cold: 1 << 15,
};

struct Bench {
    arena: Arena,
    /// For products as under `--deterministic`.
    deterministic: Arena,
    sizes: Sizes,
    tiny: bool,
    /// Bytes a second of a copy on the device, read and written.
    copied: f64,
    toss: u64,
    lines: Vec<String>,
}

/// What a call moves and computes.
#[derive(Clone, Copy, Default)]
struct Work {
    bytes: f64,
    flops: f64,
}

fn main() {
    let mut words = std::env::args().skip(1).peekable();
    let device = words.next().unwrap_or_default();
    let tiny = words.next_if(|word| word == "--tiny").is_some();
    let wanted: Vec<String> = words.collect();
    let gpu = match device.as_str() {
        "cuda" => cuda::open(0).unwrap_or_else(|error| fail(&error.to_string())),
        "emulation" => moetrail_emulation::gpu(0, 1 << 30).unwrap_or_else(|| fail("no kernels to emulate")),
        _ => fail("gpu_bench cuda|emulation [--tiny] [PART ...]"),
    };
    if let Some(word) = wanted.iter().find(|word| !PARTS.contains(&word.as_str())) {
        fail(&format!("{word:?} is none of {}", PARTS.join(", ")));
    }
    let sizes = if tiny { TINY } else { LARGE };
    let deterministic = Arena::new(&gpu.clone().with_deterministic(true));
    let mut bench =
        Bench { arena: Arena::new(&gpu), deterministic, sizes, tiny, copied: 0.0, toss: 1, lines: Vec::new() };
    for part in PARTS {
        // Every share is of the copy.
        if part != "copy" && !wanted.is_empty() && !wanted.iter().any(|word| word == part) {
            continue;
        }
        let done = match part {
            "copy" => bench.copy(),
            "launch" => bench.launch(),
            "linear" => bench.linear(),
            "experts" => bench.experts(),
            "attention" => bench.attention(),
            "router" => bench.router(),
            "ring" => bench.ring(),
            _ => bench.norm(),
        };
        // The parts before it count all the same; after a fault the device answers nothing.
        if let Err(error) = done {
            bench.lines.push(format!("{{\"op\": \"{part}\", \"error\": {:?}}}", error.to_string()));
            break;
        }
    }
    let driver = gpu.driver();
    println!(
        "{{\"device\": {:?}, \"capability\": {}, \"multiprocessors\": {}, \"tiny\": {tiny}, \"copy_gb_s\": {:.1}, \"lines\": [\n{}\n]}}",
        driver.name(),
        driver.capability(),
        driver.multiprocessors(),
        bench.copied / 1e9,
        bench.lines.join(",\n")
    );
}

fn fail(message: &str) -> ! {
    eprintln!("{message}");
    std::process::exit(2)
}

fn at(address: Address) -> Pitched {
    Pitched { first: address.0, pitch: 0 }
}

impl Bench {
    fn gpu(&self) -> &Gpu {
        self.arena.gpu()
    }

    fn bits(&mut self) -> u64 {
        // xorshift
        self.toss ^= self.toss << 13;
        self.toss ^= self.toss >> 7;
        self.toss ^= self.toss << 17;
        self.toss
    }

    /// Numbers between 1/64 and 1/4 of either sign as bf16: a device is slower on noise than on zeros.
    fn noise(&mut self, len: usize) -> Vec<u16> {
        let mut values = Vec::with_capacity(len + 3);
        while values.len() < len {
            let bits = self.bits();
            values.extend([0, 16, 32, 48].map(|shift| {
                let part = (bits >> shift) as u16;
                (part & 0x8000) | (0x3c80 + (part & 0x1ff))
            }));
        }
        values.truncate(len);
        values
    }

    fn operand(&mut self, n: usize, width: usize) -> Result<DeviceRows> {
        let rows = DeviceRows::operand(&self.arena, n, width, BF16)?;
        assert_eq!(rows.ld(), width, "no padding");
        let noise = self.noise(n * width);
        self.gpu().upload(rows.address(), moetrail_kernels::gpu::bytes_of(&noise))?;
        Ok(rows)
    }

    fn floats(&mut self, n: usize, width: usize) -> Result<DeviceRows> {
        let rows = DeviceRows::floats(&self.arena, n, width)?;
        let noise: Vec<u32> = self.noise(n * width).iter().map(|&bits| u32::from(bits) << 16).collect();
        self.gpu().upload(rows.address(), moetrail_kernels::gpu::bytes_of(&noise))?;
        Ok(rows)
    }

    fn matrix(&mut self, outs: usize, ins: usize) -> Result<DeviceMatrix> {
        let noise = self.noise(outs * ins);
        let mut builder = DeviceMatrixBuilder::zeros(self.gpu(), outs, ins, BF16)?;
        builder.put_rows(0, view(&noise, outs, ins).into())?;
        Ok(builder.finish())
    }

    /// Seconds of a call. Calls are numbered, and recorded together.
    fn time(&self, mut call: impl FnMut(usize) -> Result<()>) -> Result<f64> {
        let (gpu, driver) = (self.gpu(), self.gpu().driver());
        // The first calls load kernels and take memory from the device; the next tell how many to record.
        call(0)?;
        gpu.finish(Stream::Compute)?;
        let began = Instant::now();
        (0..2).try_for_each(&mut call)?;
        gpu.finish(Stream::Compute)?;
        let estimate = began.elapsed().as_secs_f64() / 2.0;
        let calls = if self.tiny { 2 } else { (4e-3 / estimate).clamp(4.0, 200.0) as usize };
        driver.begin_graph()?;
        let recorded = (0..calls).try_for_each(&mut call);
        let graph = driver.end_graph()?;
        recorded?;
        let launch = || {
            let began = Instant::now();
            driver.launch_graph(graph)?;
            gpu.finish(Stream::Compute)?;
            Ok::<_, GpuError>(began.elapsed().as_secs_f64() / calls as f64)
        };
        launch()?;
        let (mut seconds, began) = (Vec::new(), Instant::now());
        while seconds.len() < if self.tiny { 1 } else { 7 }
            || (!self.tiny && seconds.len() < 100 && began.elapsed().as_secs_f64() < 0.1)
        {
            seconds.push(launch()?);
        }
        driver.drop_graph(graph);
        Ok(median(seconds))
    }

    fn line(&mut self, op: &str, sizes: &[(&str, usize)], seconds: f64, work: Work) {
        let mut line = format!("{{\"op\": \"{op}\"");
        for (name, size) in sizes {
            _ = write!(line, ", \"{name}\": {size}");
        }
        _ = write!(line, ", \"us\": {:.2}", seconds * 1e6);
        if work.bytes > 0.0 {
            let rate = work.bytes / seconds;
            _ = write!(line, ", \"gb_s\": {:.1}, \"copy_share\": {:.3}", rate / 1e9, rate / self.copied);
        }
        if work.flops > 0.0 {
            _ = write!(line, ", \"tflop_s\": {:.2}", work.flops / seconds / 1e12);
        }
        line.push('}');
        eprintln!("{line}");
        self.lines.push(line);
    }

    /// The ways in which products of so many rows may be computed: where they are large and the device has two.
    fn ways(&self, n: usize) -> Vec<(Arena, &'static str)> {
        let mut ways = vec![(self.arena.clone(), "")];
        if n > 64 && (self.tiny || self.gpu().driver().capability() == 90) {
            ways.push((self.deterministic.clone(), ", deterministic"));
        }
        ways
    }

    fn copy(&mut self) -> Result<()> {
        let bytes = if self.tiny { 1 << 16 } else { 2 << 30 };
        let from = DeviceBuffer::filled(self.gpu(), bytes, 0x3c)?;
        let to = DeviceBuffer::filled(self.gpu(), bytes, 0)?;
        let seconds = self.time(|_| {
            let (to, from) = (at(to.address()), at(from.address()));
            // SAFETY: both are as long, and outlive the graph.
            Ok(unsafe { self.gpu().driver().copy(Stream::Compute, CopyKind::OnDevice, to, from, bytes, 1) }?)
        })?;
        self.copied = 2.0 * bytes as f64 / seconds;
        self.line("copy", &[("bytes", bytes)], seconds, Work { bytes: 2.0 * bytes as f64, flops: 0.0 });
        Ok(())
    }

    /// What a launch costs that computes next to nothing: issued one by one, and from a graph.
    fn launch(&mut self) -> Result<()> {
        let x = self.floats(1, 32)?;
        let weight = DeviceBuffer::of(self.gpu(), &[1.0f32; 32])?;
        let call = |_| add_rms_norm(&self.arena, &x, None, &weight, 1e-6, BF16).map(drop);
        let recorded = self.time(call)?;
        let count = if self.tiny { 2 } else { 2000 };
        let began = Instant::now();
        (0..count).try_for_each(call)?;
        let issued = began.elapsed().as_secs_f64() / count as f64;
        self.gpu().finish(Stream::Compute)?;
        let done = began.elapsed().as_secs_f64() / count as f64;
        self.line("launch from a graph", &[], recorded, Work::default());
        self.line("launch, on the host", &[], issued, Work::default());
        self.line("launch, one by one", &[], done, Work::default());
        Ok(())
    }

    fn linear(&mut self) -> Result<()> {
        let Sizes { hidden, heads, kv_heads, head_dim, vocab, rows, cold, .. } = self.sizes;
        let shapes = [
            ("qkv", hidden, (heads + 2 * kv_heads) * head_dim),
            ("attention output", heads * head_dim, hidden),
            ("head", hidden, vocab),
        ];
        for (name, ins, outs) in shapes {
            let first = self.matrix(outs, ins)?;
            let copies = (cold / first.bytes()).clamp(1, 64);
            let mut weights = vec![first];
            while weights.len() < copies {
                weights.push(self.matrix(outs, ins)?);
            }
            // The head multiplies sampled rows alone.
            for &n in rows.iter().filter(|&&n| name != "head" || n <= 64) {
                let x = self.operand(n, ins)?;
                let work = Work { bytes: weights[0].bytes() as f64, flops: (2 * n * ins * outs) as f64 };
                for (arena, how) in self.ways(n) {
                    let seconds = self.time(|i| linear(&arena, &x, &weights[i % copies], None).map(drop))?;
                    self.line(&format!("linear: {name}{how}"), &[("n", n), ("in", ins), ("out", outs)], seconds, work);
                }
            }
        }
        Ok(())
    }

    fn experts(&mut self) -> Result<()> {
        let Sizes { hidden, experts: count, top_k, inter, expert_rows, .. } = self.sizes;
        let mut builder = DeviceExperts::builder(self.gpu(), count, hidden, inter, BF16)?;
        let (inner, down) = (self.noise(inter * hidden), self.noise(hidden * inter));
        for expert in 0..count {
            builder.put_gate(expert, view(&inner, inter, hidden))?;
            builder.put_up(expert, view(&inner, inter, hidden))?;
            builder.put_down(expert, view(&down, hidden, inter))?;
        }
        let experts = builder.finish();
        for &n in expert_rows {
            let x = self.operand(n, hidden)?;
            // Calls choose differently, as the layers of a model do.
            let (mut chosen, mut touched) = (Vec::new(), 0);
            for _ in 0..8 {
                let ids: Vec<u32> = (0..n).flat_map(|_| self.distinct(count, top_k)).collect();
                let mut seen = ids.clone();
                seen.sort_unstable();
                seen.dedup();
                touched += seen.len();
                chosen.push(DeviceBuffer::of(self.gpu(), &ids)?);
            }
            let weights = DeviceBuffer::of(self.gpu(), &vec![1.0 / top_k as f32; n * top_k])?;
            let each = 3 * hidden * inter;
            let work = Work {
                bytes: touched as f64 / chosen.len() as f64 * (each * 2) as f64,
                flops: (2 * n * top_k * each) as f64,
            };
            let sizes = [("n", n), ("hidden", hidden), ("experts", count), ("top_k", top_k), ("inter", inter)];
            for (arena, how) in self.ways(n) {
                let seconds = self.time(|i| {
                    let ids = chosen[i % chosen.len()].address();
                    expert_ffn(&arena, &x, ids, weights.address(), top_k, &experts).map(drop)
                })?;
                self.line(&format!("expert_ffn{how}"), &sizes, seconds, work);
            }
        }
        Ok(())
    }

    fn distinct(&mut self, count: usize, top_k: usize) -> Vec<u32> {
        let mut ids = Vec::new();
        while ids.len() < top_k {
            let id = (self.bits() >> 11) as usize % count;
            if !ids.contains(&(id as u32)) {
                ids.push(id as u32);
            }
        }
        ids
    }

    fn attention(&mut self) -> Result<()> {
        const BLOCK: usize = 16;
        let Sizes { heads, kv_heads, head_dim, decode, prefill, slots, .. } = self.sizes;
        let shape = AttentionShape {
            heads,
            kv_heads,
            head_dim,
            scale: (head_dim as f32).powf(-0.5),
            window: None,
            clip_qkv: None,
        };
        let (layers, num_blocks, width) = (2, slots.div_ceil(BLOCK), (heads + 2 * kv_heads) * head_dim);
        let kv = DeviceKv::new(self.gpu(), layers, num_blocks, BLOCK, kv_heads, head_dim, BF16)?;
        let weight = vec![1.0; head_dim];
        let norm = QkNorm { q_weight: weight.clone(), k_weight: weight, eps: 1e-6, per_head: true };
        let norm = DeviceQkNorm::new(self.gpu(), &norm)?;
        let frequencies = (0..head_dim / 2).map(|i| 1e6f32.powf(-2.0 * i as f32 / head_dim as f32)).collect();
        let most = *prefill.iter().max().expect("some").min(&slots);
        let rope = DeviceRope::new(self.gpu(), &RopeTable::new(frequencies, 1.0, most))?;
        let qkv = self.floats(most, width)?;
        let positions: Vec<u32> = (0..most as u32).collect();
        let positions = DeviceBuffer::of(self.gpu(), &positions)?;
        let all: Vec<u32> = (0..(num_blocks * BLOCK) as u32).collect();
        let all = DeviceBuffer::of(self.gpu(), &all)?;
        let store = |rows: &DeviceRows, first: usize, layer: usize| {
            let slots = all.address().at(first * 4);
            qkv_rope_store(&self.arena, rows, &shape, Some(&norm), &rope, positions.address(), slots, &kv, layer)
        };
        for layer in 0..layers {
            for first in (0..num_blocks * BLOCK).step_by(most) {
                store(&qkv.slice(0, most.min(num_blocks * BLOCK - first)), first, layer)?;
            }
        }
        let mut found = Vec::new();
        for n in [1, 64, most] {
            let rows = qkv.slice(0, n.min(most));
            let seconds =
                self.time(|i| store(&rows, i * 64 % (num_blocks * BLOCK - most + 1), i % layers).map(drop))?;
            let moved = rows.len() * (width * 4 + width * 2);
            found.push(("qkv_rope_store", [("n", rows.len()), ("width", width)], seconds, moved, 0));
        }
        let mut blocks: Vec<u32> = (0..num_blocks as u32).collect();
        for i in (1..blocks.len()).rev() {
            blocks.swap(i, self.bits() as usize % (i + 1));
        }
        let q = self.operand(most, shape.q_width())?;
        for &(batch, context) in decode {
            let each = context.div_ceil(BLOCK);
            // Calls look at other parts of the cache.
            let groups = (num_blocks / (batch * each)).clamp(1, 32);
            let bucket = DecodeBucket::new(&shape, batch, context);
            let mut plans = Vec::new();
            for group in 0..groups {
                let span = |i: usize| SeqSpan {
                    rows: i..i + 1,
                    first_position: context as u32 - 1,
                    block_table: &blocks[(group * batch + i) * each..][..each],
                };
                let spans: Vec<SeqSpan<'_>> = (0..batch).map(span).collect();
                let plan = AttentionPlan::decode(&shape, &kv, &spans, &bucket)?;
                plans.push((DeviceBuffer::of(self.gpu(), plan.words())?, plan));
            }
            let rows = q.slice(0, batch);
            let seconds = self.time(|i| {
                let (words, plan) = &plans[i % groups];
                paged_attention(&self.arena, &rows, &shape, plan, words.address(), &kv, i / groups % layers).map(drop)
            })?;
            let moved = batch * context * 2 * kv_heads * head_dim * 2;
            let flops = 4 * batch * context * heads * head_dim;
            found.push(("attention, decode", [("batch", batch), ("context", context)], seconds, moved, flops));
        }
        for &n in prefill {
            let span = SeqSpan { rows: 0..n, first_position: 0, block_table: &blocks[..n.div_ceil(BLOCK)] };
            let plan = AttentionPlan::new(&shape, &kv, &[span])?;
            let words = DeviceBuffer::of(self.gpu(), plan.words())?;
            let rows = q.slice(0, n);
            let call =
                |i| paged_attention(&self.arena, &rows, &shape, &plan, words.address(), &kv, i % layers).map(drop);
            let seconds = self.time(call)?;
            found.push((
                "attention, prefill",
                [("n", n), ("context", n)],
                seconds,
                0,
                2 * n * (n + 1) * heads * head_dim,
            ));
        }
        for (op, sizes, seconds, bytes, flops) in found {
            self.line(op, &sizes, seconds, Work { bytes: bytes as f64, flops: flops as f64 });
        }
        Ok(())
    }

    fn router(&mut self) -> Result<()> {
        let Sizes { hidden, experts, top_k, layers, rows, slots, .. } = self.sizes;
        let gate = self.noise(experts * hidden);
        let router = DeviceRouter::new(self.gpu(), view(&gate, experts, hidden), None)?;
        let cfg = DeviceRouterConfig::from(RouterConfig { top_k, num_experts: experts, norm_topk_prob: true });
        let ring = DeviceRing::new(self.gpu(), slots, layers, top_k, false)?;
        for &n in rows {
            let x = self.operand(n, hidden)?;
            let marks = DeviceBuffer::filled(self.gpu(), 2 * n * 4, 0)?;
            let order: Vec<u32> = (0..n).map(|i| ((i / 16 * 7919 * 16 + i % 16) % slots) as u32).collect();
            let order = DeviceBuffer::of(self.gpu(), &order)?;
            let call = |capture: bool, i: usize| {
                let write = DeviceRingWrite { ring: &ring, moe_layer: i % layers };
                let write = capture.then_some(write);
                let slots = Some(order.address());
                route(&self.arena, &x, &router, &cfg, slots, write, None, marks.address()).map(drop)
            };
            let (without, with) = (self.time(|i| call(false, i))?, self.time(|i| call(true, i))?);
            let work = Work { bytes: 0.0, flops: (2 * n * hidden * experts) as f64 };
            self.line("route", &[("n", n), ("experts", experts)], without, work);
            self.line("route, captured", &[("n", n), ("experts", experts)], with, work);
        }
        Ok(())
    }

    /// Rows on their way to the host: gathered, copied, and both with all that `drain` does.
    fn ring(&mut self) -> Result<()> {
        let Sizes { top_k, layers, slots, drained: n, .. } = self.sizes;
        let ring = DeviceRing::new(self.gpu(), slots, layers, top_k, false)?;
        let bytes = n * ring.row_bytes();
        let list: Vec<u32> = (0..n).map(|i| ((i / 16 * 7919 * 16 + i % 16) % slots) as u32).collect();
        let on_device = DeviceBuffer::of(self.gpu(), &list)?;
        let out = DeviceBuffer::new(self.gpu(), bytes)?;
        let pinned = PinnedBuffer::new(self.gpu(), bytes)?;
        let gather = self.time(|_| Ok(ring.gather(on_device.address(), n, out.address())?))?;
        let copy = self.time(|_| {
            let to = Pitched { first: pinned.bytes().as_ptr() as u64, pitch: 0 };
            // SAFETY: both are as long, and outlive the graph; nobody reads the pinned bytes.
            Ok(unsafe { self.gpu().driver().copy(Stream::Compute, CopyKind::ToHost, to, at(out.address()), bytes, 1) }?)
        })?;
        let staging = RowStaging::new(self.gpu(), 4 * (bytes + n * 4) + 4096)?;
        let (mut issued, mut landed) = (Vec::new(), Vec::new());
        for _ in 0..if self.tiny { 1 } else { 20 } {
            self.gpu().finish(Stream::Compute)?;
            let began = Instant::now();
            let mut rows = staging.drain(&ring, &list)?;
            issued.push(began.elapsed().as_secs_f64());
            assert_eq!(rows.land()?.len(), bytes);
            landed.push(began.elapsed().as_secs_f64());
        }
        let sizes = [("n", n), ("row_bytes", ring.row_bytes())];
        self.line("ring_gather", &sizes, gather, Work { bytes: 2.0 * bytes as f64, flops: 0.0 });
        // Of the bus, not of device memory: no share.
        for (op, seconds) in [
            ("rows to pinned memory", copy),
            ("drain, issued", median(issued)),
            ("drain, landed on the heap", median(landed)),
        ] {
            self.line(op, &sizes, seconds, Work::default());
        }
        Ok(())
    }

    fn norm(&mut self) -> Result<()> {
        let Sizes { hidden, rows, .. } = self.sizes;
        let weight = DeviceBuffer::of(self.gpu(), &vec![1.0f32; hidden])?;
        for &n in rows {
            // What is added is small: many calls change the same rows.
            let (x, addition) = (self.floats(n, hidden)?, self.floats(n, hidden)?);
            let call = |_| add_rms_norm(&self.arena, &x, Some(&addition), &weight, 1e-6, BF16).map(drop);
            let seconds = self.time(call)?;
            let work = Work { bytes: (n * hidden * (4 + 4 + 4 + 2)) as f64, flops: 0.0 };
            self.line("add_rms_norm", &[("n", n), ("width", hidden)], seconds, work);
        }
        Ok(())
    }
}

fn view(values: &[u16], rows: usize, cols: usize) -> WeightView<'_> {
    WeightView::row_major(moetrail_kernels::gpu::bytes_of(values), BF16, rows, cols)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}
