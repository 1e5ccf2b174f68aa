mod bucket;
mod draft;
mod layout;

use std::cmp::Reverse;

use bucket::most_splits;
pub use bucket::{ATTENTION_SPLIT, DecodeBucket, attention_splits};
use draft::Draft;
pub(crate) use layout::{padded_head, prefill_layout, tile_bytes};

use crate::attention::{AttentionShape, SeqSpan};
use crate::error::{KernelError, check_index, check_shape};
use crate::gpu::DeviceKv;
use crate::gpu::rows::int;
use crate::weights::WeightDtype;

const OP: &str = "paged_attention";

/// (Row, head) pairs of a warp.
const WARP_PAIRS: usize = 16;

/// A sequence with at most this many (row, head) pairs goes to the kernel that cuts contexts into splits.
const SPLIT_PAIRS: usize = 64;

/// Words of an item: `Item` in `kernels/cuda/attention.cuh`.
const ITEM_WORDS: usize = 8;

/// Marks entries that there is nothing to do for.
const NO_ITEM: u32 = u32::MAX;

/// Which blocks of threads attend what in one step: the same for all layers whose shapes agree (window included).
///
/// [`words`](Self::words) go to the device before the first layer.
#[derive(Clone, Debug)]
pub struct AttentionPlan {
    words: Vec<u32>,
    launches: AttentionLaunches,
    shape: PlannedShape,
}

/// All that the launches of a plan depend on: a recorded step can be launched again for plans of which it is equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AttentionLaunches {
    /// Rows of queries.
    pub(crate) rows: usize,
    pub(crate) words: usize,
    /// One row each, for the kernel without tensor cores. Items come first in the words.
    pub(crate) plain_items: usize,
    /// Items whose context is cut into splits.
    pub(crate) split_items: usize,
    /// (Item, split) pairs, behind the items.
    pub(crate) entries: usize,
    /// Largest number of (row, head) pairs of such an item.
    pub(crate) pairs: usize,
    /// Whether such an item may have several splits.
    pub(crate) combine: bool,
    /// Items that are attended over their whole context, behind the other items.
    pub(crate) whole_items: usize,
    /// Whether such a context has several splits.
    pub(crate) merge: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PlannedShape {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: Option<usize>,
    block_size: usize,
    dtype: WeightDtype,
}

impl PlannedShape {
    fn new(shape: &AttentionShape, kv: &DeviceKv) -> PlannedShape {
        PlannedShape {
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            window: shape.window,
            block_size: kv.block_size(),
            dtype: kv.dtype(),
        }
    }
}

