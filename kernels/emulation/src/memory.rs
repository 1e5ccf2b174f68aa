/// Device memory: NaN until it is written, with a page behind it that cannot be touched.
#[derive(Debug)]
pub(crate) struct Guarded {
    map: *mut libc::c_void,
    mapped: usize,
    address: u64,
    bytes: usize,
}

// SAFETY: it is plain memory with one owner.
unsafe impl Send for Guarded {}

const PAGE: usize = 4096;

impl Guarded {
    pub(crate) fn new(bytes: usize) -> Guarded {
        let room = bytes.next_multiple_of(PAGE);
        let mapped = room + PAGE;
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new anonymous mapping; the last page is inside it.
        let map = unsafe {
            let map = libc::mmap(std::ptr::null_mut(), mapped, access, kind, -1, 0);
            assert_ne!(map, libc::MAP_FAILED, "no {mapped} bytes for the emulation");
            assert_eq!(libc::mprotect(map.byte_add(room), PAGE, libc::PROT_NONE), 0);
            map.byte_add(room - bytes.next_multiple_of(16)).cast::<u8>().write_bytes(0xff, bytes);
            map
        };
        // As near to the guard as vector loads allow.
        Guarded { map, mapped, address: map as u64 + (room - bytes.next_multiple_of(16)) as u64, bytes }
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody uses it any more.
        unsafe { libc::munmap(self.map, self.mapped) };
    }
}
