use crate::error::{KernelError, check_shape};
use crate::gpu::rows::{ROW_PAD, int};
use crate::gpu::{Address, Arena, DeviceBuffer, DeviceMatrix, DeviceRows, Launch};
use crate::weights::WeightDtype;

/// Bytes of a row that go through shared memory together (`ROW_BYTES` in `kernels/cuda/gemm.cuh`).
const CHUNK: usize = 64;

/// Outputs that are packed together.
pub(crate) const PANEL: usize = 16;

/// How K is cut, from the layer's shape alone: no more segments than a block has warps, and none too short to keep the
/// memory busy. Both lengths are in chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Split {
    pub(crate) segment: usize,
    segments: usize,
}

impl Split {
    /// Warps of a block, at most.
    const WARPS: usize = 8;

    /// Of a row of `in_features` weights.
    pub(crate) fn of(in_features: usize, dtype: WeightDtype) -> Split {
        let rows = in_features.div_ceil(ROW_PAD);
        // `wgmma_product` takes two chunks of 16-bit elements at once.
        let segment = rows.div_ceil(Self::WARPS).max(4).next_multiple_of(2);
        Split { segment: segment * ROW_PAD * dtype.bytes() / CHUNK, segments: rows.div_ceil(segment) }
    }

    /// Groups of a block, each of one warp a segment.
    pub(crate) fn groups(self) -> usize {
        Self::WARPS / self.segments
    }

    /// Launch dimensions of `split_product`: `units` of `panels` panels, and `tokens` tokens, `tiles` times.
    pub(crate) fn launch(
        self,
        kernel: &'static str,
        [units, panels]: [usize; 2],
        [tiles, tokens]: [usize; 2],
    ) -> Launch {
        let stage = panels * PANEL * CHUNK + tokens * CHUNK;
        // As `SPLIT_STAGES`.
        let stages = (10240 / stage).clamp(3, 6);
        let warps = self.groups() * self.segments;
        let grid = [int(units.div_ceil(self.groups())), int(tiles), 1];
        Launch { kernel, grid, block: int(warps * 32), shared: int(warps * stages * stage) }
    }
}

/// Bytes of shared memory of `tile_product` with tiles of 128 outputs.
pub(crate) fn tile_shared(tokens: usize) -> u32 {
    // As `TILE_STAGES`.
    int(5 * (128 + tokens) * CHUNK)
}

/// Bytes of shared memory of `wgmma_product` with tiles of 128 outputs.
pub(crate) fn wgmma_shared(tokens: usize) -> u32 {
    // As `WGMMA_STAGES`.
    let (stage, most) = ((128 + tokens) * 2 * CHUNK, if tokens == 64 { 96 } else { 160 });
    int(most * 1024 / stage * stage)
}

/// The tokens of a block of `wgmma_product`, 128 or 160: with which so many multiprocessors are done sooner.
pub(crate) fn wgmma_tokens(tiles: impl Fn(usize) -> usize, multiprocessors: usize) -> usize {
    // Some of a tile's time does not depend on its tokens.
    let time = |tokens: usize| tiles(tokens).div_ceil(multiprocessors.max(1)) * (tokens + 32);
    if time(160) <= time(128) { 160 } else { 128 }
}

/// A kernel's name with the suffix of a type.
macro_rules! names {
    ($dtype:expr, $($name:literal),+) => {
        crate::gpu::rows::by_dtype(
            $dtype,
            [concat!($($name,)+ "_f32"), concat!($($name,)+ "_bf16"), concat!($($name,)+ "_f16")],
        )
    };
}
pub(crate) use names;

/// A kernel's name with the suffix of a type that tensor cores multiply.
macro_rules! wgmma_names {
    ($dtype:expr, $($name:literal),+) => {
        match $dtype {
            crate::weights::WeightDtype::F32 => panic!(concat!($($name,)+ " multiplies no f32")),
            dtype => crate::gpu::rows::by_dtype(dtype, ["", concat!($($name,)+ "_bf16"), concat!($($name,)+ "_f16")]),
        }
    };
}
pub(crate) use wgmma_names;

/// Which kernel computes a product. The bits of the result do not depend on it; but all that is promised of
/// [`Wgmma`](Self::Wgmma) is that they do not depend on its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinearTiling {
    /// Warps share K: `outputs` (16 or 32) by `tokens` (8, 16, 32 or 64) each.
    Split {
        /// Outputs of a warp.
        outputs: usize,
        /// Tokens of a block.
        tokens: usize,
    },
    /// Warps share a tile of 128 outputs by `tokens` (64 or 128).
    Tile {
        /// Tokens of a block.
        tokens: usize,
    },
    /// Hopper's warpgroups share a tile of 128 outputs by `tokens` (64, 128 or 160); not of f32.
    Wgmma {
        /// Tokens of a block.
        tokens: usize,
    },
}

