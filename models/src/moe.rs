//! The sparse feed-forward network: the seam between routing and experts.

use candle_core::Tensor;
use moetrail_kernels::{
    PackedExperts, RouterConfig, RouterSeam, RouterWeight, Routing, RowNotes, WeightView, expert_ffn, route,
};

use crate::config::ModelConfig;
use crate::error::Result;
use crate::experts;
use crate::loader::Loader;
use crate::names::ExpertNames;

/// A router and its experts.
pub(crate) struct Moe {
    /// `[experts, hidden]`, f32 whatever the weights' dtype.
    router: RouterWeight,
    routing: RouterConfig,
    experts: PackedExperts,
}

impl Moe {
    /// Packs router and experts.
    pub(crate) fn load(loader: &mut Loader<'_>, config: &ModelConfig, names: &ExpertNames) -> Result<Self> {
        let (count, hidden) = (config.num_experts, config.hidden_size);
        let router = load_router(loader, names, count, hidden)?;
        let experts = experts::load(loader, config, names)?;
        loader.count_packed(router.bytes() + experts.bytes());
        Ok(Self {
            router,
            routing: RouterConfig {
                top_k: config.num_experts_per_tok,
                num_experts: count,
                norm_topk_prob: config.norm_topk_prob,
            },
            experts,
        })
    }

    /// Picks the experts of every row, or takes those given, which writes them to the ring, and runs them:
    /// `[rows, hidden]` to `[rows, hidden]`.
    pub(crate) fn forward(&self, x: &Tensor, seam: RouterSeam<'_>) -> Result<(Tensor, RowNotes)> {
        let routing: Routing = route(x, &self.router, &self.routing, seam)?;
        let out = expert_ffn(x, &routing, &self.experts)?;
        Ok((out, RowNotes { nan_rows: routing.nan_rows, changed_rows: routing.changed_rows }))
    }
}

fn load_router(loader: &mut Loader<'_>, names: &ExpertNames, experts: usize, hidden: usize) -> Result<RouterWeight> {
    let gate = loader.tensor(&names.router, &[&[experts, hidden]])?;
    let bytes = gate.stored.bytes();
    let view = WeightView::row_major(bytes, gate.dtype, experts, hidden);
    let router = RouterWeight::new(view).map_err(|source| gate.pack_error(source))?;
    loader.done(&gate, 0..bytes.len());
    Ok(router)
}
