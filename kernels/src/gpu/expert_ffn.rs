use crate::error::{KernelError, check_index};
use crate::gpu::linear::{PANEL, Split, check_operand, names, tile_shared, wgmma_names, wgmma_shared};
use crate::gpu::rows::int;
use crate::gpu::{Address, Arena, DeviceExperts, DeviceRows, Launch, Scratch};
use crate::weights::WeightDtype;

const OP: &str = "expert_ffn";

/// Threads of a block, and so experts of a layer.
const MOST_EXPERTS: usize = 1024;

/// Experts of a token: one warp orders them.
const MOST_TOP_K: usize = 32;

/// Bytes of an `ExpertTile` in `kernels/cuda/experts.cu`.
const TILE_BYTES: usize = 16;

/// How an expert's pairs are taken. The bits of the result do not depend on it; but all that is promised of
/// [`Wgmma`](Self::Wgmma) is that they do not depend on its pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertTiling {
    /// 8, 16 or 32 pairs at once; warps share K.
    Split(usize),
    /// 64 or 128 pairs at once; warps share the outputs.
    Tile(usize),
    /// 64, 128 or 160 pairs at once; Hopper's warpgroups share the outputs. Not of f32.
    Wgmma(usize),
}

/// The kernel of a product, by tiling and element type.
macro_rules! tiling_names {
    ($tiling:expr, $dtype:expr, $product:literal) => {
        match $tiling {
            ExpertTiling::Split(8) => names!($dtype, $product, "_split_8"),
            ExpertTiling::Split(16) => names!($dtype, $product, "_split_16"),
            ExpertTiling::Split(32) => names!($dtype, $product, "_split_32"),
            ExpertTiling::Tile(64) => names!($dtype, $product, "_tile_64"),
            ExpertTiling::Tile(128) => names!($dtype, $product, "_tile_128"),
            ExpertTiling::Wgmma(64) => wgmma_names!($dtype, $product, "_wgmma_64"),
            ExpertTiling::Wgmma(128) => wgmma_names!($dtype, $product, "_wgmma_128"),
            ExpertTiling::Wgmma(160) => wgmma_names!($dtype, $product, "_wgmma_160"),
            tiling => unreachable!("{tiling:?} is no tiling"),
        }
    };
}

impl ExpertTiling {
    /// Every tiling there is.
    pub const ALL: [ExpertTiling; 8] = [
        ExpertTiling::Split(8),
        ExpertTiling::Split(16),
        ExpertTiling::Split(32),
        ExpertTiling::Tile(64),
        ExpertTiling::Tile(128),
        ExpertTiling::Wgmma(64),
        ExpertTiling::Wgmma(128),
        ExpertTiling::Wgmma(160),
    ];

    /// For `n` tokens: an expert's weights should be read once, and not for more pairs than there may be. `wgmma` says
    /// whether it may be [`Wgmma`](Self::Wgmma).
    pub fn choose(n: usize, top_k: usize, num_experts: usize, wgmma: bool) -> ExpertTiling {
        match (n * top_k).div_ceil(num_experts.max(1)) {
            // A token may choose an expert once, so there are no more than `n` pairs; twice the average is seldom
            // passed.
            mean @ 0..=16 => ExpertTiling::Split((2 * mean).min(n).next_power_of_two().clamp(8, 32)),
            17..=96 if wgmma => ExpertTiling::Wgmma(64),
            17..=96 => ExpertTiling::Tile(64),
            // What is left of an expert's pairs fills half a tile: many are needed for the larger to be worth it.
            640.. if wgmma => ExpertTiling::Wgmma(160),
            _ if wgmma => ExpertTiling::Wgmma(128),
            _ => ExpertTiling::Tile(128),
        }
    }

    /// Pairs of a tile.
    fn pairs(self) -> usize {
        let (ExpertTiling::Split(pairs) | ExpertTiling::Tile(pairs) | ExpertTiling::Wgmma(pairs)) = self;
        pairs
    }