impl LinearTiling {
    /// Every tiling there is.
    pub const ALL: [LinearTiling; 13] = [
        LinearTiling::Split { outputs: 16, tokens: 8 },
        LinearTiling::Split { outputs: 16, tokens: 16 },
        LinearTiling::Split { outputs: 16, tokens: 32 },
        LinearTiling::Split { outputs: 16, tokens: 64 },
        LinearTiling::Split { outputs: 32, tokens: 8 },
        LinearTiling::Split { outputs: 32, tokens: 16 },
        LinearTiling::Split { outputs: 32, tokens: 32 },
        LinearTiling::Split { outputs: 32, tokens: 64 },
        LinearTiling::Tile { tokens: 64 },
        LinearTiling::Tile { tokens: 128 },
        LinearTiling::Wgmma { tokens: 64 },
        LinearTiling::Wgmma { tokens: 128 },
        LinearTiling::Wgmma { tokens: 160 },
    ];

    /// For `n` rows on a device with so many multiprocessors: large tiles where there are enough to go round, and
    /// otherwise as many blocks as it takes to read the weights at full speed. `wgmma` says whether it may be
    /// [`Wgmma`](Self::Wgmma).
    pub fn choose(n: usize, out_features: usize, multiprocessors: usize, wgmma: bool) -> LinearTiling {
        let tiles = |tokens: usize| out_features.div_ceil(128) * n.div_ceil(tokens);
        if n > 64 && tiles(128) >= multiprocessors {
            return match wgmma {
                true => LinearTiling::Wgmma { tokens: wgmma_tokens(tiles, multiprocessors) },
                false => LinearTiling::Tile { tokens: 128 },
            };
        }
        // Few tokens too are read less often by tall tiles, which is worth more than what stays empty.
        if n > 16 && tiles(64) * 2 >= multiprocessors {
            return match wgmma && n > 32 {
                true => LinearTiling::Wgmma { tokens: 64 },
                false => LinearTiling::Tile { tokens: 64 },
            };
        }
        let tokens = n.next_power_of_two().clamp(8, 64);
        // Blocks of 64 tokens have a multiprocessor each, and much to gain from reading the tokens less often.
        let wanted = if tokens == 64 { multiprocessors * 3 / 4 } else { multiprocessors * 2 };
        let wide = out_features.div_ceil(32) * n.div_ceil(tokens) >= wanted;
        LinearTiling::Split { outputs: if wide { 32 } else { 16 }, tokens }
    }

    fn kernel(self, dtype: WeightDtype) -> &'static str {
        match self {
            LinearTiling::Split { outputs: 16, tokens: 8 } => names!(dtype, "linear_split_16x8"),
            LinearTiling::Split { outputs: 16, tokens: 16 } => names!(dtype, "linear_split_16x16"),
            LinearTiling::Split { outputs: 16, tokens: 32 } => names!(dtype, "linear_split_16x32"),
            LinearTiling::Split { outputs: 16, tokens: 64 } => names!(dtype, "linear_split_16x64"),
            LinearTiling::Split { outputs: 32, tokens: 8 } => names!(dtype, "linear_split_32x8"),
            LinearTiling::Split { outputs: 32, tokens: 16 } => names!(dtype, "linear_split_32x16"),
            LinearTiling::Split { outputs: 32, tokens: 32 } => names!(dtype, "linear_split_32x32"),
            LinearTiling::Split { outputs: 32, tokens: 64 } => names!(dtype, "linear_split_32x64"),
            LinearTiling::Tile { tokens: 64 } => names!(dtype, "linear_tile_128x64"),
            LinearTiling::Tile { tokens: 128 } => names!(dtype, "linear_tile_128x128"),
            LinearTiling::Wgmma { tokens: 64 } => wgmma_names!(dtype, "linear_wgmma_128x64"),
            LinearTiling::Wgmma { tokens: 128 } => wgmma_names!(dtype, "linear_wgmma_128x128"),
            LinearTiling::Wgmma { tokens: 160 } => wgmma_names!(dtype, "linear_wgmma_128x160"),
            _ => unreachable!("{self:?} is no tiling"),
        }
    }

    fn launch(self, n: usize, w: &DeviceMatrix) -> Launch {
        let (kernel, outs) = (self.kernel(w.dtype()), w.out_features());
        match self {
            LinearTiling::Split { outputs, tokens } => Split::of(w.in_features(), w.dtype()).launch(
                kernel,
                [outs.div_ceil(outputs), outputs / PANEL],
                [n.div_ceil(tokens), tokens],
            ),
            LinearTiling::Tile { tokens } | LinearTiling::Wgmma { tokens } => {
                let grid = [int(outs.div_ceil(128) * n.div_ceil(tokens)), 1, 1];
                let wgmma = matches!(self, LinearTiling::Wgmma { .. });
                Launch {
                    kernel,
                    grid,
                    block: 256,
                    shared: if wgmma { wgmma_shared(tokens) } else { tile_shared(tokens) },
                }
            }
        }
    }
}

