use std::sync::{Arc, OnceLock};

use moetrail_kernels::pool::Pool;

use crate::toss::Toss;

/// Pools of one, two and three threads, kept for all cases.
pub fn pools() -> &'static [Arc<Pool>; 3] {
    static POOLS: OnceLock<[Arc<Pool>; 3]> = OnceLock::new();
    POOLS.get_or_init(|| [Pool::new(1), Pool::new(2), Pool::new(3)])
}

/// Runs `run(rows)`, which computes the rows named, for the whole batch, a permutation, a split and each row alone, on
/// different numbers of threads; asserts that a row always has the same bits, and returns the whole batch.
pub fn check_rows(n: usize, toss: &mut Toss, run: impl Fn(&[usize]) -> Vec<f32>) -> Vec<f32> {
    let [one, two, three] = pools();
    let all: Vec<usize> = (0..n).collect();
    let whole = one.install(|| run(&all));
    let width = whole.len() / n.max(1);
    let check = |rows: &[usize], got: &[f32], how: &str| {
        assert_eq!(got.len(), rows.len() * width);
        for (at, &row) in rows.iter().enumerate() {
            let (got, expected) = (&got[at * width..][..width], &whole[row * width..][..width]);
            assert_bits(got, expected, &format!("row {row} {how}"));
        }
    };
    check(&all, &three.install(|| run(&all)), "on three threads");
    let order = toss.permutation(n);
    check(&order, &two.install(|| run(&order)), "in another order");
    let (first, second) = all.split_at(toss.below(n + 1));
    check(first, &two.install(|| run(first)), "of the first part");
    check(second, &three.install(|| run(second)), "of the second part");
    for row in 0..n {
        check(&[row], &two.install(|| run(&[row])), "alone");
    }
    whole
}

pub fn assert_bits(got: &[f32], expected: &[f32], how: &str) {
    assert_eq!(got.len(), expected.len(), "{how}");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert_eq!(got.to_bits(), expected.to_bits(), "{how}: element {i} is {got}, expected {expected}");
    }
}

/// Each element within its bound, or not a number where the expected one is not.
pub fn assert_close(got: &[f32], expected: &[f32], bound: impl Fn(usize) -> f32, how: &str) {
    assert_eq!(got.len(), expected.len(), "{how}");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let bound = bound(i);
        let close = (got - expected).abs() <= bound || (got.is_nan() && expected.is_nan());
        assert!(close, "{how}: element {i} is {got}, expected {expected} within {bound}");
    }
}

/// The named rows of `x` `[n, width]`.
pub fn pick(x: &[f32], width: usize, rows: &[usize]) -> Vec<f32> {
    rows.iter().flat_map(|&row| x[row * width..][..width].iter().copied()).collect()
}