    fn up(self, dtype: WeightDtype) -> &'static str {
        tiling_names!(self, dtype, "experts_up")
    }

    fn down(self, dtype: WeightDtype) -> &'static str {
        tiling_names!(self, dtype, "experts_down")
    }

    /// Launch dimensions of a product with `panels` panels of an expert, for so many tiles.
    fn launch(self, kernel: &'static str, panels: usize, tiles: usize, split: Split) -> Launch {
        match self {
            ExpertTiling::Split(pairs) => split.launch(kernel, [panels.div_ceil(2), 2], [tiles, pairs]),
            ExpertTiling::Tile(pairs) | ExpertTiling::Wgmma(pairs) => {
                let grid = [int(panels.div_ceil(8)), int(tiles), 1];
                let wgmma = matches!(self, ExpertTiling::Wgmma(_));
                Launch {
                    kernel,
                    grid,
                    block: 256,
                    shared: if wgmma { wgmma_shared(pairs) } else { tile_shared(pairs) },
                }
            }
        }
    }
}

/// `sum over k of weight_k * down(silu(gate x) * (up x))` of the chosen experts: `x` `[n, hidden]` as products read it,
/// `topk_ids` u32 and `topk_weights` f32 `[n, top_k]`, to f32 `[n, hidden]`.
///
/// The sum runs by ascending expert id. The bits of a row depend on that row, its routing and the weights alone, on a
/// device that [uses no wgmma](crate::gpu::Gpu::uses_wgmma). An id that is not below the number of experts chooses none.
///
/// # Panics
/// When `x` has another element type than the weights.
pub fn expert_ffn(
    arena: &Arena,
    x: &DeviceRows,
    topk_ids: Address,
    topk_weights: Address,
    top_k: usize,
    experts: &DeviceExperts,
) -> Result<DeviceRows, KernelError> {
    let wgmma = arena.gpu().uses_wgmma(experts.dtype());
    let tiling = ExpertTiling::choose(x.len(), top_k, experts.num_experts(), wgmma);
    expert_ffn_tiled(arena, x, topk_ids, topk_weights, top_k, experts, tiling)
}

/// As [`expert_ffn`], in a given tiling, which the device and the weights must suit.
pub fn expert_ffn_tiled(
    arena: &Arena,
    x: &DeviceRows,
    topk_ids: Address,
    topk_weights: Address,
    top_k: usize,
    experts: &DeviceExperts,
    tiling: ExpertTiling,
) -> Result<DeviceRows, KernelError> {
    let (num_experts, hidden, inter, dtype) =
        (experts.num_experts(), experts.hidden(), experts.inter(), experts.dtype());
    let n = x.len();
    check_operand(OP, x, hidden, dtype)?;
    check_index(OP, "number of experts", num_experts, MOST_EXPERTS + 1)?;
    check_index(OP, "top_k", top_k, MOST_TOP_K + 1)?;
    let out = DeviceRows::floats(arena, n, hidden)?;
    if n == 0 || hidden == 0 {
        return Ok(out);
    }
    let pairs = n * top_k;
    let parts = DeviceRows::floats(arena, pairs, hidden)?;
    if pairs > 0 && inter > 0 && num_experts > 0 {
        let plan = Plan::make(arena, topk_ids, pairs, num_experts, tiling.pairs())?;
        let mid = DeviceRows::operand(arena, pairs, inter, dtype)?;
        let split = Split::of(hidden, dtype);
        let args = [
            mid.address().into(),
            x.address().into(),
            experts.gate_up().into(),
            plan.tiles.address().into(),
            plan.sorted.address().into(),
            int(top_k).into(),
            int(x.ld()).into(),
            int(inter).into(),
            int(mid.ld()).into(),
            int(split.segment).into(),
        ];
        // As many panels as the padded rows of `mid` have columns, so that its padding is written.
        let launch = tiling.launch(tiling.up(dtype), 2 * mid.ld() / PANEL, plan.most_tiles, split);
        // SAFETY: the shapes were checked; the plan names rows of `x` and of `mid`.
        unsafe { arena.gpu().launch(launch, &args)? };
        let split = Split::of(inter, dtype);
        let args = [
            parts.address().into(),
            mid.address().into(),
            experts.down().into(),
            plan.tiles.address().into(),
            plan.sorted.address().into(),
            topk_weights.into(),
            int(hidden).into(),
            int(mid.ld()).into(),
            int(split.segment).into(),
        ];
        let launch = tiling.launch(tiling.down(dtype), hidden.div_ceil(PANEL), plan.most_tiles, split);
        // SAFETY: as above; `parts` has a row for each pair.
        unsafe { arena.gpu().launch(launch, &args)? };
    }
    let args = [
        out.address().into(),
        parts.address().into(),
        topk_ids.into(),
        int(top_k).into(),
        int(if inter > 0 { num_experts } else { 0 }).into(),
        int(hidden).into(),
    ];
    let block = hidden.next_multiple_of(32).min(256);
    let grid = [int(n), int(hidden.div_ceil(block)), 1];
    // SAFETY: every pair of an expert that there is has its row in `parts`.
    unsafe {
        arena.gpu().launch(Launch { kernel: "experts_combine", grid, block: int(block), shared: 0 }, &args)?;
    }
    Ok(out)
}

