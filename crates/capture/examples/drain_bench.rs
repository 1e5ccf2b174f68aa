//! How fast rows come from the ring to the host, and what a ledger costs a token: `cargo run --release --example
//! drain_bench`. Prints JSON; every figure stands beside a plain copy of the same bytes in the same run.

use std::time::Instant;

use moetrail_capture::{CaptureRing, Cells, RingLayout, SequenceRows};
use moetrail_sched::{BlockPool, BlockRef, RequestKey};

const BLOCK_SIZE: usize = 16;
const ROUNDS: usize = 21;

/// A ring whose blocks lie in no order, as after hours of service, and the table of one sequence over all of them.
struct Ring {
    ring: CaptureRing,
    pool: BlockPool,
    blocks: Vec<BlockRef>,
}

impl Ring {
    fn new(num_rows: usize, layers: usize, num_experts: usize) -> Self {
        let num_blocks = num_rows.div_ceil(BLOCK_SIZE);
        let layout = RingLayout::new(layers, (0..layers).collect(), 8, num_experts);
        let mut ring = CaptureRing::new(layout, num_blocks, BLOCK_SIZE);
        match ring.cells_mut() {
            Cells::U8(cells) => cells.iter_mut().enumerate().for_each(|(i, cell)| *cell = i as u8),
            Cells::U16(cells) => cells.iter_mut().enumerate().for_each(|(i, cell)| *cell = i as u16),
            Cells::Device(_) => unreachable!("it was made in host memory"),
        }
        let mut pool = BlockPool::new(num_blocks as u32);
        let mut blocks: Vec<BlockRef> = (0..num_blocks).filter_map(|_| pool.allocate(RequestKey(1))).collect();
        // A multiplicative step visits every block once in an order without a stride.
        let order = |i: usize| (i * 7919 + 13) % num_blocks;
        blocks = (0..num_blocks).map(|i| blocks[order(i)]).collect();
        Self { ring, pool, blocks }
    }

    /// Seconds to drain `num_rows` rows, `slice` rows at a time.
    fn drain(&self, num_rows: usize, slice: usize) -> f64 {
        let mut rows = SequenceRows::new(0, num_rows, self.ring.layout().row_bytes());
        let began = Instant::now();
        for upto in (slice..=num_rows).step_by(slice) {
            rows.drain(&self.ring, &self.pool, &self.blocks, RequestKey(1), upto, &"0".into()).expect("rows are there");
        }
        let elapsed = began.elapsed().as_secs_f64();
        assert_eq!(rows.span().len(), num_rows);
        elapsed
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Seconds to copy as many bytes into fresh memory, which is what a ledger is.
fn plain_copy(bytes: &[u8]) -> f64 {
    let began = Instant::now();
    let mut to: Vec<u8> = Vec::with_capacity(bytes.len());
    to.extend_from_slice(std::hint::black_box(bytes));
    std::hint::black_box(&to);
    began.elapsed().as_secs_f64()
}

fn main() {
    let num_rows = 32_768;
    let mut lines = Vec::new();
    for (layers, num_experts) in [(20, 64), (48, 128), (61, 384)] {
        let ring = Ring::new(num_rows, layers, num_experts);
        let bytes = num_rows * ring.ring.layout().row_bytes();
        let source = vec![1u8; bytes];
        let (mut copies, mut drains, mut sliced) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            copies.push(plain_copy(&source));
            drains.push(ring.drain(num_rows, num_rows));
            sliced.push(ring.drain(num_rows, 2048));
        }
        let ratio = median(copies.iter().zip(&drains).map(|(copy, drain)| copy / drain).collect());
        lines.push(format!(
            r#"{{"measure":"drain","rows":{num_rows},"row_bytes":{},"copy_gb_s":{:.2},"drain_gb_s":{:.2},"sliced_gb_s":{:.2},"share_of_copy":{ratio:.3}}}"#,
            ring.ring.layout().row_bytes(),
            bytes as f64 / median(copies) / 1e9,
            bytes as f64 / median(drains) / 1e9,
            bytes as f64 / median(sliced) / 1e9,
        ));
    }
    // A token's share of the ledger's work, one row at a time as a streamed delta drains, at growing contexts.
    // Ring and ledger have room for the longest in every case, so that caches and fresh pages cost all of them alike.
    let longest = (1 << 17) + 1024;
    let ring = Ring::new(longest, 48, 128);
    let other = vec![1u8; 128 << 20];
    for context in [1 << 10, 1 << 12, 1 << 14, 1 << 17] {
        let mut per_token = Vec::new();
        for _ in 0..ROUNDS {
            let mut rows = SequenceRows::new(0, longest, ring.ring.layout().row_bytes());
            let drain = |rows: &mut SequenceRows, upto| {
                rows.drain(&ring.ring, &ring.pool, &ring.blocks, RequestKey(1), upto, &"0".into()).expect("rows");
            };
            drain(&mut rows, context);
            // A step computes between two tokens: caches hold other things then, whatever the context.
            std::hint::black_box(other.iter().map(|x| u64::from(*x)).sum::<u64>());
            let began = Instant::now();
            (1..=1024).for_each(|token| drain(&mut rows, context + token));
            per_token.push(began.elapsed().as_secs_f64() / 1024.0);
        }
        let nanoseconds = median(per_token) * 1e9;
        lines.push(format!(r#"{{"measure":"ledger","context":{context},"ns_per_token":{nanoseconds:.0}}}"#));
    }
    println!("[\n{}\n]", lines.join(",\n"));
}
