//! Asking for weights before they are multiplied.
//!
//! While rows are multiplied by a panel that is in the cache already, memory would have nothing to do. And some
//! processors foresee a panel only after its first lines, and not beyond it; see [`follows`].

use super::Lanes;
use super::kind::Kind;
use crate::form::is_intel;

/// Bytes that are asked for little by little: a share with every chunk of inputs that is multiplied.
pub(crate) struct Ahead {
    next: *const u8,
    end: *const u8,
    /// Lines of a share.
    share: usize,
    /// What is asked for after the end, if that is elsewhere.
    then: *const u8,
}

const LINE: usize = 64;

impl Ahead {
    /// How far ahead of its use a panel is asked for, in bytes: of the distances tried from 512 B to 16 KiB the fastest
    /// with all threads reading.
    const CLOSE: usize = 4096;

    /// The weights that are about to be read, just ahead of the reading; `then` are those read after them.
    fn close<K: Kind>(weights: &[K::Weight], then: Option<&[K::Weight]>) -> Ahead {
        let bytes = weights.as_ptr_range();
        let then = then.map_or(bytes.end, |then| then.as_ptr()).cast();
        let next = bytes.start.cast::<u8>().wrapping_add(Ahead::CLOSE);
        Ahead { next, end: bytes.end.cast(), share: chunk_bytes::<K>().div_ceil(LINE), then }
    }

    /// Weights that are read next, in equal shares while `rows` rows are multiplied by as many others.
    fn spread<K: Kind>(weights: &[K::Weight], rows: usize) -> Ahead {
        let bytes = weights.as_ptr_range();
        let share = chunk_bytes::<K>().div_ceil(LINE * K::passes(rows));
        Ahead { next: bytes.start.cast(), end: bytes.end.cast(), share, then: std::ptr::null() }
    }

    pub(crate) fn nothing() -> Ahead {
        let never = std::ptr::without_provenance(usize::MAX);
        Ahead { next: std::ptr::null(), end: never, share: 0, then: std::ptr::null() }
    }

    /// Asks for one of `PARTS` parts of a share: only so many lines can be on their way at once.
    ///
    /// # Safety
    /// As the methods of [`Lanes`].
    #[inline(always)]
    pub(crate) unsafe fn ask<L: Lanes, const PARTS: usize>(&mut self) {
        // As many lines every time, so that the processor foresees the loop's end; the last ones may lie beyond the end.
        for _ in 0..self.share.div_ceil(PARTS) {
            // SAFETY: a prefetch may name any address.
            unsafe { L::prefetch(self.next) };
            self.next = self.next.wrapping_add(LINE);
        }
        if self.next >= self.end {
            self.turn();
        }
    }

    /// At the end: on to what is asked for after it, or nothing more. Not a call: sums would leave their registers.
    #[inline(always)]
    fn turn(&mut self) {
        match std::mem::replace(&mut self.then, std::ptr::null()) {
            then if then.is_null() => *self = Ahead::nothing(),
            then => (self.next, self.end) = (then, then.wrapping_add(Ahead::CLOSE)),
        }
    }
}

/// Whether the processor keeps memory busy by itself while it goes through a panel once. To ask for the same lines then
/// only costs: on Zen 4 a tenth of the bandwidth of one row; on Sapphire Rapids asking gives a fifth.
fn follows() -> bool {
    !is_intel()
}

fn chunk_bytes<K: Kind>() -> usize {
    K::CHUNK_LEN * size_of::<K::Weight>()
}

/// What is asked for in a walk over stretches of weights, all of one length, each multiplied by some rows.
pub(crate) struct Walk {
    /// For the first rows of a stretch that nobody asked for.
    close: Ahead,
    /// For all others.
    next: Ahead,
    /// Whether the stretch was asked for during the one before, or needs no asking.
    asked: bool,
    next_asked: bool,
}

impl Walk {
    pub(crate) fn new() -> Walk {
        Walk { close: Ahead::nothing(), next: Ahead::nothing(), asked: false, next_asked: false }
    }

    /// Begins a stretch that `rows` rows are multiplied by; `next` is the one after it.
    pub(crate) fn begin<K: Kind>(&mut self, stretch: &[K::Weight], next: Option<&[K::Weight]>, rows: usize) {
        let follows = follows();
        self.asked = self.next_asked || follows;
        self.close = Ahead::close::<K>(stretch, next);
        let spare = if self.asked { rows } else { rows.saturating_sub(K::ROWS) };
        let next = next.filter(|_| spare > if follows { K::ROWS } else { 0 });
        self.next_asked = next.is_some();
        self.next = next.map_or(Ahead::nothing(), |next| Ahead::spread::<K>(next, spare));
    }

    /// What to ask for during the rows from `first` on.
    pub(crate) fn ahead(&mut self, first: usize) -> &mut Ahead {
        if first == 0 && !self.asked { &mut self.close } else { &mut self.next }
    }
}
