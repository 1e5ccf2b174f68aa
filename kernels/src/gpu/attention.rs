use crate::attention::AttentionShape;
use crate::error::{KernelError, check_index, check_shape};
use crate::gpu::kv::BlockDivision;
use crate::gpu::plan::{padded_head, prefill_layout, tile_bytes};
use crate::gpu::rows::{by_dtype, int};
use crate::gpu::{Address, Arena, Arg, AttentionPlan, DeviceKv, DeviceRows, Launch};
use crate::weights::WeightDtype;

const OP: &str = "paged_attention";

/// Causal attention of `q` `[n, heads * head_dim]` over a layer of the cache, to rows of the same shape; both in the
/// cache's type. The query at position `p` sees keys `0..=p`, or the window.
///
/// `plan_at` is where the device has the plan's words, or those of another plan with equal launches. A row's bits depend
/// on its query and its context alone. Rows that the plan does not name are undefined.
pub fn paged_attention(
    arena: &Arena,
    q: &DeviceRows,
    shape: &AttentionShape,
    plan: &AttentionPlan,
    plan_at: Address,
    kv: &DeviceKv,
    layer: usize,
) -> Result<DeviceRows, KernelError> {
    plan.check(shape, kv)?;
    check_index(OP, "layer", layer, kv.num_layers())?;
    let launches = plan.launches();
    let out = DeviceRows::operand(arena, q.len(), shape.q_width(), kv.dtype())?;
    check_shape(OP, "q", &[q.width(), q.ld(), q.dtype().bytes()], &[out.width(), out.ld(), kv.dtype().bytes()])?;
    check_index(OP, "row", launches.rows, q.len() + 1)?;

    let (dtype, kv_heads) = (kv.dtype(), int(shape.kv_heads));
    let division = BlockDivision::new(kv.block_size());
    let window = shape.window.map_or(u32::MAX, |window| u32::try_from(window.max(1)).unwrap_or(u32::MAX));
    let items_at = |item: usize| plan_at.at(item * 8 * 4);
    let entries_at = items_at(launches.plain_items + launches.split_items + launches.whole_items);
    let operands: [Arg; 5] =
        [out.address().into(), q.address().into(), kv.k(layer).into(), kv.v(layer).into(), plan_at.into()];
    let sizes: [Arg; 9] = [
        kv_heads.into(),
        int(shape.group()).into(),
        int(shape.head_dim).into(),
        int(q.ld()).into(),
        int(kv.block_size()).into(),
        division.magic.into(),
        division.shift.into(),
        // Scores are powers of two.
        (shape.scale * std::f32::consts::LOG2_E).into(),
        window.into(),
    ];
    let launch = |kernel, heads, items: usize, block, shared, args: &[Arg]| {
        check_index(OP, "blocks of threads", items, 65536)?;
        let grid = [heads, int(items), 1];
        // SAFETY: the plan was made for this shape, and its rows are rows of `q` and `out`.
        unsafe { arena.gpu().launch(Launch { kernel, grid, block, shared: int(shared) }, args) }
            .map_err(KernelError::Gpu)
    };

    if launches.plain_items > 0 {
        let kernel = by_dtype(dtype, ["attention_plain_f32", "attention_plain_bf16", "attention_plain_f16"]);
        let args = [&operands[..], &[items_at(0).into()], &sizes].concat();
        launch(kernel, int(shape.heads), launches.plain_items, 128, 5 * shape.head_dim * 4, &args)?;
    }
    let Some(width) = padded_head(shape, kv) else { return Ok(out) };
    if launches.whole_items > 0 {
        let layout = prefill_layout(width);
        let merged = launches.whole_items * shape.kv_heads * layout.merged;
        let merged = if launches.merge { Some(arena.take(merged)?) } else { None };
        let merged_at: Arg = merged.as_ref().map_or(Address::NULL, |merged| merged.address()).into();
        let items: Arg = items_at(launches.split_items).into();
        let args = [&operands[..1], &[merged_at], &operands[1..], &[items], &sizes].concat();
        launch(prefill_kernel(dtype, width), kv_heads, launches.whole_items, 128, layout.shared, &args)?;
    }
    if launches.split_items > 0 {
        let partials = launches.entries * shape.kv_heads * launches.pairs * (shape.head_dim + 2);
        let partials = if launches.combine { Some(arena.take(partials * 4)?) } else { None };
        let partial: Arg = partials.as_ref().map_or(Address::NULL, |partials| partials.address()).into();
        let [out_at, q_at, k_at, v_at, words_at] = operands;
        let [kv_heads_arg, group, head_dim, ld, ..] = sizes;
        let pairs: Arg = int(launches.pairs).into();
        let head = [out_at, partial, q_at, k_at, v_at, words_at, items_at(0).into(), entries_at.into()];
        let args = [&head[..], &sizes, &[pairs]].concat();
        let buffers = if width <= 128 { 4 } else { 3 };
        launch(split_kernel(dtype, width), kv_heads, launches.entries, 128, buffers * tile_bytes(width), &args)?;
        if launches.combine {
            let kernel = by_dtype(dtype, ["", "attention_combine_bf16", "attention_combine_f16"]);
            let args = [out_at, partial, items_at(0).into(), kv_heads_arg, group, head_dim, ld, pairs];
            launch(kernel, kv_heads, launches.split_items, 128, 0, &args)?;
        }
    }
    Ok(out)
}

fn prefill_kernel(dtype: WeightDtype, width: usize) -> &'static str {
    let [bf16, f16] = match width {
        32 => ["attention_prefill_bf16_32", "attention_prefill_f16_32"],
        64 => ["attention_prefill_bf16_64", "attention_prefill_f16_64"],
        128 => ["attention_prefill_bf16_128", "attention_prefill_f16_128"],
        _ => ["attention_prefill_bf16_256", "attention_prefill_f16_256"],
    };
    by_dtype(dtype, ["", bf16, f16])
}

fn split_kernel(dtype: WeightDtype, width: usize) -> &'static str {
    let [bf16, f16] = match width {
        32 => ["attention_split_bf16_32", "attention_split_f16_32"],
        64 => ["attention_split_bf16_64", "attention_split_f16_64"],
        128 => ["attention_split_bf16_128", "attention_split_f16_128"],
        _ => ["attention_split_bf16_256", "attention_split_f16_256"],
    };
    by_dtype(dtype, ["", bf16, f16])
}
