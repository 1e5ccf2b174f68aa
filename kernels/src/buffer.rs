use std::sync::{Arc, Mutex, PoisonError};

use memmap2::MmapMut;

const HUGE_PAGE: usize = 2 << 20;
const PAGE: usize = 4 << 10;

/// Bytes of a region that buffers share.
const SHARED_REGION: usize = 64 << 20;

/// A buffer this large has a region to itself.
const ALONE: usize = 16 << 20;

/// Where the next small buffers go, and how much of it is taken.
static OPEN: Mutex<Option<(Arc<Region>, usize)>> = Mutex::new(None);

/// Zeroed memory with a stable address: 64-byte aligned, on huge pages.
///
/// Pages that are never touched cost nothing. Small buffers lie in one region behind each other: a matrix of three
/// megabytes on pages of its own would have one huge page at best, and on small ones is read at half the speed.
pub(crate) struct Buffer {
    region: Arc<Region>,
    offset: usize,
    len: usize,
}

/// An anonymous mapping, freed with the last buffer in it.
struct Region {
    start: *mut u8,
    len: usize,
    _map: MmapMut,
}

// SAFETY: the bytes are only reached through buffers, of which no two overlap.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    fn new(len: usize) -> Region {
        // A whole huge page of slack lets the region start on a huge-page boundary.
        let mut map = MmapMut::map_anon(len + HUGE_PAGE)
            .expect("an anonymous mapping fails only when the machine is out of memory");
        let address = map.as_ptr() as usize;
        let offset = address.next_multiple_of(HUGE_PAGE) - address;
        #[cfg(target_os = "linux")]
        {
            // Only a hint: without huge pages the kernels are slower, not wrong.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        Region { start: map[offset..].as_mut_ptr(), len, _map: map }
    }
}

impl Buffer {
    pub(crate) fn zeroed(len: usize) -> Buffer {
        if len >= ALONE {
            return Buffer { region: Arc::new(Region::new(len)), offset: 0, len };
        }
        // Memory is handed out once, so nobody has written to it yet.
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        let (region, taken) = match open.take() {
            Some((region, taken)) if len <= region.len - taken => (region, taken),
            _ => (Arc::new(Region::new(SHARED_REGION)), 0),
        };
        let end = (taken + len).next_multiple_of(if len < PAGE { 64 } else { PAGE });
        *open = Some((region.clone(), end.min(region.len)));
        Buffer { region, offset: taken, len }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the part lies inside the region, and only this buffer reaches it.
        unsafe { std::slice::from_raw_parts(self.region.start.add(self.offset), self.len) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.region.start.add(self.offset), self.len) }
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
unsafe impl Plain for u32 {}
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
        for len in [0, 1, 63, 4096, 5 << 20, 20 << 20] {
            let mut buffer = Buffer::zeroed(len);
            assert_eq!(buffer.len(), len);
            assert!(buffer.bytes().iter().all(|&byte| byte == 0));
            assert_eq!(buffer.bytes().as_ptr() as usize % 64, 0);
            buffer.bytes_mut().fill(7);
            assert!(buffer.bytes().iter().all(|&byte| byte == 7));
        }
    }

    #[test]
    fn buffers_do_not_overlap_and_outlive_each_other() {
        let lens = [1, 63, 64, 65, 5000, 3 << 20, 15 << 20, 17 << 20, 15 << 20, 15 << 20, 15 << 20, 15 << 20, 7];
        let mut buffers: Vec<Buffer> = lens.into_iter().map(Buffer::zeroed).collect();
        for (i, buffer) in buffers.iter_mut().enumerate() {
            assert!(buffer.bytes().iter().all(|&byte| byte == 0));
            buffer.bytes_mut().fill(i as u8 + 1);
        }
        for i in (0..lens.len()).step_by(2).rev() {
            buffers.swap_remove(i);
        }
        for buffer in &buffers {
            let i = lens.len().min(buffer.bytes()[0] as usize) - 1;
            assert_eq!(buffer.len(), lens[i]);
            assert!(buffer.bytes().iter().all(|&byte| usize::from(byte) == i + 1));
        }
    }
}
