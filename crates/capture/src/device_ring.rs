//! The ring where the KV is in device memory.

use moetrail_kernels::gpu::{DeviceRing, Gpu, GpuError, RowStaging, StagedRows};
use moetrail_routes::ExpertDtype;

use crate::layout::RingLayout;

/// A ring in device memory and the way of its rows to the host.
#[derive(Debug)]
pub struct DeviceCells {
    ring: DeviceRing,
    staging: RowStaging,
}

impl DeviceCells {
    pub(crate) fn new(gpu: &Gpu, layout: &RingLayout, num_slots: usize, staging: usize) -> Result<Self, GpuError> {
        let wide = layout.dtype() == ExpertDtype::U16;
        let ring = DeviceRing::new(gpu, num_slots, layout.num_moe_layers(), layout.top_k(), wide)?;
        Ok(Self { ring, staging: RowStaging::new(gpu, staging)? })
    }

    /// The ring, for the router to write.
    pub fn ring(&self) -> &DeviceRing {
        &self.ring
    }

    /// Sends the rows of some slots on their way to the host. The slots may be written anew at once.
    pub(crate) fn send(&self, slots: impl Iterator<Item = usize>) -> Result<StagedRows, GpuError> {
        let slots: Vec<u32> = slots.map(|slot| slot as u32).collect();
        self.staging.drain(&self.ring, &slots)
    }
}
