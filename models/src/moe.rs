//! The sparse feed-forward network: the seam between routing and experts.

use moetrail_kernels::{RouterConfig, WeightView};

use crate::backend::Backend;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::experts;
use crate::loader::Loader;
use crate::names::ExpertNames;

/// A router and its experts.
#[derive(Clone)]
pub(crate) struct Moe<B: Backend> {
    /// `[experts, hidden]`, in the checkpoint's dtype whatever that of the other weights.
    router: B::Router,
    routing: RouterConfig,
    experts: B::Experts,
    /// Among the layers that route.
    moe_layer: usize,
}

impl<B: Backend> Moe<B> {
    /// Packs router and experts of MoE layer `moe_layer`.
    pub(crate) fn load(
        loader: &mut Loader<'_, B>,
        config: &ModelConfig,
        names: &ExpertNames,
        moe_layer: usize,
    ) -> Result<Self> {
        let (count, hidden) = (config.num_experts, config.hidden_size);
        let router = load_router(loader, names, count, hidden)?;
        let (experts, formats) = experts::load(loader, config, names)?;
        loader.count_packed(B::router_bytes(&router) + B::experts_bytes(&experts), &formats);
        Ok(Self {
            router,
            routing: RouterConfig {
                top_k: config.num_experts_per_tok,
                num_experts: count,
                norm_topk_prob: config.norm_topk_prob,
            },
            experts,
            moe_layer,
        })
    }

    /// Says that the router is read after the next job.
    pub(crate) fn announce(&self, backend: &B) {
        backend.announce_router(&self.router);
    }

    /// Picks or takes the experts of every row, which writes them to the ring, and runs them: `[rows, hidden]` to
    /// `[rows, hidden]`. `next` is multiplied after it.
    pub(crate) fn forward(
        &self,
        backend: &B,
        step: &mut B::Step<'_>,
        x: &B::Operand,
        next: &B::Linear,
    ) -> Result<B::Rows> {
        let routing = backend.route(step, x, &self.router, &self.routing, self.moe_layer)?;
        backend.announce(next);
        backend.expert_ffn(x, &routing, &self.experts)
    }
}

fn load_router<B: Backend>(
    loader: &mut Loader<'_, B>,
    names: &ExpertNames,
    experts: usize,
    hidden: usize,
) -> Result<B::Router> {
    let gate = loader.tensor(&names.router, &[&[experts, hidden]])?;
    let bytes = gate.stored.bytes();
    let view = WeightView::row_major(bytes, gate.float()?, experts, hidden);
    let router = loader.backend().router(view).map_err(|source| gate.pack_error(source))?;
    loader.done(&gate, 0..bytes.len());
    Ok(router)
}