impl AttentionPlan {
    /// The plan of a step with any rows, in ascending order. Rows that no sequence names are left alone.
    pub fn new(shape: &AttentionShape, kv: &DeviceKv, seqs: &[SeqSpan<'_>]) -> Result<AttentionPlan, KernelError> {
        check(shape, kv, seqs)?;
        let width = padded_head(shape, kv);
        let tensor_cores = width.is_some();
        let group = shape.group();
        let at_once = width.map_or(group, |width| prefill_layout(width).pairs);
        let (mut few, mut many) = (Vec::new(), Vec::new());
        for (index, seq) in seqs.iter().enumerate() {
            let pairs = seq.rows.len() * group;
            if !tensor_cores {
                few.extend((0..pairs).step_by(group).map(|pair| Draft::new(shape, seq, index, pair, group)));
            } else if pairs <= SPLIT_PAIRS.max(group) {
                few.extend((0..pairs).step_by(WARP_PAIRS).map(|pair| Draft::new(shape, seq, index, pair, WARP_PAIRS)));
            } else {
                many.extend((0..pairs).step_by(at_once).map(|pair| Draft::new(shape, seq, index, pair, at_once)));
            }
        }
        // Long ones first, so that the last to run are short.
        many.sort_by_key(|draft| Reverse(draft.keys(shape, at_once)));
        let entries = if tensor_cores { few.iter().map(|draft| draft.splits).sum() } else { 0 };
        let tables: Vec<&[u32]> = seqs.iter().map(|seq| used_table(seq, kv.block_size())).collect();
        let rows = seqs.iter().map(|seq| seq.rows.end).max().unwrap_or(0);
        let launches = AttentionLaunches {
            rows,
            words: 0,
            plain_items: if tensor_cores { 0 } else { few.len() },
            split_items: if tensor_cores { few.len() } else { 0 },
            entries,
            pairs: seqs.iter().map(|seq| seq.rows.len() * group).max().unwrap_or(0).min(WARP_PAIRS),
            combine: tensor_cores && few.iter().any(|draft| draft.splits > 1),
            whole_items: many.len(),
            merge: many.iter().any(|draft| draft.splits > 1),
        };
        let mut at = 0;
        let places: Vec<usize> = tables
            .iter()
            .map(|table| {
                at += table.len();
                at - table.len()
            })
            .collect();
        few.extend(many);
        Ok(Self::build(shape, kv, launches, &few, &tables, &places))
    }

    /// The plan of a step in which sequence `i` has row `i` alone: its launches and the layout of its words depend on
    /// the shape and the bucket. Padded rows get zeros.
    pub fn decode(
        shape: &AttentionShape,
        kv: &DeviceKv,
        seqs: &[SeqSpan<'_>],
        bucket: &DecodeBucket,
    ) -> Result<AttentionPlan, KernelError> {
        check(shape, kv, seqs)?;
        check_index(OP, "sequences", seqs.len(), bucket.seqs + 1)?;
        for (index, seq) in seqs.iter().enumerate() {
            check_shape(OP, "rows of a sequence", &[seq.rows.start, seq.rows.end], &[index, index + 1])?;
            check_index(OP, "position", seq.first_position as usize, bucket.context)?;
        }
        let tensor_cores = padded_head(shape, kv).is_some();
        let group = shape.group();
        let at_once = if tensor_cores { WARP_PAIRS } else { group };
        let mut drafts = Vec::new();
        for (index, seq) in seqs.iter().enumerate() {
            drafts.extend((0..group).step_by(at_once).map(|pair| Draft::new(shape, seq, index, pair, at_once)));
        }
        for index in seqs.len()..bucket.seqs {
            let padding = |first_pair| Draft {
                first_row: index,
                rows: 0,
                first_position: 0,
                seq: 0,
                first_pair,
                first_split: 0,
                splits: 1,
            };
            drafts.extend((0..group).step_by(at_once).map(padding));
        }
        let tiles = group.div_ceil(at_once);
        let splits: usize = drafts.iter().map(|draft| draft.splits).sum::<usize>() / tiles.max(1);
        check_index(OP, "splits of all sequences", splits, bucket.splits + 1)?;
        let items = drafts.len();
        let launches = AttentionLaunches {
            rows: bucket.seqs,
            words: 0,
            plain_items: if tensor_cores { 0 } else { items },
            split_items: if tensor_cores { items } else { 0 },
            entries: if tensor_cores { bucket.splits * tiles } else { 0 },
            pairs: group.min(WARP_PAIRS),
            combine: tensor_cores && most_splits(shape, bucket.context) > 1,
            whole_items: 0,
            merge: false,
        };
        let room = bucket.context.div_ceil(kv.block_size());
        let tables: Vec<&[u32]> = seqs.iter().map(|seq| used_table(seq, kv.block_size())).collect();
        let places: Vec<usize> = (0..seqs.len()).map(|index| index * room).collect();
        let mut plan = Self::build(shape, kv, launches, &drafts, &tables, &places);
        let words = items * ITEM_WORDS + 2 * launches.entries + bucket.seqs * room;
        plan.words.resize(words, 0);
        plan.launches.words = words;
        Ok(plan)
    }

    fn build(
        shape: &AttentionShape,
        kv: &DeviceKv,
        mut launches: AttentionLaunches,
        drafts: &[Draft],
        tables: &[&[u32]],
        places: &[usize],
    ) -> AttentionPlan {
        let (split_items, entries) = (launches.split_items, launches.entries);
        let tables_at = drafts.len() * ITEM_WORDS + 2 * entries;
        let mut words = Vec::with_capacity(tables_at + tables.iter().map(|table| table.len()).sum::<usize>());
        let mut first_partial = 0;
        for (index, draft) in drafts.iter().enumerate() {
            let table = tables_at + places.get(draft.seq).copied().unwrap_or(0);
            let item: [usize; ITEM_WORDS] = [
                draft.first_row,
                draft.rows,
                draft.first_position,
                table,
                draft.first_pair,
                first_partial,
                draft.first_split,
                draft.splits,
            ];
            words.extend(item.map(int));
            first_partial += if index < split_items { draft.splits } else { 0 };
        }
        for (index, draft) in drafts[..split_items].iter().enumerate() {
            words.extend((0..draft.splits).flat_map(|split| [int(index), int(draft.first_split + split)]));
        }
        words.resize(tables_at, NO_ITEM);
        for (table, place) in tables.iter().zip(places) {
            words.resize(tables_at + place, 0);
            words.extend_from_slice(table);
        }
        launches.words = words.len();
        AttentionPlan { words, launches, shape: PlannedShape::new(shape, kv) }
    }

    /// What the device reads.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// What the launches depend on.
    pub fn launches(&self) -> AttentionLaunches {
        self.launches
    }

    /// Fails unless the plan was made for a layer like this.
    pub(crate) fn check(&self, shape: &AttentionShape, kv: &DeviceKv) -> Result<(), KernelError> {
        let planned = self.shape;
        let now = PlannedShape::new(shape, kv);
        let sizes = |shape: PlannedShape| {
            [shape.heads, shape.kv_heads, shape.head_dim, shape.block_size, shape.window.unwrap_or(usize::MAX)]
        };
        check_shape(OP, "planned shape", &sizes(planned), &sizes(now))?;
        check_shape(OP, "bytes of a planned element", &[planned.dtype.bytes()], &[now.dtype.bytes()])
    }
}

/// The blocks that hold a sequence up to its last row.
fn used_table<'a>(seq: &SeqSpan<'a>, block_size: usize) -> &'a [u32] {
    match seq.rows.len() {
        0 => &[],
        len => &seq.block_table[..(seq.first_position as usize + len).div_ceil(block_size)],
    }
}

fn check(shape: &AttentionShape, kv: &DeviceKv, seqs: &[SeqSpan<'_>]) -> Result<(), KernelError> {
    shape.check_heads(OP, kv)?;
    // The kernels count rows of head_dim elements in 32 bits.
    check_index(OP, "rows of the cache", kv.num_blocks() * kv.block_size() * shape.kv_heads, u32::MAX as usize)?;
    let mut next_row = 0;
    for seq in seqs {
        check_index(OP, "previous span's end", next_row, seq.rows.start + 1)?;
        if seq.rows.is_empty() {
            continue;
        }
        next_row = seq.rows.end;
        let end = seq.first_position as usize + seq.rows.len();
        check_index(OP, "position", end - 1, i32::MAX as usize)?;
        check_index(OP, "last block", (end - 1) / kv.block_size(), seq.block_table.len())?;
        for &block in used_table(seq, kv.block_size()) {
            check_index(OP, "block", block as usize, kv.num_blocks())?;
        }
    }
    Ok(())
}
