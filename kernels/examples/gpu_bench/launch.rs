//! A launch by itself.

use std::time::Instant;

use moetrail_kernels::gpu::{DeviceBuffer, Stream, add_rms_norm};

use crate::bench::{BF16, Bench, Result, Work};

impl Bench {
    /// What a launch costs that computes next to nothing: issued one by one, and from a graph.
    pub(crate) fn launch(&mut self) -> Result<()> {
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
}
