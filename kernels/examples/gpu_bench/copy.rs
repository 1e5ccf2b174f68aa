//! What the device copies in its own memory: what the bytes of all other measures are compared with.

use moetrail_kernels::gpu::{Address, CopyKind, DeviceBuffer, Pitched, Stream};

use crate::bench::{Bench, Result, Work};

impl Bench {
    pub(crate) fn copy(&mut self) -> Result<()> {
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
}

/// Bytes that lie together.
pub(crate) fn at(address: Address) -> Pitched {
    Pitched { first: address.0, pitch: 0 }
}
