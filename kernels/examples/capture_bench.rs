//! What capture adds to the router's kernel: the same choices with and without their way into the ring, in turn.
//!
//! `cargo run --release -p moetrail-kernels --example capture_bench`; prints JSON, nanoseconds of one layer's call. The rows
//! go to slots of a ring of a million slots and 20 layers, block by block in no order, as a served batch's do.

use std::time::Instant;

use moetrail_kernels::{Form, RingCells, RingWrite, RouterConfig, pool, select};

const EXPERTS: usize = 64;
const TOP_K: usize = 8;
const LAYERS: usize = 20;
const SLOTS: usize = 1 << 20;
const BLOCK: usize = 16;
const ROUNDS: usize = 60;

fn main() {
    let cfg = RouterConfig { top_k: TOP_K, num_experts: EXPERTS, norm_topk_prob: true };
    let mut ring = vec![0u8; SLOTS * LAYERS * TOP_K];
    let mut found = Vec::new();
    for n in [1, 8, 32, 512, 2048] {
        let logits: Vec<f32> = (0..n * EXPERTS).map(|i| (i * 7919 % 1000) as f32 * 0.01).collect();
        let (mut ids, mut weights) = (vec![0; n * TOP_K], vec![0.0; n * TOP_K]);
        let calls = (400_000 / (n + 50)).max(40);
        let mut call = |capture: bool, round: usize| {
            let begin = Instant::now();
            for call in 0..calls {
                let at = |row: usize| {
                    let block = (round * calls + call + row / BLOCK) * 7919 % (SLOTS / BLOCK);
                    (block * BLOCK + row % BLOCK) as u32
                };
                // Made either way, so that only the writing differs.
                let slots: Vec<u32> = (0..n).map(at).collect();
                let cells = RingCells::U8(&mut ring);
                let write = RingWrite { cells, moe_layers: LAYERS, moe_layer: call % LAYERS, slots: &slots };
                let write = capture.then_some(write);
                select(Form::current(), &logits, &cfg, write, None, &mut ids, &mut weights).expect("the shapes agree");
            }
            begin.elapsed().as_secs_f64() * 1e9 / calls as f64
        };
        let (mut on, mut off) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            for capture in if round % 2 == 0 { [true, false] } else { [false, true] } {
                if capture { &mut on } else { &mut off }.push(call(capture, round));
            }
        }
        let mut added: Vec<f64> = on.iter().zip(&off).map(|(on, off)| on - off).collect();
        added.sort_unstable_by(f64::total_cmp);
        let median = added[ROUNDS / 2];
        off.sort_unstable_by(f64::total_cmp);
        let without = off[ROUNDS / 2];
        found.push(format!(
            "{{\"rows\": {n}, \"ns_without\": {without:.0}, \"ns_added\": {median:.0}, \"ns_added_a_row\": {:.1}}}",
            median / n as f64
        ));
    }
    println!(
        "{{\"form\": \"{}\", \"threads\": {}, \"experts\": {EXPERTS}, \"top_k\": {TOP_K}, \"layers_of_ring\": {LAYERS}, \"calls\": [{}]}}",
        Form::current(),
        pool::threads(),
        found.join(", ")
    );
}
