//! The router on a GPU: where experts are chosen or given, and where the choice is written down.

use std::sync::Arc;

use crate::error::{KernelError, check_index, check_shape};
use crate::gpu::ring::DeviceRing;
use crate::gpu::rows::{by_dtype, int};
use crate::gpu::{
    Address, Arena, Arg, DeviceBuffer, DeviceMatrix, DeviceMatrixBuilder, DeviceRows, Gpu, GpuError, Launch, Scratch,
};
use crate::router::RouterConfig;
use crate::weights::{WeightDtype, WeightView};

const OP: &str = "route";

/// Experts of a row: a lane of a warp each.
const MAX_TOP_K: usize = 32;

/// Routed experts: 32 a lane.
const MAX_EXPERTS: usize = 1024;

/// Beyond these bytes of parts of logits, the rows alone are work enough.
const PARTS_LIMIT: usize = 8 << 20;

/// What becomes of a logit before experts are compared and weighted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scoring {
    /// Logits are compared; weights are their softmax over all experts.
    Softmax,
    /// Sigmoids are compared, with the selection's bias added; weights are the sigmoids without it.
    Sigmoid {
        /// Groups of neighbouring experts; 1 for no groups.
        n_group: usize,
        /// Groups whose experts may be chosen: those whose two best experts have the largest sum.
        topk_group: usize,
    },
}

/// How experts are chosen: the `top_k` with the largest score.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeviceRouterConfig {
    /// Experts of a token.
    pub top_k: usize,
    /// Routed experts.
    pub num_experts: usize,
    /// Whether the weights of a token are divided by their sum.
    pub norm_topk_prob: bool,
    /// What is compared, and weighted.
    pub scoring: Scoring,
    /// Factor of the weights.
    pub routed_scaling_factor: f32,
}

impl From<RouterConfig> for DeviceRouterConfig {
    fn from(cfg: RouterConfig) -> DeviceRouterConfig {
        DeviceRouterConfig {
            top_k: cfg.top_k,
            num_experts: cfg.num_experts,
            norm_topk_prob: cfg.norm_topk_prob,
            scoring: Scoring::Softmax,
            routed_scaling_factor: 1.0,
        }
    }
}

impl DeviceRouterConfig {
    fn check(&self) -> Result<(), KernelError> {
        check_index(OP, "number of experts", self.num_experts.wrapping_sub(1), MAX_EXPERTS)?;
        check_index(OP, "top_k", self.top_k.wrapping_sub(1), self.num_experts.min(MAX_TOP_K))?;
        if let Scoring::Sigmoid { n_group, topk_group } = self.scoring {
            check_index(OP, "number of groups", n_group.wrapping_sub(1), self.num_experts.min(32))?;
            let size = self.num_experts / n_group;
            check_shape(OP, "experts of the groups", &[size * n_group], &[self.num_experts])?;
            check_index(OP, "number of chosen groups", topk_group.wrapping_sub(1), n_group)?;
            check_index(OP, "top_k", self.top_k - 1, topk_group * size)?;
        }
        Ok(())
    }
}

/// The router's weights `[num_experts, hidden]` in the checkpoint's own dtype, and the bias of its selection if it has one.
#[derive(Clone, Debug)]
pub struct DeviceRouter {
    gate: DeviceMatrix,
    bias: Option<Arc<DeviceBuffer>>,
    parts_limit: usize,
}

impl DeviceRouter {
    /// Packs the gate; `bias` f32 `[num_experts]` is added to what is compared, and to no weight.
    pub fn new(gpu: &Gpu, gate: WeightView<'_>, bias: Option<&[f32]>) -> Result<DeviceRouter, KernelError> {
        if let Some(bias) = bias {
            check_shape(OP, "bias", &[bias.len()], &[gate.rows])?;
        }
        let mut builder = DeviceMatrixBuilder::zeros(gpu, gate.rows, gate.cols, gate.dtype)?;
        builder.put_rows(0, gate.into())?;
        let bias = bias.map(|bias| DeviceBuffer::of(gpu, bias)).transpose()?.map(Into::into);
        Ok(DeviceRouter { gate: builder.finish(), bias, parts_limit: PARTS_LIMIT })
    }

