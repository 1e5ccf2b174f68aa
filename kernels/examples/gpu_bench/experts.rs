//! The experts' networks of a layer.

use moetrail_kernels::gpu::{DeviceBuffer, DeviceExperts, expert_ffn};

use crate::bench::{BF16, Bench, Result, Work, view};
use crate::sizes::Sizes;

impl Bench {
    pub(crate) fn experts(&mut self) -> Result<()> {
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
}
