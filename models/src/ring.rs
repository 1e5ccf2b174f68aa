use moetrail_kernels::RingCells;

use crate::config::ModelConfig;
use crate::error::Result;
use crate::step::refused;

/// The ring of routed experts `[num_slots, moe_layers, top_k]`, where the decoder computes.
pub enum Ring<'a> {
    /// In host memory.
    Host(RingCells<'a>),
}

impl<'a> From<RingCells<'a>> for Ring<'a> {
    fn from(cells: RingCells<'a>) -> Self {
        Ring::Host(cells)
    }
}

impl Ring<'_> {
    /// Refuses a ring of another shape, or one whose cells are too narrow.
    pub(crate) fn check(&self, config: &ModelConfig, num_slots: usize) -> Result<()> {
        let cells = config.moe_layers.len() * config.num_experts_per_tok;
        let (len, widest) = match self {
            Ring::Host(RingCells::U8(cells)) => (cells.len(), 1 << 8),
            Ring::Host(RingCells::U16(cells)) => (cells.len(), 1 << 16),
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
