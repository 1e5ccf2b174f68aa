//! What every measure needs: noise on the device, the time of a call, a line of the report.

use std::fmt::Write;
use std::time::Instant;

use moetrail_kernels::gpu::{Arena, DeviceMatrix, DeviceMatrixBuilder, DeviceRows, Gpu, GpuError, Stream, bytes_of};
use moetrail_kernels::{KernelError, WeightDtype, WeightView};

use crate::sizes::{LARGE, Sizes, TINY};

pub(crate) type Result<T> = std::result::Result<T, KernelError>;

pub(crate) const BF16: WeightDtype = WeightDtype::BF16;

pub(crate) struct Bench {
    pub(crate) arena: Arena,
    /// For products as under `--deterministic`.
    pub(crate) deterministic: Arena,
    pub(crate) sizes: Sizes,
    pub(crate) tiny: bool,
    /// Bytes a second of a copy on the device, read and written.
    pub(crate) copied: f64,
    toss: u64,
    pub(crate) lines: Vec<String>,
}

/// What a call moves and computes.
#[derive(Clone, Copy, Default)]
pub(crate) struct Work {
    pub(crate) bytes: f64,
    pub(crate) flops: f64,
}

impl Bench {
    pub(crate) fn new(gpu: &Gpu, tiny: bool) -> Bench {
        let deterministic = Arena::new(&gpu.clone().with_deterministic(true));
        let sizes = if tiny { TINY } else { LARGE };
        Bench { arena: Arena::new(gpu), deterministic, sizes, tiny, copied: 0.0, toss: 1, lines: Vec::new() }
    }

    pub(crate) fn gpu(&self) -> &Gpu {
        self.arena.gpu()
    }

    pub(crate) fn bits(&mut self) -> u64 {
        // xorshift
        self.toss ^= self.toss << 13;
        self.toss ^= self.toss >> 7;
        self.toss ^= self.toss << 17;
        self.toss
    }

    /// Numbers between 1/64 and 1/4 of either sign as bf16: a device is slower on noise than on zeros.
    pub(crate) fn noise(&mut self, len: usize) -> Vec<u16> {
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

    pub(crate) fn operand(&mut self, n: usize, width: usize) -> Result<DeviceRows> {
        let rows = DeviceRows::operand(&self.arena, n, width, BF16)?;
        assert_eq!(rows.ld(), width, "no padding");
        let noise = self.noise(n * width);
        self.gpu().upload(rows.address(), bytes_of(&noise))?;
        Ok(rows)
    }

    pub(crate) fn floats(&mut self, n: usize, width: usize) -> Result<DeviceRows> {
        let rows = DeviceRows::floats(&self.arena, n, width)?;
        let noise: Vec<u32> = self.noise(n * width).iter().map(|&bits| u32::from(bits) << 16).collect();
        self.gpu().upload(rows.address(), bytes_of(&noise))?;
        Ok(rows)
    }

    pub(crate) fn matrix(&mut self, outs: usize, ins: usize) -> Result<DeviceMatrix> {
        let noise = self.noise(outs * ins);
        let mut builder = DeviceMatrixBuilder::zeros(self.gpu(), outs, ins, BF16)?;
        builder.put_rows(0, view(&noise, outs, ins).into())?;
        Ok(builder.finish())
    }

    /// Seconds of a call. Calls are numbered, and recorded together.
    pub(crate) fn time(&self, mut call: impl FnMut(usize) -> Result<()>) -> Result<f64> {
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

    pub(crate) fn line(&mut self, op: &str, sizes: &[(&str, usize)], seconds: f64, work: Work) {
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
    pub(crate) fn ways(&self, n: usize) -> Vec<(Arena, &'static str)> {
        let mut ways = vec![(self.arena.clone(), "")];
        if n > 64 && (self.tiny || self.gpu().driver().capability() == 90) {
            ways.push((self.deterministic.clone(), ", deterministic"));
        }
        ways
    }
}

pub(crate) fn view(values: &[u16], rows: usize, cols: usize) -> WeightView<'_> {
    WeightView::row_major(bytes_of(values), BF16, rows, cols)
}

pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}
