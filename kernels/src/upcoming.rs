//! What is read after the job that runs: threads that have to wait fetch their share of it meanwhile, as memory would have
//! nothing to do until the next job begins. (One sequence decodes 1 to 2 % faster.)

use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

const LINE: usize = 64;

/// Lines asked for in one go, between two looks for the next job.
const LINES: usize = 4;

/// Bytes a thread fetches at most: they stay in its second-level cache beside what it works on.
const MOST: usize = 256 << 10;

/// Where what is read next lies, the same for every thread of a pool. The two numbers are not read together: a wrong line
/// that is asked for does no harm.
#[derive(Default)]
pub(crate) struct Upcoming {
    start: AtomicPtr<u8>,
    len: AtomicUsize,
}

/// Bytes that may be gone by the time they are asked for: an address is enough.
#[derive(Clone, Copy)]
pub(crate) struct NextRead {
    start: *const u8,
    len: usize,
}

impl NextRead {
    pub(crate) fn of(bytes: &[u8]) -> NextRead {
        NextRead { start: bytes.as_ptr(), len: bytes.len() }
    }
}

/// A thread's share of it.
pub(crate) struct Share {
    next: *const u8,
    end: *const u8,
}

impl Upcoming {
    /// Gives back what was there.
    pub(crate) fn replace(&self, NextRead { start, len }: NextRead) -> NextRead {
        let start = self.start.swap(start.cast_mut(), Ordering::Relaxed).cast_const();
        NextRead { start, len: self.len.swap(len, Ordering::Relaxed) }
    }

    /// What the thread at a place begins with, where tasks lie in the order of memory.
    pub(crate) fn share(&self, place: usize, threads: usize) -> Share {
        let (start, len) = (self.start.load(Ordering::Relaxed).cast_const(), self.len.load(Ordering::Relaxed));
        let next = start.wrapping_add(len / threads * place);
        Share { next, end: next.wrapping_add((len / threads).min(MOST)) }
    }
}

impl Share {
    /// Asks for some lines more, if any are left.
    #[inline]
    pub(crate) fn ask(&mut self) {
        if self.next < self.end {
            for line in 0..LINES {
                prefetch(self.next.wrapping_add(line * LINE));
            }
            self.next = self.next.wrapping_add(LINES * LINE);
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn prefetch(at: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    // SAFETY: a prefetch may name any address.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
}

#[cfg(not(target_arch = "x86_64"))]
fn prefetch(_: *const u8) {}
