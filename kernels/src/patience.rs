//! How long a thread that waits for another keeps its processor.
//!
//! To sleep and be woken takes tens of microseconds under a hypervisor, and a decode step has a hundred jobs: where
//! nobody else wants the processors, a thread looks on for a while. Where others do, every moment of that is theirs: a
//! processor left at once is given to the thread that is waited for.

use std::cell::Cell;
use std::ffi::c_long;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long to look where others want the processors.
const SHORT: Duration = Duration::from_micros(20);
/// How long where nobody does. On two processors of a virtual machine one sequence decodes 5 to 10 % faster with this
/// than with 20 µs; beside a busy process, a quarter slower.
const LONG: Duration = Duration::from_micros(200);
/// For how long others are expected after they were seen.
const CROWDED: Duration = Duration::from_millis(50);
/// How often a thread looks for others.
const EVERY: Duration = Duration::from_millis(1);
/// How long a thread is off its processor within [`EVERY`] when others want it: their turns take milliseconds. Those that
/// only handle a token and sleep again take far less.
const TURN: Duration = Duration::from_micros(300);

thread_local! {
    /// What this thread knew when it last looked for others.
    static SEEN: Cell<Option<Usage>> = const { Cell::new(None) };
}

/// What a thread has had of its processor.
#[derive(Clone, Copy)]
struct Usage {
    now: Instant,
    on_processor: Duration,
    /// How often it went to sleep by itself.
    slept: c_long,
}

/// What the threads of a pool know of others on their processors.
pub(crate) struct Patience {
    start: Instant,
    /// Until when others are expected, in nanoseconds from `start`.
    crowded_until: AtomicU64,
}

impl Patience {
    pub(crate) fn new() -> Patience {
        Patience { start: Instant::now(), crowded_until: AtomicU64::new(0) }
    }

    /// Looks until there is something, or patience is at an end.
    pub(crate) fn spin<T>(&self, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        let start = Instant::now();
        let mut limit = SHORT;
        loop {
            for _ in 0..32 {
                if let Some(found) = look() {
                    return Some(found);
                }
                std::hint::spin_loop();
            }
            if start.elapsed() >= limit {
                if limit == LONG || self.is_crowded() {
                    return None;
                }
                limit = LONG;
            }
        }
    }

    /// Tells the others where this thread was off its processor for long since it last looked, and not of its own will.
    pub(crate) fn notice(&self) {
        let (now, seen) = (Instant::now(), SEEN.get());
        if seen.is_some_and(|seen| now - seen.now < EVERY) {
            return;
        }
        let usage = usage(now);
        SEEN.set(Some(usage));
        let Some(seen) = seen.filter(|seen| seen.slept == usage.slept) else { return };
        let elapsed = now - seen.now;
        let off = elapsed.saturating_sub(usage.on_processor.saturating_sub(seen.on_processor));
        if off > TURN.max(elapsed / 8) {
            self.crowded_until.store(nanos(now + CROWDED - self.start), Ordering::Relaxed);
        }
    }

    fn is_crowded(&self) -> bool {
        self.notice();
        nanos(self.start.elapsed()) < self.crowded_until.load(Ordering::Relaxed) || !CAN_TELL
    }
}

fn nanos(time: Duration) -> u64 {
    time.as_nanos() as u64
}

const CAN_TELL: bool = cfg!(target_os = "linux");

/// Of this thread.
#[cfg(target_os = "linux")]
fn usage(now: Instant) -> Usage {
    // SAFETY: all fields are numbers, for which zero is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is there to be written.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &mut usage) };
    let time = |time: libc::timeval| Duration::new(time.tv_sec as u64, 1000 * time.tv_usec as u32);
    Usage { now, on_processor: time(usage.ru_utime) + time(usage.ru_stime), slept: usage.ru_nvcsw }
}

#[cfg(not(target_os = "linux"))]
fn usage(now: Instant) -> Usage {
    Usage { now, on_processor: Duration::ZERO, slept: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_found_ends_the_wait_and_patience_does_too() {
        let patience = Patience::new();
        let mut looks = 0;
        let found = patience.spin(|| {
            looks += 1;
            (looks == 10).then_some("found")
        });
        assert_eq!((found, looks), (Some("found"), 10));
        let start = Instant::now();
        assert_eq!(patience.spin(|| None::<()>), None);
        assert!(start.elapsed() >= SHORT);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_thread_that_others_send_off_tells_it() {
        let patience = Patience::new();
        assert!(!patience.is_crowded());
        // More threads than processors for some turns of the system's scheduler: each is sent off.
        let count = 2 * std::thread::available_parallelism().map_or(1, |n| n.get());
        let end = Instant::now() + Duration::from_secs(20);
        let seen = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..count {
                scope.spawn(|| {
                    while !seen.load(Ordering::Relaxed) && Instant::now() < end {
                        if patience.is_crowded() {
                            seen.store(true, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        assert!(seen.into_inner(), "nobody was sent off in twenty seconds");
    }
}
