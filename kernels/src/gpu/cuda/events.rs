//! Events that are used again.

use std::ptr::null_mut;
use std::sync::Mutex;

use cudarc::driver::sys;

use super::call::check;
use crate::gpu::{Event, GpuError};

/// Events that nobody holds. Recorded anew, an event means the new point to those who wait from then on, and still the old
/// one to those who waited before.
#[derive(Debug, Default)]
pub(super) struct Events(Mutex<Vec<Event>>);

/// The driver's handle of an event.
pub(super) fn raw(event: Event) -> sys::CUevent {
    event.0 as sys::CUevent
}

impl Events {
    /// An event that is recorded next.
    pub(super) fn take(&self) -> Result<Event, GpuError> {
        if let Some(event) = self.idle().pop() {
            return Ok(event);
        }
        let mut raw = null_mut();
        // With a time, an event costs more.
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: it writes one pointer.
        check(unsafe { sys::cuEventCreate(&mut raw, flags) }, "cuEventCreate")?;
        Ok(Event(raw as u64))
    }

    pub(super) fn give(&self, event: Event) {
        self.idle().push(event);
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Event>> {
        self.0.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        for event in std::mem::take(&mut *self.idle()) {
            // SAFETY: it came from `cuEventCreate`, and nobody holds it.
            _ = unsafe { sys::cuEventDestroy_v2(raw(event)) };
        }
    }
}
