//! Which slots hold the rows of a span: decided, and trimmed, before anything is copied.

use moetrail_routes::TokenSpan;
use moetrail_sched::BlockRef;

/// Consecutive slots of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotRun {
    /// The block, as its owner knows it.
    pub block: BlockRef,
    /// First slot within the block.
    pub offset: usize,
    /// Number of slots.
    pub len: usize,
}

/// The slots of the positions of `span`, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatherPlan {
    span: TokenSpan,
    runs: Vec<SlotRun>,
}

impl GatherPlan {
    /// Plans the rows of `span` through a block table.
    ///
    /// Returns `None` if the table does not reach the span's end.
    pub fn new(span: TokenSpan, blocks: &[BlockRef], block_size: usize) -> Option<Self> {
        let mut runs = Vec::with_capacity(span.len() / block_size + 2);
        let mut position = span.start;
        while position < span.end {
            let block = *blocks.get(position / block_size)?;
            let offset = position % block_size;
            let len = (block_size - offset).min(span.end - position);
            runs.push(SlotRun { block, offset, len });
            position += len;
        }
        Some(Self { span, runs })
    }

    /// The positions covered.
    pub fn span(&self) -> TokenSpan {
        self.span
    }

    /// The slots, in the order of the positions.
    pub fn runs(&self) -> &[SlotRun] {
        &self.runs
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Slot by slot, the plan is the block table's arithmetic and nothing outside the span.
        #[test]
        fn covers_the_span_slot_by_slot(start in 0usize..40, len in 0usize..40, block_size in 1usize..9, ids in prop::collection::vec(0u32..100, 16)) {
            let span = TokenSpan::new(start, start + len);
            let blocks: Vec<BlockRef> = ids.iter().map(|id| BlockRef { id: *id, generation: id + 1 }).collect();
            let plan = GatherPlan::new(span, &blocks, block_size);
            prop_assert_eq!(plan.is_some(), len == 0 || span.end <= blocks.len() * block_size);
            if let Some(plan) = plan {
                let slots: Vec<_> = plan.runs().iter().flat_map(|run| (0..run.len).map(|i| (run.block, run.offset + i))).collect();
                let expect: Vec<_> = (span.start..span.end).map(|p| (blocks[p / block_size], p % block_size)).collect();
                prop_assert_eq!(slots, expect);
            }
        }
    }
}
