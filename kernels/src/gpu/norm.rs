use crate::error::{KernelError, check_shape};
use crate::gpu::rows::{by_dtype, int};
use crate::gpu::{Address, Arena, DeviceBuffer, DeviceMatrix, DeviceRows, GpuError, Launch};
use crate::weights::WeightDtype;

/// One block a row, as many threads as the row can use.
fn by_rows(kernel: &'static str, rows: usize, width: usize) -> Launch {
    let block = int(width.div_ceil(4).next_multiple_of(32).clamp(32, 512));
    Launch { kernel, grid: [int(rows), 1, 1], block, shared: 0 }
}

/// Rows `ids` (u32 on the device, checked by the caller) of the table as f32 `[n, width]`.
pub fn embedding(arena: &Arena, table: &DeviceMatrix, ids: Address, n: usize) -> Result<DeviceRows, GpuError> {
    let width = table.in_features();
    let out = DeviceRows::floats(arena, n, width)?;
    let kernel = by_dtype(table.dtype(), ["embed_f32", "embed_bf16", "embed_f16"]);
    let args =
        [out.address().into(), table.address().into(), ids.into(), int(width).into(), int(table.cols16()).into()];
    // SAFETY: ids are rows of the table, by the caller's check.
    unsafe { arena.gpu().launch(by_rows(kernel, n, width), &args)? };
    Ok(out)
}

/// Adds `addition` f32 to `x` f32, both `[n, width]`, and returns the norm of the sum, as products read it.
pub fn add_rms_norm(
    arena: &Arena,
    x: &DeviceRows,
    addition: Option<&DeviceRows>,
    weight: &DeviceBuffer,
    eps: f32,
    dtype: WeightDtype,
) -> Result<DeviceRows, KernelError> {
    const OP: &str = "add_rms_norm";
    let (n, width) = (x.len(), x.width());
    check_shape(OP, "weight", &[weight.bytes() / 4], &[width])?;
    if let Some(addition) = addition {
        check_shape(OP, "addition", &[addition.len(), addition.width(), addition.ld()], &[n, width, width])?;
    }
    let out = DeviceRows::operand(arena, n, width, dtype)?;
    let kernel = by_dtype(dtype, ["add_rms_norm_f32", "add_rms_norm_bf16", "add_rms_norm_f16"]);
    let args = [
        out.address().into(),
        x.address().into(),
        addition.map_or(Address::NULL, DeviceRows::address).into(),
        weight.address().into(),
        eps.into(),
        int(width).into(),
        int(out.ld()).into(),
    ];
    // SAFETY: the shapes were checked.
    unsafe { arena.gpu().launch(by_rows(kernel, n, width), &args)? };
    Ok(out)
}

/// `silu(gate) * up` of `x` f32 `[n, 2 * width]`, gate before up, as products read it.
pub fn silu_and_mul(arena: &Arena, x: &DeviceRows, dtype: WeightDtype) -> Result<DeviceRows, GpuError> {
    let width = x.width() / 2;
    let out = DeviceRows::operand(arena, x.len(), width, dtype)?;
    let kernel = by_dtype(dtype, ["silu_and_mul_f32", "silu_and_mul_bf16", "silu_and_mul_f16"]);
    let args = [out.address().into(), x.address().into(), int(width).into(), int(out.ld()).into()];
    // SAFETY: `out` has as many rows as `x`, which are twice as wide.
    unsafe { arena.gpu().launch(by_rows(kernel, x.len(), width), &args)? };
    Ok(out)
}

/// Rows `rows` (u32 on the device, checked by the caller) of `x + addition`, f32.
pub fn select_rows(
    arena: &Arena,
    x: &DeviceRows,
    addition: Option<&DeviceRows>,
    rows: Address,
    len: usize,
) -> Result<DeviceRows, KernelError> {
    let width = x.width();
    if let Some(addition) = addition {
        check_shape("select_rows", "addition", &[addition.len(), addition.ld()], &[x.len(), width])?;
    }
    let out = DeviceRows::floats(arena, len, width)?;
    let addition = addition.map_or(Address::NULL, DeviceRows::address);
    let args = [out.address().into(), x.address().into(), addition.into(), rows.into(), int(width).into()];
    // SAFETY: the rows are rows of both, by the caller's check.
    unsafe { arena.gpu().launch(by_rows("select_rows", len, width), &args)? };
    Ok(out)
}