    /// Another limit, in bytes, to how much of a call's logits may be in parts: no bit of a result depends on it.
    #[doc(hidden)]
    pub fn with_parts_limit(self, parts_limit: usize) -> DeviceRouter {
        DeviceRouter { parts_limit, ..self }
    }

    /// Routed experts.
    pub fn num_experts(&self) -> usize {
        self.gate.out_features()
    }

    /// Width of the residual stream.
    pub fn hidden(&self) -> usize {
        self.gate.in_features()
    }

    /// Size in memory.
    pub fn bytes(&self) -> usize {
        self.gate.bytes() + self.bias.as_ref().map_or(0, |bias| bias.bytes())
    }
}

/// Where a call's choices go: those of a row to `ring[slot, moe_layer, ..]`.
#[derive(Clone, Copy, Debug)]
pub struct DeviceRingWrite<'a> {
    /// The ring.
    pub ring: &'a DeviceRing,
    /// The layer that is routing.
    pub moe_layer: usize,
}

/// Experts given for some rows of a call, checked by the caller as `ReplayRows` is; the other rows route freely.
#[derive(Clone, Copy, Debug)]
pub struct DeviceReplay {
    /// For each row of the call, u32 `[n]` on the device: its row in `ids`, or `ReplayRows::FREE`.
    pub row_of: Address,
    /// Expert ids u16 `[replayed, moe_layers, top_k]` on the device.
    pub ids: Address,
    /// MoE layers of `ids`.
    pub moe_layers: usize,
    /// The layer that is routing.
    pub moe_layer: usize,
}

/// What goes with the rows of a call.
#[derive(Clone, Copy, Debug)]
pub struct RoutedRows<'a> {
    /// Slot of each row, u32 `[n]` on the device; one that the ring does not have is not written. A row whose slot is
    /// `u32::MAX` pads the batch: it chooses no expert, with weights of zero, so that no weights are read for it, and marks
    /// nothing. Without slots no row does, and nothing can be captured.
    pub slots: Option<Address>,
    /// Where the choices go.
    pub capture: Option<DeviceRingWrite<'a>>,
    /// Choices that are given.
    pub replay: Option<DeviceReplay>,
    /// U32 `[2, n]` on the device: row 0 becomes 1 where a logit is NaN, and 1 is added to row 1 where the given set is not
    /// the one that the row would have chosen.
    pub marks: Address,
}

impl RoutedRows<'_> {
    /// Rows that choose freely, and leave nothing but marks.
    pub fn free(marks: Address) -> Self {
        Self { slots: None, capture: None, replay: None, marks }
    }
}

/// The chosen experts of a batch.
#[derive(Debug)]
pub struct DeviceRouting {
    /// Expert ids u32 `[n, top_k]`, descending by score, ties lower id first; those of a replayed row as given; `u32::MAX`
    /// in a row that pads the batch.
    pub topk_ids: Scratch,
    /// Their weights f32 `[n, top_k]`.
    pub topk_weights: Scratch,
    /// The logits f32 `[n, num_experts]` that were compared, for tests.
    #[doc(hidden)]
    pub logits: DeviceRows,
}

/// How K is cut, by the layer's shape alone.
#[derive(Clone, Copy, Debug)]
struct Chunks {
    /// Stages of 64 columns in a chunk.
    stages: usize,
    count: usize,
}

impl Chunks {
    /// Enough chunks that a few rows already keep every multiprocessor busy, each long enough to be worth a block.
    fn of(gate: &DeviceMatrix) -> Chunks {
        const WARPS: usize = 512;
        let (all, panels) = (gate.cols16().div_ceil(4), gate.out_features().div_ceil(16));
        let stages = all.div_ceil((WARPS / panels).max(1)).max(2);
        Chunks { stages, count: all.div_ceil(stages).max(1) }
    }
}

/// Rows of logits, perhaps in parts that are still to be added up.
struct Logits {
    /// f32 `[parts, n, num_experts]`.
    parts: DeviceRows,
    count: usize,
}

