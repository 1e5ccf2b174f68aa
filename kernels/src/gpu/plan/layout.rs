use crate::attention::AttentionShape;
use crate::gpu::DeviceKv;
use crate::weights::WeightDtype;

/// Key positions that are multiplied at once (`TILE` in `kernels/cuda/attention.cuh`).
pub(super) const TILE: usize = 64;

/// The width that the tensor cores' kernels take for a head, if they do.
pub(crate) fn padded_head(shape: &AttentionShape, kv: &DeviceKv) -> Option<usize> {
    let width = [32, 64, 128, 256].into_iter().find(|width| shape.head_dim <= *width)?;
    (kv.dtype() != WeightDtype::F32 && shape.head_dim.is_multiple_of(8) && shape.head_dim > 0).then_some(width)
}

/// Bytes of the keys or values of a tile.
pub(crate) fn tile_bytes(width: usize) -> usize {
    TILE * width * 2
}

/// A block that attends whole contexts, as the kernels for heads of a width were instantiated.
pub(crate) struct PrefillLayout {
    /// (Row, head) pairs.
    pub(crate) pairs: usize,
    /// Bytes of shared memory: tiles; of wide heads the queries and each thread's maxima and sums.
    pub(crate) shared: usize,
    /// Bytes of the state of earlier splits.
    pub(crate) merged: usize,
}

pub(crate) fn prefill_layout(width: usize) -> PrefillLayout {
    let pairs = if width <= 128 { 128 } else { 64 };
    let shared = if width < 128 { 4 * tile_bytes(width) } else { 2 * tile_bytes(width) + pairs * (2 * width + 32) };
    PrefillLayout { pairs, shared, merged: pairs * 32 * (width / 8 + 1) }
}
