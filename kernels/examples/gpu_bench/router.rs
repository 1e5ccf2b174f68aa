//! The choice of a layer's experts.

use moetrail_kernels::RouterConfig;
use moetrail_kernels::gpu::{
    DeviceBuffer, DeviceRing, DeviceRingWrite, DeviceRouter, DeviceRouterConfig, RoutedRows, route,
};

use crate::bench::{Bench, Result, Work, view};
use crate::sizes::Sizes;

impl Bench {
    pub(crate) fn router(&mut self) -> Result<()> {
        let Sizes { hidden, experts, top_k, layers, rows, slots, .. } = self.sizes;
        let gate = self.noise(experts * hidden);
        let router = DeviceRouter::new(self.gpu(), view(&gate, experts, hidden), None)?;
        let cfg = DeviceRouterConfig::from(RouterConfig { top_k, num_experts: experts, norm_topk_prob: true });
        let ring = DeviceRing::new(self.gpu(), slots, layers, top_k, false)?;
        for &n in rows {
            let x = self.operand(n, hidden)?;
            let marks = DeviceBuffer::filled(self.gpu(), 2 * n * 4, 0)?;
            let order: Vec<u32> = (0..n).map(|i| ((i / 16 * 7919 * 16 + i % 16) % slots) as u32).collect();
            let order = DeviceBuffer::of(self.gpu(), &order)?;
            let call = |capture: bool, i: usize| {
                let write = DeviceRingWrite { ring: &ring, moe_layer: i % layers };
                let write = capture.then_some(write);
                let slots = Some(order.address());
                let rows = RoutedRows { slots, capture: write, replay: None, marks: marks.address() };
                route(&self.arena, &x, &router, &cfg, &rows).map(drop)
            };
            let (without, with) = (self.time(|i| call(false, i))?, self.time(|i| call(true, i))?);
            let work = Work { bytes: 0.0, flops: (2 * n * hidden * experts) as f64 };
            self.line("route", &[("n", n), ("experts", experts)], without, work);
            self.line("route, captured", &[("n", n), ("experts", experts)], with, work);
        }
        Ok(())
    }
}
