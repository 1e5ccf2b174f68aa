//! Which rows go to which expert.

use std::ops::Range;

/// Rows of one expert in one task: a large expert is split, so that it does not run alone at the end.
const GROUP_ROWS: usize = 128;

/// The (row, k) pairs of a batch sorted by expert; kept from call to call.
pub(crate) struct ExpertPlan {
    /// Pairs `row * top_k + k`, grouped by expert, in row order within one.
    pub(crate) pairs: Vec<u32>,
    pub(crate) top_k: usize,
    /// By ascending expert, and ascending rows within one.
    pub(crate) groups: Vec<Group>,
    /// Where each expert's next pair goes.
    cursor: Vec<u32>,
}

/// Some pairs of one expert.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) expert: usize,
    /// Part of `pairs`.
    pub(crate) pairs: Range<usize>,
    /// Row of the buffer between the products where the first pair stands; a multiple of the block.
    pub(crate) first_row: usize,
}

impl Default for ExpertPlan {
    fn default() -> Self {
        ExpertPlan::new()
    }
}

impl ExpertPlan {
    pub(crate) const fn new() -> ExpertPlan {
        ExpertPlan { pairs: Vec::new(), top_k: 1, groups: Vec::new(), cursor: Vec::new() }
    }

    /// Counting sort of the pairs by expert; every group begins at a whole block of rows.
    pub(crate) fn group(&mut self, ids: &[u32], top_k: usize, num_experts: usize, block: usize) {
        self.top_k = top_k;
        self.cursor.clear();
        self.cursor.resize(num_experts, 0);
        for &id in ids {
            self.cursor[id as usize] += 1;
        }
        self.groups.clear();
        let (mut start, mut first_row) = (0, 0);
        for (expert, cursor) in self.cursor.iter_mut().enumerate() {
            let end = start + std::mem::replace(cursor, start as u32) as usize;
            for first in (start..end).step_by(GROUP_ROWS) {
                let pairs = first..end.min(first + GROUP_ROWS);
                let rows = pairs.len().next_multiple_of(block);
                self.groups.push(Group { expert, pairs, first_row });
                first_row += rows;
            }
            start = end;
        }
        self.pairs.resize(ids.len(), 0);
        for (pair, &id) in ids.iter().enumerate() {
            let cursor = &mut self.cursor[id as usize];
            self.pairs[*cursor as usize] = pair as u32;
            *cursor += 1;
        }
    }

    /// Rows of the buffer between the products.
    pub(crate) fn rows(&self, block: usize) -> usize {
        self.groups.last().map_or(0, |group| group.first_row + group.pairs.len().next_multiple_of(block))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_sorted_by_expert_and_groups_begin_at_blocks() {
        let mut plan = ExpertPlan::new();
        // 200 rows of two experts each: 0 and 2 alternately, and always 3.
        let ids: Vec<u32> = (0..200).flat_map(|row| [row % 2 * 2, 3]).collect();
        plan.group(&ids, 2, 5, 16);
        let seen: Vec<(usize, usize, usize)> =
            plan.groups.iter().map(|group| (group.expert, group.pairs.len(), group.first_row)).collect();
        assert_eq!(seen, [(0, 100, 0), (2, 100, 112), (3, 128, 224), (3, 72, 352)]);
        assert_eq!(plan.rows(16), 432);
        let expert_of: Vec<u32> = plan.pairs.iter().map(|&pair| ids[pair as usize]).collect();
        assert!(expert_of.is_sorted());
        for group in &plan.groups {
            assert!(plan.pairs[group.pairs.clone()].is_sorted());
        }
    }
}
