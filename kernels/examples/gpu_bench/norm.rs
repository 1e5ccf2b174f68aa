//! The residual addition and its norm.

use moetrail_kernels::gpu::{DeviceBuffer, add_rms_norm};

use crate::bench::{BF16, Bench, Result, Work};
use crate::sizes::Sizes;

impl Bench {
    pub(crate) fn norm(&mut self) -> Result<()> {
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
