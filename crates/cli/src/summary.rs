//! A table of how a text was routed.

use std::fmt::Write;

use moetrail_routes::ExpertRows;

/// Per layer: how many experts were used, how evenly, and which most.
pub fn table(rows: &ExpertRows, num_experts: usize, moe_layers: &[usize]) -> String {
    let mut text = format!("{:>5}  {:>11}  {:>7}  most used (share of selections)\n", "layer", "used", "entropy");
    for &layer in moe_layers {
        let mut counts = vec![0usize; num_experts];
        for position in rows.span().start..rows.span().end {
            for id in rows.ids(position, layer).into_iter().flatten() {
                counts[usize::from(id)] += 1;
            }
        }
        let total: usize = counts.iter().sum();
        let share = |count: usize| count as f64 / total.max(1) as f64;
        let used = counts.iter().filter(|count| **count > 0).count();
        let entropy: f64 = counts.iter().filter(|c| **c > 0).map(|c| -share(*c) * share(*c).log2()).sum();
        let mut order: Vec<usize> = (0..num_experts).collect();
        order.sort_by_key(|id| std::cmp::Reverse(counts[*id]));
        let top: Vec<String> =
            order.iter().take(4).map(|id| format!("{id} ({:.0}%)", 100.0 * share(counts[*id]))).collect();
        // Writing to a string does not fail.
        let _ = writeln!(text, "{layer:>5}  {used:>4} of {num_experts:<3}  {entropy:>7.2}  {}", top.join(", "));
    }
    text
}

#[cfg(test)]
mod tests {
    use moetrail_routes::{ExpertDtype, RowLayout};

    use super::*;

    #[test]
    fn counts_are_per_layer() {
        let layout = RowLayout { num_layers: 2, top_k: 1, dtype: ExpertDtype::U8 };
        let rows = ExpertRows::new(3, layout, vec![0, 3, 0, 3, 0, 2, 0, 1]).unwrap();
        let text = table(&rows, 4, &[1]);
        let line = text.lines().nth(1).unwrap();
        assert_eq!(line, "    1     3 of 4       1.50  3 (50%), 1 (25%), 2 (25%), 0 (0%)");
    }
}
