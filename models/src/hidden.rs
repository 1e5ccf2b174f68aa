use candle_core::Tensor;
use moetrail_kernels::gpu::DeviceRows;

/// Hidden rows `[rows, hidden]` after the final norm, where they were computed.
#[derive(Debug)]
pub struct Hidden(pub(crate) Place);

#[derive(Debug)]
pub(crate) enum Place {
    /// F32.
    Host(Tensor),
    /// As the head reads them.
    Device(DeviceRows),
}

impl Hidden {
    /// Number of rows.
    pub fn len(&self) -> usize {
        match &self.0 {
            Place::Host(rows) => rows.dim(0).unwrap_or(0),
            Place::Device(rows) => rows.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
