use crate::attention::AttentionShape;
use crate::error::{KernelError, check_index, check_shape};
use crate::gpu::rows::{by_dtype, int};
use crate::gpu::{Address, Arena, DeviceBuffer, DeviceKv, DeviceRows, Gpu, GpuError, Launch};
use crate::qkv::QkNorm;
use crate::rope::RopeTable;

const OP: &str = "qkv_rope_store";

/// [`QkNorm`] with its weights on a device.
#[derive(Debug)]
pub struct DeviceQkNorm {
    q_weight: DeviceBuffer,
    k_weight: DeviceBuffer,
    eps: f32,
    per_head: bool,
}

impl DeviceQkNorm {
    /// Copies the weights, which are there when the call returns.
    pub fn new(gpu: &Gpu, norm: &QkNorm) -> Result<DeviceQkNorm, GpuError> {
        let q_weight = DeviceBuffer::of(gpu, &norm.q_weight)?;
        let k_weight = DeviceBuffer::of(gpu, &norm.k_weight)?;
        Ok(DeviceQkNorm { q_weight, k_weight, eps: norm.eps, per_head: norm.per_head })
    }

    fn check(&self, shape: &AttentionShape) -> Result<(), KernelError> {
        let (q, k) = if self.per_head { (1, 1) } else { (shape.heads, shape.kv_heads) };
        check_shape(OP, "q norm weight", &[self.q_weight.bytes() / 4], &[q * shape.head_dim])?;
        check_shape(OP, "k norm weight", &[self.k_weight.bytes() / 4], &[k * shape.head_dim])
    }
}

/// [`RopeTable`] on a device: cosines, then sines, f32 `[max_positions, rotary / 2]` each.
#[derive(Debug)]
pub struct DeviceRope {
    table: DeviceBuffer,
    rotary_dim: usize,
    max_positions: usize,
}

impl DeviceRope {
    /// Copies the table, which is there when the call returns.
    pub fn new(gpu: &Gpu, rope: &RopeTable) -> Result<DeviceRope, GpuError> {
        let (rotary_dim, max_positions) = (rope.rotary_dim(), rope.max_positions());
        let rows = || (0..max_positions).map(|position| rope.at(int(position)));
        let mut values = Vec::with_capacity(rotary_dim * max_positions);
        rows().for_each(|(cos, _)| values.extend_from_slice(cos));
        rows().for_each(|(_, sin)| values.extend_from_slice(sin));
        Ok(DeviceRope { table: DeviceBuffer::of(gpu, &values)?, rotary_dim, max_positions })
    }

    /// One past the largest position of the table.
    pub fn max_positions(&self) -> usize {
        self.max_positions
    }

    /// Leading elements of a head that are rotated.
    pub fn rotary_dim(&self) -> usize {
        self.rotary_dim
    }

    fn cos(&self) -> Address {
        self.table.address()
    }

    fn sin(&self) -> Address {
        self.table.address().at(self.table.bytes() / 2)
    }
}

/// Norms, clamps and rotates `qkv` f32 `[n, (heads + 2 kv_heads) * head_dim]`, stores K and V at the slots, and returns
/// the queries `[n, heads * head_dim]` in the cache's type.
///
/// `positions` and `slots` are u32 `[n]` on the device, checked by the caller: positions are below those of the table,
/// slots inside the cache and distinct. A row whose slot is `u32::MAX` is not stored (rows that pad a batch).
#[allow(clippy::too_many_arguments)]
pub fn qkv_rope_store(
    arena: &Arena,
    qkv: &DeviceRows,
    shape: &AttentionShape,
    norm: Option<&DeviceQkNorm>,
    rope: &DeviceRope,
    positions: Address,
    slots: Address,
    kv: &DeviceKv,
    layer: usize,
) -> Result<DeviceRows, KernelError> {
    shape.check_heads(OP, kv)?;
    if let Some(norm) = norm {
        norm.check(shape)?;
    }
    let width = shape.q_width() + 2 * shape.kv_heads * shape.head_dim;
    check_shape(OP, "qkv", &[qkv.width(), qkv.ld()], &[width, width])?;
    check_index(OP, "rotary width", rope.rotary_dim, shape.head_dim + 1)?;
    check_index(OP, "layer", layer, kv.num_layers())?;
    let q = DeviceRows::operand(arena, qkv.len(), shape.q_width(), kv.dtype())?;
    if qkv.is_empty() {
        return Ok(q);
    }
    let kernel = by_dtype(kv.dtype(), ["qkv_rope_store_f32", "qkv_rope_store_bf16", "qkv_rope_store_f16"]);
    let weight = |which: fn(&DeviceQkNorm) -> &DeviceBuffer| norm.map_or(Address::NULL, |norm| which(norm).address());
    let args = [
        q.address().into(),
        kv.k(layer).into(),
        kv.v(layer).into(),
        qkv.address().into(),
        weight(|norm| &norm.q_weight).into(),
        weight(|norm| &norm.k_weight).into(),
        rope.cos().into(),
        rope.sin().into(),
        positions.into(),
        slots.into(),
        int(shape.heads).into(),
        int(shape.kv_heads).into(),
        int(shape.head_dim).into(),
        int(rope.rotary_dim / 2).into(),
        int(q.ld()).into(),
        int(kv.block_size()).into(),
        u32::from(norm.is_some_and(|norm| norm.per_head)).into(),
        norm.map_or(0.0, |norm| norm.eps).into(),
        shape.clip_qkv.unwrap_or(f32::INFINITY).into(),
    ];
    // A warp per head, as many as a block has; fixed by the shape, as the order of a sum over the width depends on it.
    let warps = int(shape.heads + 2 * shape.kv_heads).clamp(1, 16);
    let launch = Launch { kernel, grid: [int(qkv.len()), 1, 1], block: warps * 32, shared: 0 };
    // SAFETY: the shapes were checked; positions and slots by the caller.
    unsafe { arena.gpu().launch(launch, &args)? };
    Ok(q)
}

impl AttentionShape {
    /// Whether the cache has this shape's heads.
    pub(crate) fn check_heads(&self, op: &'static str, kv: &DeviceKv) -> Result<(), KernelError> {
        let cache = [kv.shape.kv_heads, kv.shape.head_dim];
        check_shape(op, "kv cache heads", &cache, &[self.kv_heads, self.head_dim])?;
        check_shape(op, "query heads", &[self.heads], &[self.group() * self.kv_heads])
    }
}
