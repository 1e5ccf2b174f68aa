//! The ring of routed experts on its way to the host.

use std::time::Instant;

use moetrail_kernels::gpu::{CopyKind, DeviceBuffer, DeviceRing, PinnedBuffer, Pitched, RowStaging, Stream};

use crate::bench::{Bench, Result, Work, median};
use crate::copy::at;
use crate::sizes::Sizes;

impl Bench {
    /// Rows on their way to the host: gathered, copied, and both with all that `drain` does.
    pub(crate) fn ring(&mut self) -> Result<()> {
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
}
