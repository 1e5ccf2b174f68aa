//! Between candle tensors and the slices the kernels work on.

use candle_core::{Device, Result, Storage, Tensor, WithDType};

use crate::error::{KernelError, check_shape};

/// Calls `body` with the elements of a CPU tensor `[rows, width]` and its number of rows.
pub(crate) fn with_rows<T: WithDType, R>(
    op: &'static str,
    what: &'static str,
    tensor: &Tensor,
    width: usize,
    body: impl FnOnce(&[T], usize) -> Result<R>,
) -> Result<R> {
    let rows = tensor.dims().first().copied().unwrap_or(0);
    check_shape(op, what, tensor.dims(), &[rows, width])?;
    with_elements(op, tensor, |elements| body(elements, rows))
}

/// Calls `body` with the elements of a CPU tensor in row-major order; `op` names the caller in errors.
///
/// A contiguous tensor is not copied.
pub fn with_elements<T: WithDType, R>(
    op: &'static str,
    tensor: &Tensor,
    body: impl FnOnce(&[T]) -> Result<R>,
) -> Result<R> {
    check_cpu(op, tensor.device())?;
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => {
            let start = layout.start_offset();
            body(&storage.as_slice::<T>()?[start..start + tensor.elem_count()])
        }
        _ => Err(device_error(op, tensor.device()).into()),
    }
}

/// Fails unless the device is the CPU, the only one this build has kernels for.
pub(crate) fn check_cpu(op: &'static str, device: &Device) -> Result<()> {
    match device {
        Device::Cpu => Ok(()),
        device => Err(device_error(op, device).into()),
    }
}

fn device_error(op: &'static str, device: &Device) -> KernelError {
    KernelError::Device { op, device: format!("{:?}", device.location()) }
}

/// A buffer for a kernel that writes every element of it: to zero megabytes first, on one thread, would be felt.
#[allow(clippy::uninit_vec)]
pub(crate) fn unfilled(len: usize) -> Vec<f32> {
    let mut values = Vec::with_capacity(len);
    // SAFETY: the capacity is there, any bits are an f32, and each caller's kernel writes all elements before it or
    // anybody else reads one.
    unsafe { values.set_len(len) };
    values
}
