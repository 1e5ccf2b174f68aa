//! Memory that is given back when it is dropped.

use std::sync::Arc;

use crate::gpu::driver::{Address, CopyKind, Driver, Pitched};
use crate::gpu::{Gpu, GpuError};

/// Device memory with a stable address.
#[derive(Debug)]
pub struct DeviceBuffer {
    driver: Arc<dyn Driver>,
    address: Address,
    bytes: usize,
}

impl DeviceBuffer {
    /// Memory with undefined content.
    pub fn new(gpu: &Gpu, bytes: usize) -> Result<DeviceBuffer, GpuError> {
        let driver = gpu.driver().clone();
        let address = driver.allocate(bytes.max(1))?;
        Ok(DeviceBuffer { driver, address, bytes })
    }

    /// Memory with every byte `value`, at this place of the handle's stream.
    pub fn filled(gpu: &Gpu, bytes: usize, value: u8) -> Result<DeviceBuffer, GpuError> {
        let buffer = DeviceBuffer::new(gpu, bytes)?;
        // SAFETY: the buffer is as long, and given back only after what was issued has happened.
        unsafe { buffer.driver.fill(gpu.stream(), buffer.address, value, bytes)? };
        Ok(buffer)
    }

    /// Memory with this content, which is there when the call returns.
    pub fn of<T: Plain>(gpu: &Gpu, content: &[T]) -> Result<DeviceBuffer, GpuError> {
        let buffer = DeviceBuffer::new(gpu, size_of_val(content))?;
        gpu.upload(buffer.address, bytes_of(content))?;
        Ok(buffer)
    }

    /// Where it is.
    pub fn address(&self) -> Address {
        self.address
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        // SAFETY: the address came from this driver, and its owner is going.
        unsafe { self.driver.free(self.address) };
    }
}

/// Host memory that a device copies to and from by itself.
#[derive(Debug)]
pub struct PinnedBuffer {
    driver: Arc<dyn Driver>,
    pointer: *mut u8,
    bytes: usize,
}

// SAFETY: it is plain memory with one owner.
unsafe impl Send for PinnedBuffer {}
// SAFETY: shared borrows of it only read.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    /// Zeroed memory.
    pub fn new(gpu: &Gpu, bytes: usize) -> Result<PinnedBuffer, GpuError> {
        let driver = gpu.driver().clone();
        let pointer = driver.allocate_pinned(bytes.max(1))?;
        Ok(PinnedBuffer { driver, pointer, bytes })
    }

    /// Its size.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Its address, for copies.
    pub(crate) fn address(&self) -> u64 {
        self.pointer as u64
    }

    /// Its bytes. No copy to them may be under way.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the pointer is valid for as many bytes, and they are initialised.
        unsafe { std::slice::from_raw_parts(self.pointer, self.bytes) }
    }

    /// Its bytes. No copy from or to them may be under way.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.bytes) }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        // SAFETY: the pointer came from this driver with as many bytes, and its owner is going.
        unsafe { self.driver.free_pinned(self.pointer, self.bytes.max(1)) };
    }
}

/// Types whose values are their bytes.
///
/// # Safety
/// Any bits are a value, and there is no padding.
pub unsafe trait Plain: Copy {}

// SAFETY: integers and floats.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for i32 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}
// SAFETY: as above.
unsafe impl Plain for f32 {}

/// The bytes of values.
pub fn bytes_of<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: plain values are their bytes.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The bytes of values, to be written.
pub(crate) fn bytes_of_mut<T: Plain>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: plain values are their bytes, and any bytes are plain values.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

/// How much of a copy goes through the pinned buffer at once.
const SLICE: usize = 32 << 20;

impl Gpu {
    /// Copies bytes to the device, behind all that was issued to this handle's stream; they are there when the call returns.
    pub fn upload(&self, to: Address, bytes: &[u8]) -> Result<(), GpuError> {
        let mut staging = self.staging(bytes.len().min(SLICE))?;
        for (index, slice) in bytes.chunks(SLICE).enumerate() {
            staging.bytes_mut()[..slice.len()].copy_from_slice(slice);
            let to = Pitched { first: to.at(index * SLICE).0, pitch: 0 };
            let from = Pitched { first: staging.address(), pitch: 0 };
            // SAFETY: the caller names its own device memory; the staging lives until the copy has happened.
            unsafe { self.driver().copy(self.stream, CopyKind::ToDevice, to, from, slice.len(), 1)? };
            self.finish(self.stream)?;
        }
        Ok(())
    }

    /// Copies bytes from the device, behind all that was issued to this handle's stream.
    pub fn download(&self, from: Address, bytes: &mut [u8]) -> Result<(), GpuError> {
        let staging = self.staging(bytes.len().min(SLICE))?;
        for (index, slice) in bytes.chunks_mut(SLICE).enumerate() {
            let from = Pitched { first: from.at(index * SLICE).0, pitch: 0 };
            let to = Pitched { first: staging.address(), pitch: 0 };
            // SAFETY: as in `upload`.
            unsafe { self.driver().copy(self.stream, CopyKind::ToHost, to, from, slice.len(), 1)? };
            self.finish(self.stream)?;
            slice.copy_from_slice(&staging.bytes()[..slice.len()]);
        }
        Ok(())
    }

    /// The values at an address, behind all that was issued to this handle's stream.
    pub fn read<T: Plain + Default>(&self, from: Address, len: usize) -> Result<Vec<T>, GpuError> {
        let mut values = vec![T::default(); len];
        self.download(from, bytes_of_mut(&mut values))?;
        Ok(values)
    }
}
