use memmap2::MmapMut;

const HUGE_PAGE: usize = 2 << 20;

/// Zeroed memory with a stable address: 64-byte aligned, on huge pages where it is large.
///
/// It is an anonymous mapping, so pages that are never touched cost nothing.
pub(crate) struct Buffer {
    map: MmapMut,
    offset: usize,
    len: usize,
}

impl Buffer {
    pub(crate) fn zeroed(len: usize) -> Buffer {
        // A whole huge page of slack lets a large buffer start on a huge-page boundary.
        let slack = if len >= 2 * HUGE_PAGE { HUGE_PAGE } else { 0 };
        let map = MmapMut::map_anon((len + slack).max(1))
            .expect("an anonymous mapping fails only when the machine is out of memory");
        let address = map.as_ptr() as usize;
        let offset = if slack > 0 { address.next_multiple_of(HUGE_PAGE) - address } else { 0 };
        #[cfg(target_os = "linux")]
        if slack > 0 {
            // Only a hint: without huge pages the kernels are slower, not wrong.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        Buffer { map, offset, len }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map[self.offset..self.offset + self.len]
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.map[self.offset..self.offset + self.len]
    }
}

/// Element types whose every bit pattern is a value, so that bytes may be read as them.
///
/// # Safety
/// The type has no padding, no invalid bit pattern, and an alignment of at most 64.
pub(crate) unsafe trait Plain: Copy + Send + Sync + 'static {}

// SAFETY: plain numbers.
unsafe impl Plain for u8 {}
// SAFETY: plain numbers.
unsafe impl Plain for u16 {}
// SAFETY: plain numbers.
unsafe impl Plain for f32 {}

/// The aligned bytes of a [`Buffer`] as elements.
pub(crate) fn elements<T: Plain>(bytes: &[u8]) -> &[T] {
    // SAFETY: `Plain` types take any bits.
    let (head, elements, _tail) = unsafe { bytes.align_to::<T>() };
    assert!(head.is_empty(), "kernel buffers are 64-byte aligned");
    elements
}

/// As [`elements`], writable.
pub(crate) fn elements_mut<T: Plain>(bytes: &mut [u8]) -> &mut [T] {
    // SAFETY: `Plain` types take any bits, and any value of theirs is valid bytes.
    let (head, elements, _tail) = unsafe { bytes.align_to_mut::<T>() };
    assert!(head.is_empty(), "kernel buffers are 64-byte aligned");
    elements
}

/// A pointer that several pool tasks write through, each to its own disjoint part.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(*mut T);

// SAFETY: the pointer is only dereferenced in `slice`, whose contract rules out overlap.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(slice: &mut [T]) -> Shared<T> {
        Shared(slice.as_mut_ptr())
    }

    /// Where element `start` lies.
    ///
    /// # Safety
    /// It lies inside the slice or one past its end; what is written through it keeps to the contract of
    /// [`Shared::slice`].
    pub(crate) unsafe fn at(self, start: usize) -> *mut T {
        // SAFETY: the caller's contract.
        unsafe { self.0.add(start) }
    }

    /// Part `start..start + len` of the slice this came from.
    ///
    /// # Safety
    /// The part lies inside the slice, the slice is still borrowed by the caller of the pool, and no two live parts
    /// overlap.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn slice<'a>(self, start: usize, len: usize) -> &'a mut [T] {
        // SAFETY: the caller's contract.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zeroed_and_aligned_whatever_their_size() {
        for len in [0, 1, 63, 4096, 5 << 20] {
            let mut buffer = Buffer::zeroed(len);
            assert_eq!(buffer.len(), len);
            assert!(buffer.bytes().iter().all(|&byte| byte == 0));
            assert_eq!(buffer.bytes().as_ptr() as usize % 64, 0);
            buffer.bytes_mut().fill(7);
            assert!(buffer.bytes().iter().all(|&byte| byte == 7));
        }
    }
}
