//! What the allocator does with memory that is freed.

/// Keeps freed memory in the process, where the allocator is glibc's.
///
/// A step frees activations of megabytes and soon takes as many again. By default glibc gives them back to the system,
/// which then zeroes every page anew: 8 % of a prefill of 512 tokens. Weights are mapped, and unmapped, apart from this.
pub(crate) fn keep_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// The largest that glibc takes; larger blocks are still mapped one by one.
        const MAPPED_FROM: libc::c_int = 32 << 20;
        // SAFETY: only numbers are passed. A refusal leaves the defaults, which are slower, not wrong.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_FROM);
            libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
        }
    }
}
