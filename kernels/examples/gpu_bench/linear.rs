//! Products with the matrices of a layer and with the head.

use moetrail_kernels::gpu::linear;

use crate::bench::{Bench, Result, Work};
use crate::sizes::Sizes;

impl Bench {
    pub(crate) fn linear(&mut self) -> Result<()> {
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
}
