//! Devices, and what a process has of one.

use std::ffi::{CStr, c_char};
use std::ptr::null_mut;

use cudarc::driver::sys;
use sys::CUdevice_attribute::{self, *};

use super::CudaDevice;
use super::call::{check, initialise};
use crate::gpu::GpuError;

/// The kernels use bf16 on tensor cores and asynchronous copies.
const LOWEST_CAPABILITY: u32 = 80;

pub(super) fn devices() -> Result<Vec<CudaDevice>, GpuError> {
    (0..count()?).map(|index| get(index).and_then(look_at)).collect()
}

/// How many there are; none is an error.
fn count() -> Result<usize, GpuError> {
    initialise()?;
    let mut count = 0;
    // SAFETY: it writes one int.
    check(unsafe { sys::cuDeviceGetCount(&mut count) }, "cuDeviceGetCount")?;
    match count {
        0 => Err(GpuError::new("cuDeviceGetCount", "there is no device, or CUDA_VISIBLE_DEVICES hides it")),
        count => Ok(count as usize),
    }
}

fn get(index: usize) -> Result<sys::CUdevice, GpuError> {
    let mut device = 0;
    // SAFETY: it writes one int.
    check(unsafe { sys::cuDeviceGet(&mut device, index as i32) }, format_args!("cuDeviceGet {index}"))?;
    Ok(device)
}

fn look_at(device: sys::CUdevice) -> Result<CudaDevice, GpuError> {
    let mut name = [0 as c_char; 256];
    // SAFETY: it writes at most as many bytes as it is told, the last of them zero.
    check(unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as i32, device) }, "cuDeviceGetName")?;
    // SAFETY: the text ends in the array.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
    let mut memory = 0;
    // SAFETY: it writes one size.
    check(unsafe { sys::cuDeviceTotalMem_v2(&mut memory, device) }, "cuDeviceTotalMem")?;
    let [major, minor] = [CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR];
    Ok(CudaDevice { name, memory, capability: attribute(device, major)? * 10 + attribute(device, minor)? })
}

fn attribute(device: sys::CUdevice, which: CUdevice_attribute) -> Result<u32, GpuError> {
    let mut value = 0;
    // SAFETY: it writes one int.
    let answer = unsafe { sys::cuDeviceGetAttribute(&mut value, which, device) };
    check(answer, format_args!("cuDeviceGetAttribute {which:?}"))?;
    Ok(value as u32)
}

/// The one context that all users of a device in this process share.
#[derive(Debug)]
pub(super) struct Context {
    raw: sys::CUcontext,
    device: sys::CUdevice,
    pub(super) about: CudaDevice,
    pub(super) multiprocessors: u32,
    /// Bytes of shared memory that a block may have, when asked for.
    pub(super) most_shared: u32,
}

impl Context {
    /// Also makes it this thread's.
    pub(super) fn open(index: usize) -> Result<Context, GpuError> {
        let count = count()?;
        if index >= count {
            return Err(GpuError::new(format!("CUDA device {index}"), format!("there is no such device, but {count}")));
        }
        let device = get(index)?;
        let about = look_at(device)?;
        if about.capability < LOWEST_CAPABILITY {
            let (major, minor) = (about.capability / 10, about.capability % 10);
            let message = format!("{} has compute capability {major}.{minor}, at least 8.0 is needed", about.name);
            return Err(GpuError::new(format!("CUDA device {index}"), message));
        }
        let multiprocessors = attribute(device, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let most_shared = attribute(device, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let mut raw = null_mut();
        // SAFETY: it writes one pointer. `drop` gives the context back.
        check(unsafe { sys::cuDevicePrimaryCtxRetain(&mut raw, device) }, "cuDevicePrimaryCtxRetain")?;
        let context = Context { raw, device, about, multiprocessors, most_shared };
        context.enter()?;
        Ok(context)
    }

    /// Makes it the calling thread's. Every call does so: it costs less than to know that nobody else changed it.
    pub(super) fn enter(&self) -> Result<(), GpuError> {
        // SAFETY: the context is there until `drop`.
        check(unsafe { sys::cuCtxSetCurrent(self.raw) }, "cuCtxSetCurrent")
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: it was retained once.
        _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// A stream of the context that is the thread's when it is made.
#[derive(Debug)]
pub(super) struct Queue(pub(super) sys::CUstream);

impl Queue {
    pub(super) fn new() -> Result<Queue, GpuError> {
        let mut raw = null_mut();
        // Unordered with the default stream, which nobody here uses.
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: it writes one pointer.
        check(unsafe { sys::cuStreamCreate(&mut raw, flags) }, "cuStreamCreate")?;
        Ok(Queue(raw))
    }

    /// Blocks until all that was issued to it has happened.
    pub(super) fn finish(&self) -> Result<(), GpuError> {
        // SAFETY: the stream is there until `drop`.
        check(unsafe { sys::cuStreamSynchronize(self.0) }, "cuStreamSynchronize")
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: nobody uses it any more. What was issued still happens.
        _ = unsafe { sys::cuStreamDestroy_v2(self.0) };
    }
}
