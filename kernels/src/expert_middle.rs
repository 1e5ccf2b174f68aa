//! What lies between the two products of experts.

use std::marker::PhantomData;

use crate::form::Form;
use crate::packed::PANEL;
use crate::product::ByKind;
use crate::simd::kind::{Kind, put_row};
use crate::simd::{Body, Lanes};

/// How activations lie in the middle: as the second product wants them, which may be of another kind than the first.
#[derive(Clone, Copy)]
pub(crate) struct MiddleLayout {
    /// Rows that lie together.
    pub(crate) block: usize,
    pub(crate) act_bytes: usize,
    pub(crate) put: unsafe fn(Form, PutMiddle<'_>),
}

/// The layout that a kind wants.
pub(crate) struct Layout;

impl ByKind for Layout {
    type Output = MiddleLayout;

    fn run<K: Kind>(self) -> MiddleLayout {
        MiddleLayout { block: K::BLOCK, act_bytes: size_of::<K::Act>(), put: put_middle::<K> }
    }
}

/// Some rows of one panel on their way to the middle.
pub(crate) struct PutMiddle<'a> {
    pub(crate) rows: &'a [[f32; PANEL]],
    /// Lanes that are activations.
    pub(crate) width: usize,
    pub(crate) depth: usize,
    /// Row of the middle and chunk where the first lane of the first row goes; a block starts at `to`.
    pub(crate) first_row: usize,
    pub(crate) first_chunk: usize,
    pub(crate) to: *mut u8,
}

/// # Safety
/// The middle at `to` has the rows' whole blocks, and nobody else writes these chunks.
unsafe fn put_middle<K: Kind>(form: Form, put: PutMiddle<'_>) {
    K::dispatch(form, Put::<K>(put, PhantomData));
}

struct Put<'a, K>(PutMiddle<'a>, PhantomData<K>);

impl<K: Kind> Body for Put<'_, K> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let PutMiddle { rows, width, depth, first_row, first_chunk, to } = self.0;
        for (i, row) in rows.iter().enumerate() {
            // SAFETY: the contract of `put_middle`.
            unsafe { put_row::<L, K>(row.as_ptr(), width, (K::BLOCK, depth), to.cast(), first_row + i, first_chunk) };
        }
    }
}
