//! Activations as a product reads them.

use std::cell::Cell;

use crate::buffer::Shared;
use crate::form::Form;
use crate::norm::TASK_ELEMENTS;
use crate::packed::CHUNK;
use crate::pool;
use crate::scratch::Scratch;
use crate::simd::kind::{Kind, put_row};
use crate::simd::{Body, Lanes};

thread_local! {
    static SCRATCH: Cell<Scratch> = const { Cell::new(Scratch::new()) };
}

/// Activations of some rows of `depth` inputs, in whole blocks.
pub(crate) fn acts_len<K: Kind>(rows: usize, depth: usize) -> usize {
    rows.next_multiple_of(K::BLOCK) * depth
}

/// Calls `body` with `x` `[n, width]` as activations of this kind, in blocks of `block` rows: products read blocks of
/// `K::BLOCK`, who picks rows wants blocks of one.
pub(crate) fn with_acts<K: Kind, R>(
    form: Form,
    x: &[f32],
    width: usize,
    block: usize,
    body: impl FnOnce(&[K::Act]) -> R,
) -> R {
    let n = x.len() / width.max(1);
    let depth = width.next_multiple_of(CHUNK);
    if let Some(acts) = K::as_they_are(x).filter(|_| depth == width && block == 1) {
        return body(acts);
    }
    // The buffer is taken out while in use: a nested call gets one of its own.
    let mut scratch = SCRATCH.take();
    let acts = scratch.take::<K::Act>(n.next_multiple_of(block) * depth);
    let len = acts.len();
    let shared = Shared::new(acts);
    let rows = TASK_ELEMENTS.div_ceil(width.max(1)).next_multiple_of(block);
    pool::run(n.div_ceil(rows), &|task| {
        let range = task * rows..((task + 1) * rows).min(n);
        // SAFETY: each task has whole blocks of its own.
        let acts = unsafe { shared.slice(range.start * depth, range.len().next_multiple_of(block) * depth) };
        K::dispatch(form, PutRows::<K> { x: &x[range.start * width..range.end * width], width, block, acts });
    });
    let result = body(&acts[..len]);
    SCRATCH.set(scratch);
    result
}

struct PutRows<'a, K: Kind> {
    /// `[rows, width]`
    x: &'a [f32],
    width: usize,
    block: usize,
    acts: &'a mut [K::Act],
}

impl<K: Kind> Body for PutRows<'_, K> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let blocks = (self.block, self.width.next_multiple_of(CHUNK));
        for (row, x) in self.x.chunks_exact(self.width).enumerate() {
            // SAFETY: the row has `width` elements, and its block is there.
            unsafe { put_row::<L, K>(x.as_ptr(), self.width, blocks, self.acts.as_mut_ptr(), row, 0) };
        }
    }
}
