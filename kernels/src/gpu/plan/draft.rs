use super::bucket::ATTENTION_SPLIT;
use super::layout::TILE;
use crate::attention::{AttentionShape, SeqSpan};

/// An item before its block table has a place.
pub(super) struct Draft {
    pub(super) first_row: usize,
    pub(super) rows: usize,
    pub(super) first_position: usize,
    pub(super) seq: usize,
    pub(super) first_pair: usize,
    pub(super) first_split: usize,
    pub(super) splits: usize,
}

impl Draft {
    /// `count` pairs of a sequence from `first_pair`.
    pub(super) fn new(
        shape: &AttentionShape,
        seq: &SeqSpan<'_>,
        index: usize,
        first_pair: usize,
        count: usize,
    ) -> Draft {
        let first_position = seq.first_position as usize;
        let [low, high] = positions(shape, seq.rows.len(), first_position, first_pair, count);
        let first_split = shape.first_visible(low) / ATTENTION_SPLIT;
        Draft {
            first_row: seq.rows.start,
            rows: seq.rows.len(),
            first_position,
            seq: index,
            first_pair,
            first_split,
            splits: high / ATTENTION_SPLIT - first_split + 1,
        }
    }

    /// Tiles of keys that its `count` pairs look into.
    pub(super) fn keys(&self, shape: &AttentionShape, count: usize) -> usize {
        let [low, high] = positions(shape, self.rows, self.first_position, self.first_pair, count);
        high / TILE - shape.first_visible(low) / TILE
    }
}

/// Positions of the first and the last of some pairs.
fn positions(
    shape: &AttentionShape,
    rows: usize,
    first_position: usize,
    first_pair: usize,
    count: usize,
) -> [usize; 2] {
    let group = shape.group();
    let end = (first_pair + count).min(rows * group);
    [first_position + first_pair / group, first_position + (end - 1) / group]
}
