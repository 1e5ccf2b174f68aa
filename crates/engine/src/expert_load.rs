//! How often each expert is selected.

use moetrail_capture::RingLayout;
use prometheus_client::metrics::counter::Counter;

use crate::stats::{EngineStats, ExpertLabel};

/// One counter for each expert of each MoE layer, `[moe_layers, num_experts]`.
pub(crate) struct ExpertLoad {
    counters: Vec<Counter>,
    num_experts: usize,
    top_k: usize,
}

impl ExpertLoad {
    pub(crate) fn new(layout: &RingLayout, num_experts: usize, stats: &EngineStats) -> Self {
        let experts = layout.moe_layers().iter().flat_map(|layer| (0..num_experts).map(move |expert| (*layer, expert)));
        let counter = |(layer, expert)| stats.expert_load.get_or_create(&ExpertLabel { layer, expert }).clone();
        Self { counters: experts.map(counter).collect(), num_experts, top_k: layout.top_k() }
    }

    /// Counts rows `[rows, moe_layers, top_k]`.
    pub(crate) fn add(&self, rows: &[u16]) {
        let moe_layers = self.counters.len() / self.num_experts;
        for (cell, ids) in rows.chunks_exact(self.top_k).enumerate() {
            for id in ids {
                self.counters[cell % moe_layers * self.num_experts + usize::from(*id)].inc();
            }
        }
    }
}
