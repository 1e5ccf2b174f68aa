use super::norm::silu_and_mul;
use super::product::{dot, rounded};
use crate::experts::PackedExperts;
use crate::packed::{PANEL, PackedMatrix};

/// The chosen experts of each row, one (token, k) pair at a time; the operands were checked.
pub fn expert_ffn(x: &[f32], ids: &[u32], weights: &[f32], experts: &PackedExperts, out: &mut [f32]) {
    let (hidden, inter) = (experts.hidden(), experts.inter());
    let top_k = ids.len() / (x.len() / hidden).max(1);
    let (mut gate, mut up) = (vec![0.0; inter], vec![0.0; inter]);
    let (mut middle, mut down) = (vec![0.0; inter], vec![0.0; hidden]);
    out.fill(0.0);
    for (row, (x, out)) in x.chunks_exact(hidden).zip(out.chunks_exact_mut(hidden)).enumerate() {
        let x = rounded(x, hidden, experts.formats()[0]);
        for k in 0..top_k {
            let expert = ids[row * top_k + k] as usize;
            product(&x, &experts.gate_up, |o| experts.gate_panel(expert, o / PANEL) * PANEL + o % PANEL, &mut gate);
            product(&x, &experts.gate_up, |o| (experts.gate_panel(expert, o / PANEL) + 1) * PANEL + o % PANEL, &mut up);
            silu_and_mul(&gate, &up, &mut middle);
            let rounded_middle = rounded(&middle, inter, experts.formats()[1]);
            product(&rounded_middle, &experts.down, |o| experts.down_panel(expert, 0) * PANEL + o, &mut down);
            let weight = weights[row * top_k + k];
            out.iter_mut().zip(&down).for_each(|(out, down)| *out += weight * down);
        }
    }
}

/// Products with the matrix rows that `row(o)` names.
fn product(x: &[f32], matrix: &PackedMatrix, row: impl Fn(usize) -> usize, out: &mut [f32]) {
    let mut weights = vec![0.0; x.len()];
    for (o, out) in out.iter_mut().enumerate() {
        matrix.unpack_row(row(o), &mut weights);
        *out = dot(x, &weights);
    }
}