/// Chooses the experts of each row of `x` `[n, hidden]`, or takes those that `replay` gives for it, and writes them to the
/// ring when `capture` is given.
///
/// Logits are f32. The order is descending by score, ties lower id first; NaN comes last, below -inf; ids are distinct.
/// Capturing changes no bit of the result. A replayed row keeps the given ids in the given order, in the result and in the
/// ring; their weights are gathered from the live logits as those of chosen ids are.
pub fn route(
    arena: &Arena,
    x: &DeviceRows,
    router: &DeviceRouter,
    cfg: &DeviceRouterConfig,
    rows: &RoutedRows<'_>,
) -> Result<DeviceRouting, KernelError> {
    check_shape(OP, "gate", &[router.num_experts()], &[cfg.num_experts])?;
    check_shape(OP, "x", &[x.width()], &[router.hidden()])?;
    // Refused before anything is launched.
    check(cfg, router.bias.is_some(), rows)?;
    let logits = logits(arena, x, router)?;
    choose(arena, logits, x.len(), cfg, router.bias.as_deref(), rows)
}

/// As [`route`], for given logits f32 `[n, num_experts]`; `bias` is f32 `[num_experts]`.
pub fn select(
    arena: &Arena,
    logits: DeviceRows,
    cfg: &DeviceRouterConfig,
    bias: Option<&DeviceBuffer>,
    rows: &RoutedRows<'_>,
) -> Result<DeviceRouting, KernelError> {
    check_shape(OP, "logits", &[logits.width(), logits.ld()], &[cfg.num_experts; 2])?;
    if let Some(bias) = bias {
        check_shape(OP, "bias", &[bias.bytes() / 4], &[cfg.num_experts])?;
    }
    check(cfg, bias.is_some(), rows)?;
    let n = logits.len();
    choose(arena, Logits { parts: logits, count: 1 }, n, cfg, bias, rows)
}

fn check(cfg: &DeviceRouterConfig, biased: bool, rows: &RoutedRows<'_>) -> Result<(), KernelError> {
    cfg.check()?;
    if biased && cfg.scoring == Scoring::Softmax {
        return Err(KernelError::Shape { op: OP, what: "bias", got: vec![cfg.num_experts], expected: vec![] });
    }
    if let Some(DeviceRingWrite { ring, moe_layer }) = rows.capture {
        check_index(OP, "MoE layer", moe_layer, ring.moe_layers())?;
        check_index(OP, "largest expert id", cfg.num_experts - 1, if ring.is_wide() { 1 << 16 } else { 1 << 8 })?;
        check_shape(OP, "ring", &[ring.top_k()], &[cfg.top_k])?;
        check_shape(OP, "slots of the ring's rows", &[usize::from(rows.slots.is_some())], &[1])?;
    }
    if let Some(replay) = rows.replay {
        check_index(OP, "replayed MoE layer", replay.moe_layer, replay.moe_layers)?;
    }
    Ok(())
}

/// The products of `x` with the gate.
fn logits(arena: &Arena, x: &DeviceRows, router: &DeviceRouter) -> Result<Logits, GpuError> {
    // Blocks that keep every multiprocessor busy.
    const BLOCKS: usize = 128;
    let DeviceRouter { gate, parts_limit, .. } = router;
    let (n, experts) = (x.len(), gate.out_features());
    let chunks = Chunks::of(gate);
    let panels = experts.div_ceil(16);
    let on_tensor_cores = gate.dtype() == x.dtype() && x.dtype() != WeightDtype::F32;
    let tiles = n.div_ceil(if on_tensor_cores { 64 } else { 16 });
    let count = if chunks.count * n * experts * 4 <= *parts_limit { chunks.count } else { 1 };
    // As many warps as share a tile of `x`, unless blocks are few.
    let blocks = |warps: usize| panels.div_ceil(warps) * tiles * count;
    let warps = [4, 2].into_iter().find(|&warps| panels >= warps && blocks(warps) >= BLOCKS).unwrap_or(1);
    let parts = DeviceRows::floats(arena, count * n, experts)?;
    if n == 0 {
        return Ok(Logits { parts, count });
    }
    let kernel = by_dtype(
        gate.dtype(),
        [
            by_dtype(x.dtype(), ["router_logits_f32_f32", "router_logits_f32_bf16", "router_logits_f32_f16"]),
            by_dtype(x.dtype(), ["router_logits_bf16_f32", "router_logits_bf16_bf16", "router_logits_bf16_f16"]),
            by_dtype(x.dtype(), ["router_logits_f16_f32", "router_logits_f16_bf16", "router_logits_f16_f16"]),
        ],
    );
    let grid = [int(panels.div_ceil(warps)), int(tiles), int(count)];
    let args = [
        parts.address().into(),
        gate.address().into(),
        x.address().into(),
        int(n).into(),
        int(experts).into(),
        int(gate.cols16()).into(),
        int(x.width()).into(),
        int(x.ld()).into(),
        int(chunks.stages).into(),
    ];
    // SAFETY: `x` is as wide as the gate, and each of the parts has a row for each of its rows.
    unsafe { arena.gpu().launch(Launch { kernel, grid, block: 32 * int(warps), shared: 0 }, &args)? };
    Ok(Logits { parts, count })
}

