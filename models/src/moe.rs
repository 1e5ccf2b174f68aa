//! The sparse feed-forward network: the seam between routing and experts.

use candle_core::Tensor;
use moetrail_kernels::{
    Linear, PackedExperts, ReplayRows, RingWrite, RouterConfig, RouterWeight, RowMarks, WeightView, expert_ffn, route,
};

use crate::config::ModelConfig;
use crate::error::Result;
use crate::experts;
use crate::loader::Loader;
use crate::names::ExpertNames;

/// What a feed-forward network is handed besides its input.
pub(crate) struct Seam<'a> {
    /// Where its choice is written down.
    pub(crate) capture: Option<RingWrite<'a>>,
    /// What it takes in place of a choice.
    pub(crate) replay: Option<ReplayRows<'a>>,
    /// What is multiplied after it.
    pub(crate) next: &'a Linear,
}

/// A router and its experts.
#[derive(Clone)]
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
        loader.count_packed(router.bytes() + experts.bytes(), &experts.formats());
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

    /// Says that the router is read after the next job.
    pub(crate) fn announce(&self) {
        self.router.announce();
    }

    /// Picks or takes the experts of every row, which writes them to the ring, and runs them: `[rows, hidden]` to
    /// `[rows, hidden]`, and what the router tells of the rows.
    pub(crate) fn forward(&self, x: &Tensor, seam: Seam<'_>) -> Result<(Tensor, RowMarks)> {
        let routing = route(x, &self.router, &self.routing, seam.capture, seam.replay)?;
        seam.next.announce();
        let out = expert_ffn(x, &routing, &self.experts)?;
        Ok((out, routing.marks))
    }
}

fn load_router(loader: &mut Loader<'_>, names: &ExpertNames, experts: usize, hidden: usize) -> Result<RouterWeight> {
    let gate = loader.tensor(&names.router, &[&[experts, hidden]])?;
    let bytes = gate.stored.bytes();
    let view = WeightView::row_major(bytes, gate.float()?, experts, hidden);
    let router = RouterWeight::new(view).map_err(|source| gate.pack_error(source))?;
    loader.done(&gate, 0..bytes.len());
    Ok(router)
}
