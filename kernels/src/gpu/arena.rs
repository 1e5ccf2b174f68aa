//! Device memory for what lives within a step.

use std::sync::{Arc, Mutex, MutexGuard};

use crate::gpu::{Address, DeviceBuffer, Gpu, GpuError, Stream};

/// Addresses are multiples of this.
const ALIGN: usize = 256;

/// Regions grow by at least this.
const REGION: usize = 32 << 20;

/// Hands out device memory without asking the device: equal steps get equal addresses, so that a recorded step can be
/// launched again. A clone is the same arena.
///
/// All users issue to [`Stream::Compute`], so memory may be handed out again while what used it before is still to happen.
#[derive(Clone, Debug)]
pub struct Arena {
    gpu: Gpu,
    regions: Arc<Mutex<Vec<Region>>>,
}

#[derive(Debug)]
struct Region {
    buffer: DeviceBuffer,
    /// Free stretches `(first, bytes)`, ascending, none adjacent.
    free: Vec<(usize, usize)>,
}

/// Memory of an arena; dropped, it may be handed out again.
#[derive(Debug)]
pub struct Scratch {
    arena: Arena,
    address: Address,
    bytes: usize,
}

impl Arena {
    /// An empty arena, which grows as it is asked.
    pub fn new(gpu: &Gpu) -> Arena {
        gpu.must_compute();
        Arena { gpu: gpu.clone(), regions: Arc::default() }
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Memory with undefined content.
    pub fn take(&self, bytes: usize) -> Result<Scratch, GpuError> {
        let bytes = bytes.max(1).next_multiple_of(ALIGN);
        let mut regions = self.regions();
        let found = regions.iter_mut().find_map(|region| region.take(bytes));
        let address = match found {
            Some(address) => address,
            None => {
                let size = bytes.max(REGION);
                let buffer = DeviceBuffer::new(&self.gpu, size)?;
                let mut region = Region { buffer, free: vec![(0, size)] };
                let address = region.take(bytes).expect("a new region is large enough");
                regions.push(region);
                address
            }
        };
        Ok(Scratch { arena: self.clone(), address, bytes })
    }

    /// Bytes taken from the device.
    pub fn bytes(&self) -> usize {
        self.regions().iter().map(|region| region.buffer.bytes()).sum()
    }

    fn regions(&self) -> MutexGuard<'_, Vec<Region>> {
        self.regions.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

impl Region {
    /// The first stretch that is long enough.
    fn take(&mut self, bytes: usize) -> Option<Address> {
        let index = self.free.iter().position(|(_, len)| *len >= bytes)?;
        let (first, len) = self.free[index];
        match len == bytes {
            true => _ = self.free.remove(index),
            false => self.free[index] = (first + bytes, len - bytes),
        }
        Some(self.buffer.address().at(first))
    }

    fn holds(&self, address: Address) -> bool {
        let first = self.buffer.address();
        (first.0..first.at(self.buffer.bytes()).0).contains(&address.0)
    }

    fn give(&mut self, address: Address, bytes: usize) {
        let first = (address.0 - self.buffer.address().0) as usize;
        let index = self.free.partition_point(|(other, _)| *other < first);
        self.free.insert(index, (first, bytes));
        let mut join = |index: usize| {
            let (Some(&(first, len)), Some(&(next, more))) = (self.free.get(index), self.free.get(index + 1)) else {
                return;
            };
            if first + len == next {
                self.free[index].1 += more;
                self.free.remove(index + 1);
            }
        };
        join(index);
        if index > 0 {
            join(index - 1);
        }
    }
}

impl Scratch {
    /// Where it is.
    pub fn address(&self) -> Address {
        self.address
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        &self.arena.gpu
    }

    /// Sets the first `bytes` bytes to `value`, at this place of [`Stream::Compute`].
    pub fn fill(&self, value: u8, bytes: usize) -> Result<(), GpuError> {
        assert!(bytes <= self.bytes, "{bytes} of {} bytes", self.bytes);
        // SAFETY: the scratch is as long, and belongs to the arena's stream.
        unsafe { self.gpu().driver().fill(Stream::Compute, self.address, value, bytes) }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let mut regions = self.arena.regions();
        let owner = regions.iter_mut().find(|region| region.holds(self.address));
        owner.expect("regions are never given back").give(self.address, self.bytes);
    }
}
