use moetrail_kernels::RingCells;
use moetrail_kernels::gpu::DeviceRing;

use crate::config::ModelConfig;
use crate::error::Result;
use crate::step::refused;

/// The ring of routed experts `[num_slots, moe_layers, top_k]`, where the decoder computes.
pub enum Ring<'a> {
    /// In host memory.
    Host(RingCells<'a>),
    /// In the memory of the decoder's device.
    Device(&'a DeviceRing),
}

impl<'a> From<RingCells<'a>> for Ring<'a> {
    fn from(cells: RingCells<'a>) -> Self {
        Ring::Host(cells)
    }
}

impl<'a> Ring<'a> {
    /// The cells, for a decoder on the host.
    pub(crate) fn host(self) -> Result<RingCells<'a>> {
        match self {
            Ring::Host(cells) => Ok(cells),
            Ring::Device(_) => Err(refused("ring", "host memory".into(), "device memory".into())),
        }
    }

    /// The ring, for a decoder on a device.
    pub(crate) fn device(self) -> Result<&'a DeviceRing> {
        match self {
            Ring::Host(_) => Err(refused("ring", "device memory".into(), "host memory".into())),
            Ring::Device(ring) => Ok(ring),
        }
    }

    /// Refuses a ring of another shape, or one whose cells are too narrow.
    pub(crate) fn check(&self, config: &ModelConfig, num_slots: usize) -> Result<()> {
        let cells = config.moe_layers.len() * config.num_experts_per_tok;
        let (len, widest) = match self {
            Ring::Host(RingCells::U8(cells)) => (cells.len(), 1 << 8),
            Ring::Host(RingCells::U16(cells)) => (cells.len(), 1 << 16),
            Ring::Device(ring) => {
                let found = [ring.moe_layers(), ring.top_k()];
                let expected = [config.moe_layers.len(), config.num_experts_per_tok];
                if found != expected {
                    return Err(refused("ring", format!("{expected:?} cells of a slot"), format!("{found:?}")));
                }
                (ring.num_slots() * cells, if ring.is_wide() { 1 << 16 } else { 1 << 8 })
            }
        };
        if len != num_slots * cells {
            let expected = format!("{num_slots} slots of {cells} cells");
            return Err(refused("ring", expected, format!("{len} cells")));
        }
        if config.num_experts > widest {
            let expected = format!("cells that hold ids below {}", config.num_experts);
            return Err(refused("ring", expected, format!("cells that hold ids below {widest}")));
        }
        Ok(())
    }
}
