use crate::gpu::{Address, CopyKind, DeviceBuffer, Event, Gpu, GpuError, PinnedBuffer, Pitched, Stream};

/// Parts begin at multiples of this.
const ALIGN: usize = 16;

/// Carries a step's numbers to the device: into one pinned buffer, then in one copy to memory whose address stays, as
/// long as it is large enough, so that a recorded step finds them.
#[derive(Debug)]
pub struct Upload {
    gpu: Gpu,
    to: DeviceBuffer,
    /// Two, so that one is filled while the other is still being copied.
    from: [Slot; 2],
    turn: usize,
}

#[derive(Debug)]
struct Slot {
    pinned: PinnedBuffer,
    /// When its last copy has happened.
    copied: Option<Event>,
}

impl Upload {
    /// Room for `bytes`; it grows as it is asked.
    pub fn new(gpu: &Gpu, bytes: usize) -> Result<Upload, GpuError> {
        let slot = || Ok::<_, GpuError>(Slot { pinned: PinnedBuffer::new(gpu, bytes)?, copied: None });
        Ok(Upload { gpu: gpu.clone(), to: DeviceBuffer::new(gpu, bytes)?, from: [slot()?, slot()?], turn: 0 })
    }

    /// Where the parts lie begins here; another address once it has grown.
    pub fn address(&self) -> Address {
        self.to.address()
    }

    /// Issues the copy of all parts to [`Stream::Compute`] and returns where each will be. What was put before is
    /// overwritten, in the stream's order.
    pub fn put<const N: usize>(&mut self, parts: [&[u8]; N]) -> Result<[Address; N], GpuError> {
        let total: usize = parts.iter().map(|part| part.len().next_multiple_of(ALIGN)).sum();
        if total > self.to.bytes() {
            // Dropping the old memory waits for what still reads it.
            *self = Upload::new(&self.gpu, total.next_power_of_two())?;
        }
        self.turn ^= 1;
        let slot = &mut self.from[self.turn];
        if let Some(event) = slot.copied.take() {
            self.gpu.driver().finish(event)?;
            self.gpu.driver().forget(event);
        }
        let mut at = 0;
        let places = parts.map(|part| {
            slot.pinned.bytes_mut()[at..at + part.len()].copy_from_slice(part);
            let place = self.to.address().at(at);
            at += part.len().next_multiple_of(ALIGN);
            place
        });
        if total > 0 {
            let to = Pitched { first: self.to.address().0, pitch: 0 };
            let from = Pitched { first: slot.pinned.address(), pitch: 0 };
            // SAFETY: both are as long, and this slot is not touched before its event has happened.
            unsafe { self.gpu.driver().copy(Stream::Compute, CopyKind::ToDevice, to, from, total, 1)? };
            slot.copied = Some(self.gpu.driver().record(Stream::Compute)?);
        }
        Ok(places)
    }
}
