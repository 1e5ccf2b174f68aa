//! NVIDIA GPUs as a [`Driver`](crate::gpu::Driver), with the feature `cuda`.
//!
//! The driver's library is opened when a device is first asked for: a binary with the feature starts on any machine, and
//! learns there, in words, why it has no device.

#[cfg(feature = "cuda")]
mod call;
#[cfg(feature = "cuda")]
mod context;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(feature = "cuda")]
mod events;
#[cfg(feature = "cuda")]
mod functions;

use crate::gpu::{Gpu, GpuError};

/// What is known of a device before it is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaDevice {
    /// What it calls itself.
    pub name: String,
    /// Bytes of memory.
    pub memory: usize,
    /// Compute capability, as in 90 for 9.0.
    pub capability: u32,
}

/// The devices of this machine, by index; at least one, or the reason why there is none.
pub fn devices() -> Result<Vec<CudaDevice>, GpuError> {
    #[cfg(feature = "cuda")]
    return context::devices();
    #[cfg(not(feature = "cuda"))]
    return Err(not_built());
}

/// Opens the device with this index.
pub fn open(index: usize) -> Result<Gpu, GpuError> {
    #[cfg(feature = "cuda")]
    return driver::CudaDriver::open(index).map(|driver| Gpu::new(std::sync::Arc::new(driver)));
    #[cfg(not(feature = "cuda"))]
    return {
        _ = index;
        Err(not_built())
    };
}

#[cfg(not(feature = "cuda"))]
fn not_built() -> GpuError {
    GpuError::new("CUDA", "this build has no GPU support: build it with `--features cuda`")
}
