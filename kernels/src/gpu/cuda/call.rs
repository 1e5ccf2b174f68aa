//! Answers of the driver's functions.

use std::ffi::CStr;
use std::fmt;
use std::sync::OnceLock;

use cudarc::driver::sys;
use sys::CUresult;

use crate::gpu::GpuError;

/// An error names the call, and the driver's name and words for the answer.
pub(super) fn check(answer: CUresult, call: impl fmt::Display) -> Result<(), GpuError> {
    match answer {
        CUresult::CUDA_SUCCESS => Ok(()),
        answer => Err(GpuError::new(call.to_string(), describe(answer))),
    }
}

fn describe(answer: CUresult) -> String {
    let text = |look_up: unsafe fn(CUresult, *mut *const std::ffi::c_char) -> CUresult| {
        let mut text = std::ptr::null();
        // SAFETY: it writes one pointer, to a text that lives as long as the library, or null.
        unsafe {
            _ = look_up(answer, &mut text);
            (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
        }
    };
    match (text(sys::cuGetErrorName), text(sys::cuGetErrorString)) {
        (Some(name), Some(words)) => format!("{name}: {words}"),
        _ => format!("CUDA_ERROR_{}", answer as u32),
    }
}

/// Opens the driver's library, once, and tells the version of CUDA that it supports, as in 13000 for 13.0.
pub(super) fn initialise() -> Result<u32, GpuError> {
    static DONE: OnceLock<Result<u32, GpuError>> = OnceLock::new();
    DONE.get_or_init(|| {
        // SAFETY: opening the library runs what its authors want run then.
        if !unsafe { sys::is_culib_present() } {
            let missing =
                "there is no libcuda.so.1: this machine has no NVIDIA driver, or the container does not see it";
            return Err(GpuError::new("CUDA", missing));
        }
        // SAFETY: the library is there. 0 is the only value it takes.
        check(unsafe { sys::cuInit(0) }, "cuInit")?;
        let mut version = 0;
        // SAFETY: it writes one int.
        check(unsafe { sys::cuDriverGetVersion(&mut version) }, "cuDriverGetVersion")?;
        Ok(version as u32)
    })
    .clone()
}
