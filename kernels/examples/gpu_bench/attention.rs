//! Keys and values stored, and attended over a cache of two layers.

use moetrail_kernels::gpu::{
    AttentionPlan, DecodeBucket, DeviceBuffer, DeviceKv, DeviceQkNorm, DeviceRope, DeviceRows, paged_attention,
    qkv_rope_store,
};
use moetrail_kernels::{AttentionShape, QkNorm, RopeTable, SeqSpan};

use crate::bench::{BF16, Bench, Result, Work};
use crate::sizes::Sizes;

impl Bench {
    pub(crate) fn attention(&mut self) -> Result<()> {
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
}
