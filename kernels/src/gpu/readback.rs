//! What a step tells the host.

use crate::gpu::memory::bytes_of_mut;
use crate::gpu::{Address, CopyKind, Event, Gpu, GpuError, PinnedBuffer, Pitched, Stream};

/// Pinned buffers are at least this large: few grow.
const LEAST: usize = 4096;

/// Words on their way to the host. Dropped, they are of no interest any more.
#[derive(Debug)]
pub struct PendingWords {
    gpu: Gpu,
    /// Where they arrive, and when they have; `None` if there are none.
    coming: Option<(PinnedBuffer, Event)>,
    /// Words of each part.
    parts: Vec<usize>,
}

impl Gpu {
    /// Issues copies of the words at several addresses, behind all that was issued to [`Stream::Compute`]. What is issued
    /// to it from now on may overwrite them.
    pub fn send_words(&self, parts: &[(Address, usize)]) -> Result<PendingWords, GpuError> {
        let lens: Vec<usize> = parts.iter().map(|(_, len)| *len).collect();
        let bytes = 4 * lens.iter().sum::<usize>();
        let mut pending = PendingWords { gpu: self.clone(), coming: None, parts: lens };
        if bytes == 0 {
            return Ok(pending);
        }
        let idle = self.readback().pop().filter(|buffer| buffer.len() >= bytes);
        let buffer = match idle {
            Some(buffer) => buffer,
            None => PinnedBuffer::new(self, bytes.next_power_of_two().max(LEAST))?,
        };
        let mut to = buffer.address();
        for (from, len) in parts.iter().filter(|(_, len)| *len > 0) {
            let from = Pitched { first: from.0, pitch: 0 };
            // SAFETY: the caller names its own device memory; the buffer is held until the copies have happened, and is as
            // long. Where a copy is refused, dropping it waits for those before.
            unsafe {
                self.driver().copy(
                    Stream::Compute,
                    CopyKind::ToHost,
                    Pitched { first: to, pitch: 0 },
                    from,
                    4 * len,
                    1,
                )?
            };
            to += 4 * *len as u64;
        }
        let event = self.driver().record(Stream::Compute)?;
        pending.coming = Some((buffer, event));
        Ok(pending)
    }

    fn readback(&self) -> std::sync::MutexGuard<'_, Vec<PinnedBuffer>> {
        self.readback.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

impl PendingWords {
    /// Waits for the words of each part.
    ///
    /// # Errors
    /// The device failed.
    pub fn finish(self) -> Result<Vec<Vec<u32>>, GpuError> {
        self.wait()?;
        let mut rest = self.coming.as_ref().map_or(&[][..], |(buffer, _)| buffer.bytes());
        let take = |len: &usize| {
            let mut words = vec![0; *len];
            let (own, after) = rest.split_at(4 * len);
            bytes_of_mut(&mut words).copy_from_slice(own);
            rest = after;
            words
        };
        Ok(self.parts.iter().map(take).collect())
    }

    fn wait(&self) -> Result<(), GpuError> {
        self.coming.as_ref().map_or(Ok(()), |(_, event)| self.gpu.driver().finish(*event))
    }
}

impl Drop for PendingWords {
    fn drop(&mut self) {
        // Others get the buffer only when nothing arrives in it any more.
        _ = self.wait();
        if let Some((buffer, event)) = self.coming.take() {
            self.gpu.driver().forget(event);
            self.gpu.readback().push(buffer);
        }
    }
}
