use candle_core::{Device, Result, Tensor};

use crate::error::{KernelError, check_index, check_shape};
use crate::expert_product;
use crate::experts::PackedExperts;
use crate::form::Form;
use crate::router::Routing;
use crate::tensor::{unfilled, with_elements, with_rows};

const OP: &str = "expert_ffn";

/// `sum over k of weight_k * down(silu(gate x) * (up x))` of the chosen experts, `x` f32 `[n, hidden]` to the same
/// shape.
///
/// The sum runs by ascending expert id, so a row depends on its own routing alone, and not on the order of its ids.
pub fn expert_ffn(x: &Tensor, routing: &Routing, experts: &PackedExperts) -> Result<Tensor> {
    with_rows(OP, "x", x, experts.hidden(), |x, n| {
        check_shape(OP, "topk_weights", routing.topk_weights.dims(), routing.topk_ids.dims())?;
        with_elements(OP, &routing.topk_ids, |ids| {
            with_elements(OP, &routing.topk_weights, |weights| {
                let mut out = unfilled(x.len());
                experts_rows(Form::current(), x, ids, weights, experts, &mut out)?;
                Tensor::from_vec(out, (n, experts.hidden()), &Device::Cpu)
            })
        })
    })
}

/// As [`expert_ffn`] on slices: `x` and `out` `[n, hidden]`, `ids` and `weights` `[n, top_k]`.
pub fn experts_rows(
    form: Form,
    x: &[f32],
    ids: &[u32],
    weights: &[f32],
    experts: &PackedExperts,
    out: &mut [f32],
) -> std::result::Result<(), KernelError> {
    let n = x.len() / experts.hidden().max(1);
    check_shape(OP, "out", &[out.len()], &[x.len()])?;
    check_shape(OP, "topk_weights", &[weights.len()], &[ids.len()])?;
    let top_k = ids.len() / n.max(1);
    check_shape(OP, "topk_ids", &[ids.len()], &[n * top_k])?;
    for &id in ids {
        check_index(OP, "expert id", id as usize, experts.num_experts())?;
    }
    expert_product::expert_ffn(form, x, ids, weights, experts, out);
    Ok(())
}
