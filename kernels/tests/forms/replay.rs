//! Random logits, and replays of random choices.

use moetrail_kernels::ReplayRows;

use crate::toss::Toss;

/// Few distinct values give ties; odd ones are infinite or not a number.
pub fn logits(toss: &mut Toss, len: usize, odd: bool) -> Vec<f32> {
    let specials = [f32::NAN, f32::NEG_INFINITY, 0.0, -0.0, 1.0, 1.5];
    let one = |_| match toss.below(4) {
        0 if odd => specials[toss.below(specials.len())],
        1 => toss.below(3) as f32,
        _ => toss.value() * 8.0,
    };
    (0..len).map(one).collect()
}

/// What one row of a replay is given, by the choice it would have made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Given {
    Nothing,
    Own,
    Permuted,
    Others,
}

/// Free, own, permuted and foreign ids side by side, between the cells of two other layers, which say nonsense.
pub struct Replay {
    pub kinds: Vec<Given>,
    /// The ids that each row has in the end.
    pub given: Vec<Vec<u32>>,
    /// As in [`ReplayRows`], and what follows.
    pub row_of: Vec<u32>,
    pub ids: Vec<u16>,
    pub moe_layers: usize,
    pub moe_layer: usize,
}

impl Replay {
    /// Of rows that would choose these of so many experts themselves.
    pub fn new(toss: &mut Toss, own: &[Vec<u32>], experts: usize) -> Replay {
        let (n, top_k) = (own.len(), own[0].len());
        let kinds: Vec<Given> =
            (0..n).map(|_| [Given::Nothing, Given::Own, Given::Permuted, Given::Others][toss.below(4)]).collect();
        let given: Vec<Vec<u32>> = (0..n)
            .map(|row| match kinds[row] {
                Given::Nothing | Given::Own => own[row].clone(),
                Given::Permuted => toss.permutation(top_k).iter().map(|&at| own[row][at]).collect(),
                Given::Others => toss.permutation(experts)[..top_k].iter().map(|&id| id as u32).collect(),
            })
            .collect();
        let (moe_layers, moe_layer) = (3, toss.below(3));
        let mut ids = vec![u16::MAX; n * moe_layers * top_k];
        let mut row_of = vec![ReplayRows::FREE; n];
        for (row, at) in toss.permutation(n).into_iter().enumerate().filter(|(row, _)| kinds[*row] != Given::Nothing) {
            row_of[row] = at as u32;
            let cell = &mut ids[(at * moe_layers + moe_layer) * top_k..][..top_k];
            cell.iter_mut().zip(&given[row]).for_each(|(cell, &id)| *cell = id as u16);
        }
        Replay { kinds, given, row_of, ids, moe_layers, moe_layer }
    }
}
