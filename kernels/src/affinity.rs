//! Threads on processors of their own.

/// Keeps this thread on the `index`-th (modulo their number) of the processors that the process may use. Where the system
/// has no such call, or refuses, nothing happens.
#[cfg(target_os = "linux")]
pub(crate) fn pin(index: usize) {
    use std::sync::OnceLock;

    /// Asked before any thread is pinned: threads inherit the set of the one that starts them.
    static ALLOWED: OnceLock<Vec<usize>> = OnceLock::new();
    /// Sizes in `u64`: 4096 processors, the most that Linux is built for.
    type Set = [u64; 64];

    let allowed = ALLOWED.get_or_init(|| {
        let mut set: Set = [0; 64];
        // SAFETY: the set has the size given; zero is the calling thread.
        let got = unsafe { libc::sched_getaffinity(0, size_of::<Set>(), set.as_mut_ptr().cast()) };
        (0..64 * set.len()).filter(|&cpu| got == 0 && set[cpu / 64] >> (cpu % 64) & 1 == 1).collect()
    });
    let Some(&cpu) = allowed.get(index % allowed.len().max(1)) else { return };
    let mut set: Set = [0; 64];
    set[cpu / 64] = 1 << (cpu % 64);
    // SAFETY: as above.
    unsafe { libc::sched_setaffinity(0, size_of::<Set>(), set.as_ptr().cast()) };
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn pin(_: usize) {}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_pinned_thread_stays() {
        let pinned = || {
            pin(1);
            let mut seen = std::collections::BTreeSet::new();
            for _ in 0..100 {
                // SAFETY: the call has no argument.
                seen.insert(unsafe { libc::sched_getcpu() });
                std::thread::yield_now();
            }
            seen.len()
        };
        assert_eq!(std::thread::spawn(pinned).join().unwrap(), 1);
    }
}