/// Launches the choice; the operands were checked.
fn choose(
    arena: &Arena,
    logits: Logits,
    n: usize,
    cfg: &DeviceRouterConfig,
    bias: Option<&DeviceBuffer>,
    rows: &RoutedRows<'_>,
) -> Result<DeviceRouting, KernelError> {
    let RoutedRows { slots, capture, replay, marks } = *rows;
    let topk_ids = arena.take(n * cfg.top_k * 4)?;
    let topk_weights = arena.take(n * cfg.top_k * 4)?;
    let Logits { parts, count } = logits;
    let sums = match count {
        1 => None,
        _ => Some(DeviceRows::floats(arena, n, cfg.num_experts)?),
    };
    let kernel = match cfg.num_experts {
        0..=128 => "router_select_128",
        129..=256 => "router_select_256",
        257..=512 => "router_select_512",
        _ => "router_select_1024",
    };
    let (sigmoid, n_group, topk_group) = match cfg.scoring {
        Scoring::Softmax => (0, 1, 1),
        Scoring::Sigmoid { n_group, topk_group } => (1, n_group, topk_group),
    };
    let flags: u32 = sigmoid | if cfg.norm_topk_prob { 2 } else { 0 };
    let ring = capture.map(|write| write.ring);
    let args: [Arg; 24] = [
        parts.address().into(),
        sums.as_ref().map_or(Address::NULL, DeviceRows::address).into(),
        int(count).into(),
        int(n).into(),
        int(cfg.num_experts).into(),
        int(cfg.top_k).into(),
        flags.into(),
        bias.map_or(Address::NULL, DeviceBuffer::address).into(),
        int(n_group).into(),
        int(topk_group).into(),
        cfg.routed_scaling_factor.into(),
        topk_ids.address().into(),
        topk_weights.address().into(),
        ring.map_or(Address::NULL, DeviceRing::address).into(),
        u32::from(ring.is_some_and(DeviceRing::is_wide)).into(),
        int(ring.map_or(0, DeviceRing::num_slots)).into(),
        int(ring.map_or(0, DeviceRing::moe_layers)).into(),
        int(capture.map_or(0, |write| write.moe_layer)).into(),
        slots.unwrap_or(Address::NULL).into(),
        replay.map_or(Address::NULL, |replay| replay.row_of).into(),
        replay.map_or(Address::NULL, |replay| replay.ids).into(),
        int(replay.map_or(0, |replay| replay.moe_layers)).into(),
        int(replay.map_or(0, |replay| replay.moe_layer)).into(),
        marks.into(),
    ];
    if n > 0 {
        let grid = [int(n.div_ceil(4)), 1, 1];
        // SAFETY: the shapes were checked; slots outside the ring are not written, and the ids of a replay are experts, by
        // the caller's check.
        unsafe { arena.gpu().launch(Launch { kernel, grid, block: 128, shared: 0 }, &args)? };
    }
    Ok(DeviceRouting { topk_ids, topk_weights, logits: sums.unwrap_or(parts) })
}