/// Which pairs go to which expert.
struct Plan {
    /// u32 `[most_tiles, tile]`.
    sorted: Scratch,
    /// `ExpertTile` `[most_tiles]`.
    tiles: Scratch,
    most_tiles: usize,
}

impl Plan {
    fn make(
        arena: &Arena,
        topk_ids: Address,
        pairs: usize,
        num_experts: usize,
        tile: usize,
    ) -> Result<Plan, KernelError> {
        // Every expert may have a tile that is not full.
        let most_tiles = pairs / tile + num_experts.min(pairs);
        let (sorted, tiles) = (arena.take(most_tiles * tile * 4)?, arena.take(most_tiles * TILE_BYTES)?);
        let block = pairs.min(MOST_EXPERTS).max(num_experts).next_multiple_of(32);
        let launch = Launch {
            kernel: "moe_align",
            grid: [1, 1, 1],
            block: int(block),
            shared: int(block / 32 * num_experts * 4),
        };
        let args = [
            sorted.address().into(),
            tiles.address().into(),
            topk_ids.into(),
            int(pairs).into(),
            int(num_experts).into(),
            int(tile).into(),
            int(most_tiles).into(),
        ];
        // SAFETY: `sorted` and `tiles` have room for as many tiles as there can be; ids are `[pairs]`, by the caller.
        unsafe { arena.gpu().launch(launch, &args)? };
        Ok(Plan { sorted, tiles, most_tiles })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tilings_suit_the_batch() {
        for (n, top_k, num_experts, tiling) in [
            (1, 8, 128, ExpertTiling::Split(8)),
            (64, 8, 128, ExpertTiling::Split(8)),
            (128, 8, 128, ExpertTiling::Split(16)),
            (8, 2, 2, ExpertTiling::Split(8)),
            (256, 8, 128, ExpertTiling::Split(32)),
            (512, 8, 128, ExpertTiling::Tile(64)),
            (1024, 8, 128, ExpertTiling::Tile(64)),
            (4096, 8, 128, ExpertTiling::Tile(128)),
        ] {
            assert_eq!(ExpertTiling::choose(n, top_k, num_experts, false), tiling, "{n} x {top_k} of {num_experts}");
        }
        for (n, tiling) in [
            (256, ExpertTiling::Split(32)),
            (512, ExpertTiling::Wgmma(64)),
            (4096, ExpertTiling::Wgmma(128)),
            (16384, ExpertTiling::Wgmma(160)),
        ] {
            assert_eq!(ExpertTiling::choose(n, 8, 128, true), tiling, "{n}");
        }
    }
}