/// `x W^T + bias`: `x` `[n, in]` as products read it, `bias` f32 `[out]`, to f32 `[n, out]`.
///
/// The bits of a row depend on that row and the weights alone, on a device that [uses no wgmma](crate::gpu::Gpu::uses_wgmma).
///
/// # Panics
/// When `x` has another element type than the weights.
pub fn linear(
    arena: &Arena,
    x: &DeviceRows,
    w: &DeviceMatrix,
    bias: Option<&DeviceBuffer>,
) -> Result<DeviceRows, KernelError> {
    let multiprocessors = arena.gpu().driver().multiprocessors() as usize;
    let wgmma = arena.gpu().uses_wgmma(w.dtype());
    linear_tiled(arena, x, w, bias, LinearTiling::choose(x.len(), w.out_features(), multiprocessors, wgmma))
}

/// As [`linear`], in a given tiling, which the device and the weights must suit.
pub fn linear_tiled(
    arena: &Arena,
    x: &DeviceRows,
    w: &DeviceMatrix,
    bias: Option<&DeviceBuffer>,
    tiling: LinearTiling,
) -> Result<DeviceRows, KernelError> {
    const OP: &str = "linear";
    let (n, outs) = (x.len(), w.out_features());
    check_operand(OP, x, w.in_features(), w.dtype())?;
    if let Some(bias) = bias {
        check_shape(OP, "bias", &[bias.bytes() / 4], &[outs])?;
    }
    let out = DeviceRows::floats(arena, n, outs)?;
    if n == 0 || outs == 0 {
        return Ok(out);
    }
    let args = [
        out.address().into(),
        x.address().into(),
        w.address().into(),
        bias.map_or(Address::NULL, DeviceBuffer::address).into(),
        int(n).into(),
        int(outs).into(),
        int(x.ld()).into(),
        int(Split::of(w.in_features(), w.dtype()).segment).into(),
    ];
    // SAFETY: the shapes were checked: `x` is padded as the weights are, and `out` has a row for each of its rows.
    unsafe { arena.gpu().launch(tiling.launch(n, w), &args)? };
    Ok(out)
}

/// Fails unless `x` has the shape that a product with weights `[_, width]` reads.
pub(crate) fn check_operand(
    op: &'static str,
    x: &DeviceRows,
    width: usize,
    dtype: WeightDtype,
) -> Result<(), KernelError> {
    assert_eq!(x.dtype(), dtype, "{op}: whoever made x knew what it is for");
    check_shape(op, "x", &[x.len(), x.width(), x.ld()], &[x.len(), width, width.next_multiple_of(ROW_PAD)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tilings_suit_the_layer() {
        let split = |outputs, tokens| LinearTiling::Split { outputs, tokens };
        // [rows, outputs] on 132 multiprocessors.
        for (n, outs, tiling) in [
            (1, 2048, split(16, 8)),
            (8, 151936, split(32, 8)),
            (9, 2048, split(16, 16)),
            (33, 5120, split(32, 64)),
            (128, 2048, split(32, 64)),
            (300, 2048, LinearTiling::Tile { tokens: 64 }),
            (2048, 2048, LinearTiling::Tile { tokens: 128 }),
            (17, 151936, LinearTiling::Tile { tokens: 64 }),
            (65, 151936, LinearTiling::Tile { tokens: 128 }),
        ] {
            assert_eq!(LinearTiling::choose(n, outs, 132, false), tiling, "{n} x {outs}");
        }
        let wgmma = |tokens| LinearTiling::Wgmma { tokens };
        for (n, outs, tiling) in [
            (1, 2048, split(16, 8)),
            (128, 2048, split(32, 64)),
            (17, 151936, LinearTiling::Tile { tokens: 64 }),
            (33, 151936, wgmma(64)),
            (300, 2048, wgmma(64)),
            // Two rounds either way, or three.
            (2048, 2048, wgmma(128)),
            (2560, 2048, wgmma(160)),
            (65, 151936, wgmma(128)),
            (8192, 4096, wgmma(160)),
        ] {
            assert_eq!(LinearTiling::choose(n, outs, 132, true), tiling, "{n} x {outs}");
        }
    }

    #[test]
    fn stages_fit() {
        for (tokens, stages) in [(64, 4), (128, 5), (160, 4)] {
            assert_eq!(wgmma_shared(tokens) as usize, stages * (128 + tokens) * 128);
        }
    }

    #[test]
    fn splits_are_whole_and_few() {
        for (ins, dtype, segment, segments) in [
            (1, WeightDtype::BF16, 4, 1),
            (1100, WeightDtype::BF16, 6, 6),
            (768, WeightDtype::BF16, 4, 6),
            (2048, WeightDtype::F16, 8, 8),
            (2880, WeightDtype::BF16, 12, 8),
            (4096, WeightDtype::F32, 32, 8),
        ] {
            let split = Split::of(ins, dtype);
            assert_eq!(split, Split { segment, segments }, "{ins}");
            assert!(segments * split.groups() <= 8);
        }
    }
}
