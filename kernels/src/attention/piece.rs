use std::ops::Range;

use crate::attention::{AttentionCall, AttentionShape};
use crate::buffer::{Plain, Shared, elements};
use crate::packed::PANEL;
use crate::pool;

/// Key positions of a tile; tiles start at multiples of it, in every form.
pub(super) const TILE: usize = PANEL;

/// What one task computes: some consecutive rows of a sequence, and the query heads of one key and value head.
pub(super) struct Piece<'a, T: Plain> {
    /// `[n, heads * head_dim]`
    pub(super) q: &'a [f32],
    pub(super) shape: &'a AttentionShape,
    pub(super) rows: Range<usize>,
    /// Absolute position of the first row.
    pub(super) first_position: usize,
    pub(super) first_head: usize,
    pub(super) keys: Keys<'a, T>,
    /// As `q`; this piece alone writes its heads of its rows.
    pub(super) out: Shared<f32>,
}

/// The cached keys and values of one sequence and head.
pub(super) struct Keys<'a, T: Plain> {
    pub(super) k: &'a [T],
    pub(super) v: &'a [T],
    block_table: &'a [u32],
    block_size: usize,
    kv_heads: usize,
    head: usize,
    head_dim: usize,
}

/// Runs `task` for pieces of about `task_queries` queries (rows times heads of a group) on the pool.
pub(super) fn in_pieces<T: Plain>(
    call: &AttentionCall<'_>,
    q: &[f32],
    out: &mut [f32],
    task_queries: usize,
    task: impl Fn(Piece<'_, T>) + Sync,
) {
    let (shape, kv) = (call.shape, call.kv);
    let chunk = (task_queries / shape.group().max(1)).max(1);
    // The last rows of a sequence see the most keys: they come first, so that no thread starts them at the end.
    let chunks: Vec<(usize, usize)> = call
        .seqs
        .iter()
        .enumerate()
        .flat_map(|(seq, span)| (0..span.rows.len()).step_by(chunk).rev().map(move |first| (seq, first)))
        .collect();
    let shared = Shared::new(out);
    pool::run(chunks.len() * shape.kv_heads, &|index| {
        let ((seq, first), head) = (chunks[index / shape.kv_heads], index % shape.kv_heads);
        let seq = &call.seqs[seq];
        task(Piece {
            q,
            shape,
            rows: seq.rows.start + first..seq.rows.end.min(seq.rows.start + first + chunk),
            first_position: seq.first_position as usize + first,
            first_head: head * shape.group(),
            keys: Keys {
                k: elements(kv.k),
                v: elements(kv.v),
                block_table: seq.block_table,
                block_size: kv.block_size,
                kv_heads: shape.kv_heads,
                head,
                head_dim: shape.head_dim,
            },
            out: shared,
        });
    });
}

impl<T: Plain> Piece<'_, T> {
    /// Rows times heads of the group: query `i` is row `i / group`, head `i % group`.
    pub(super) fn queries(&self) -> usize {
        self.rows.len() * self.shape.group()
    }

    /// Absolute position of a query.
    #[inline(always)]
    pub(super) fn position(&self, query: usize) -> usize {
        self.first_position + query / self.shape.group()
    }

    /// Where a query starts in `q`, and its result in `out`.
    #[inline(always)]
    pub(super) fn start(&self, query: usize) -> usize {
        let (row, head) = (query / self.shape.group(), self.first_head + query % self.shape.group());
        (self.rows.start + row) * self.shape.q_width() + head * self.shape.head_dim
    }

    /// One past the last position that any row sees.
    pub(super) fn end(&self) -> usize {
        self.first_position + self.rows.len()
    }

    /// The first tile that any row sees.
    pub(super) fn first_tile(&self) -> usize {
        self.shape.first_visible(self.first_position) / TILE * TILE
    }
}

impl<T: Plain> Keys<'_, T> {
    /// Where the heads of the positions `tile..tile + 64` start; beyond `end` the last one stands again, as its lanes
    /// are masked.
    #[inline(always)]
    pub(super) fn starts(&self, tile: usize, end: usize) -> [usize; TILE] {
        let mut starts = [0; TILE];
        let (mut block, mut offset) = (usize::MAX, self.block_size - 1);
        for (i, start) in starts.iter_mut().enumerate() {
            if tile + i < end {
                offset += 1;
                if offset >= self.block_size {
                    let position = tile + i;
                    offset = position % self.block_size;
                    block = self.block_table[position / self.block_size] as usize;
                }
            } else if block == usize::MAX {
                // A tile that is not there: nothing of it is read.
                break;
            }
            *start = ((block * self.kv_heads + self.head) * self.block_size + offset) * self.head_dim;
        }
        starts
    }
}
