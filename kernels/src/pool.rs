//! One persistent thread pool for every kernel of the process.
//!
//! Each thread takes the tasks of a range of its own, one after the other, so that it walks through neighbouring memory,
//! and then those that other threads have not come to; the caller never waits for a worker that has not begun. Workers
//! spin for a while after a job, because the next kernel of a decode step follows within microseconds, then park: after
//! 20 µs where others want the processors, after 200 µs where nobody does.

use std::any::Any;
use std::cell::{RefCell, UnsafeCell};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{JoinHandle, Thread};

use crate::affinity;
use crate::patience::Patience;
use crate::upcoming::{NextRead, Upcoming};

static GLOBAL: OnceLock<Arc<Pool>> = OnceLock::new();
static CONFIGURED: AtomicUsize = AtomicUsize::new(0);
static PINNED: AtomicBool = AtomicBool::new(false);

thread_local! {
    static INSTALLED: RefCell<Option<Arc<Pool>>> = const { RefCell::new(None) };
}

/// Sets the number of threads (the caller included) before first use; false when the pool already runs.
pub fn configure(threads: usize) -> bool {
    CONFIGURED.store(threads, Ordering::SeqCst);
    GLOBAL.get().is_none()
}

/// Keeps every worker on a processor of its own, if called before first use; see [`pin_caller`].
pub fn pin_workers() {
    PINNED.store(true, Ordering::SeqCst);
}

/// Keeps this thread, which is to call [`run`], on the processor that the workers leave free, if they are pinned.
pub fn pin_caller() {
    if PINNED.load(Ordering::SeqCst) {
        affinity::pin(0);
    }
}

/// Number of threads that share a job, the caller included.
pub fn threads() -> usize {
    current().threads()
}

/// Runs `task(0..num_tasks)`, each index once, on the caller and the workers; returns when all are done.
///
/// A task's panic is raised again here once every thread has left the job.
pub fn run(num_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
    current().run(num_tasks, task);
}

/// Says what is read after the next job: threads that wait in it, or after it, fetch that meanwhile. Gives back what was
/// said before.
pub(crate) fn announce(next: NextRead) -> NextRead {
    current().shared.upcoming.replace(next)
}

fn current() -> Arc<Pool> {
    if let Some(pool) = INSTALLED.with_borrow(|installed| installed.clone()) {
        return pool;
    }
    let start = || {
        let configured = CONFIGURED.load(Ordering::SeqCst);
        let available = || std::thread::available_parallelism().map_or(1, |n| n.get());
        Pool::new(if configured > 0 { configured } else { available() })
    };
    GLOBAL.get_or_init(start).clone()
}

/// A set of worker threads; the process-wide one is behind [`run`], others serve tests and benches.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    /// `epoch << 17 | open << 16 | joined`: one word, so that joining a job that has just ended is impossible.
    state: AtomicU64,
    job: UnsafeCell<Job>,
    /// The next task of each thread's range, the caller's first.
    next: Vec<NextTask>,
    busy: AtomicBool,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    parked: Vec<AtomicBool>,
    /// The caller of the job, where it sleeps until the workers have left.
    caller: Mutex<Option<Thread>>,
    waiting: AtomicBool,
    patience: Patience,
    upcoming: Upcoming,
}

/// A counter with a cache line to itself (two, as the processor fetches them in pairs).
#[derive(Default)]
#[repr(align(128))]
struct NextTask(AtomicUsize);

#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize) + Sync + 'static),
    num_tasks: usize,
}

// SAFETY: `job` is written only while `busy` is held, the state is closed and nobody is joined; it is read only by
// threads that joined the open state published after that write.
unsafe impl Sync for Shared {}
// SAFETY: the pointer inside is only followed by threads joined to the job, while the caller of `run` keeps it alive.
unsafe impl Send for Shared {}

const OPEN: u64 = 1 << 16;
const JOINED: u64 = OPEN - 1;

impl Pool {
    /// Starts `threads - 1` workers; the caller of `run` is the remaining thread.
    pub fn new(threads: usize) -> Arc<Pool> {
        let count = threads.clamp(1, 1024) - 1;
        let pinned = PINNED.load(Ordering::SeqCst);
        fn nothing(_: usize) {}
        const NOTHING: &(dyn Fn(usize) + Sync) = &nothing;
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(Job { task: NOTHING, num_tasks: 0 }),
            next: (0..=count).map(|_| NextTask::default()).collect(),
            busy: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
            parked: (0..count).map(|_| AtomicBool::new(false)).collect(),
            caller: Mutex::new(None),
            waiting: AtomicBool::new(false),
            patience: Patience::new(),
            upcoming: Upcoming::default(),
        });
        // A machine that refuses a thread still serves, with the threads it did give.
        let workers = (0..count)
            .map_while(|index| {
                let shared = shared.clone();
                let name = format!("moetrail-kernel-{index}");
                let work = move || {
                    if pinned {
                        affinity::pin(index + 1);
                    }
                    shared.work(index);
                };
                std::thread::Builder::new().name(name).spawn(work).ok()
            })
            .collect();
        Arc::new(Pool { shared, workers })
    }

    /// Number of threads that share a job, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Makes this pool the current one of this thread while `body` runs.
    pub fn install<R>(self: &Arc<Self>, body: impl FnOnce() -> R) -> R {
        struct Restore(Option<Arc<Pool>>);
        impl Drop for Restore {
            fn drop(&mut self) {
                INSTALLED.set(self.0.take());
            }
        }
        let _restore = Restore(INSTALLED.replace(Some(self.clone())));
        body()
    }

    /// As the function [`run`], on this pool.
    pub fn run(&self, num_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        let alone = num_tasks <= 1 || self.workers.is_empty();
        // A second caller, or a task that calls again, does the work itself instead of waiting for its turn.
        if alone || shared.busy.swap(true, Ordering::Acquire) {
            (0..num_tasks).for_each(task);
            return;
        }
        // SAFETY: only the lifetime is erased; `task` outlives every use, as this function returns after the last
        // joined thread has left.
        let erased = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync + 'static)>(task)
        };
        // SAFETY: `busy` is ours, and the state is closed with nobody joined, so no other thread touches the cell.
        unsafe { *shared.job.get() = Job { task: erased, num_tasks } };
        for (place, next) in shared.next.iter().enumerate() {
            next.0.store(shared.range(place, num_tasks).start, Ordering::Relaxed);
        }
        let epoch = (shared.state.load(Ordering::Relaxed) >> 17) + 1;
        shared.state.store(epoch << 17 | OPEN, Ordering::SeqCst);
        self.wake(num_tasks - 1);

        shared.take_tasks(0, task, num_tasks);
        shared.state.fetch_and(!OPEN, Ordering::SeqCst);
        shared.wait_until_left();
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        shared.busy.store(false, Ordering::Release);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    fn wake(&self, wanted: usize) {
        for (worker, parked) in self.workers.iter().zip(&self.shared.parked).take(wanted) {
            if parked.load(Ordering::SeqCst) && parked.swap(false, Ordering::SeqCst) {
                let thread: &Thread = worker.thread();
                thread.unpark();
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker ends only by leaving its loop; task panics were caught, so there is nothing to report.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// The tasks that the thread at a place begins with.
    fn range(&self, place: usize, num_tasks: usize) -> Range<usize> {
        let threads = self.next.len();
        num_tasks * place / threads..num_tasks * (place + 1) / threads
    }

    /// Takes tasks of every range, one's own first, until none is left; a panic is kept for the caller and ends the job
    /// early.
    fn take_tasks(&self, place: usize, task: &(dyn Fn(usize) + Sync), num_tasks: usize) {
        let all = || {
            for place in (place..self.next.len()).chain(0..place) {
                let (next, end) = (&self.next[place].0, self.range(place, num_tasks).end);
                // Looking first leaves the line of a finished range where it is.
                while next.load(Ordering::Relaxed) < end {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index < end {
                        task(index);
                    }
                }
            }
        };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(all)) {
            self.next.iter().for_each(|next| next.0.store(num_tasks, Ordering::Relaxed));
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
    }

    /// Returns when no worker is joined any more.
    ///
    /// On a busy machine a joined worker may be off its core for milliseconds: the caller then sleeps until the worker
    /// that leaves last wakes it. (To yield in a loop instead would cost it its own share of the cores.)
    fn wait_until_left(&self) {
        let left = || self.state.load(Ordering::SeqCst) & JOINED == 0;
        self.patience.notice();
        let mut upcoming = self.upcoming.share(0, self.next.len());
        let look = || {
            upcoming.ask();
            left().then_some(())
        };
        if self.patience.spin(look).is_some() {
            return;
        }
        *self.caller.lock().unwrap_or_else(PoisonError::into_inner) = Some(std::thread::current());
        self.waiting.store(true, Ordering::SeqCst);
        while !left() {
            std::thread::park();
        }
        self.waiting.store(false, Ordering::SeqCst);
    }

    /// Leaves a job; the last one to leave a closed job wakes the caller if it sleeps.
    fn leave(&self) {
        self.patience.notice();
        let before = self.state.fetch_sub(1, Ordering::SeqCst);
        if before & (OPEN | JOINED) == 1 && self.waiting.load(Ordering::SeqCst) {
            let caller = self.caller.lock().unwrap_or_else(PoisonError::into_inner);
            caller.iter().for_each(Thread::unpark);
        }
    }

    fn work(&self, index: usize) {
        let mut seen = 0;
        while let Some(state) = self.next_job(index, seen) {
            if self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                continue;
            }
            seen = state >> 17;
            // SAFETY: joined to an open state, so the cell was written before and stays until we leave.
            let job = unsafe { *self.job.get() };
            // SAFETY: as above; the caller of `run` keeps the closure alive until nobody is joined.
            self.take_tasks(index + 1, unsafe { &*job.task }, job.num_tasks);
            self.leave();
        }
    }

    /// The open state of a job this worker has not seen; none when the pool stops.
    fn next_job(&self, index: usize, seen: u64) -> Option<u64> {
        loop {
            let mut upcoming = self.upcoming.share(index + 1, self.next.len());
            let open = || {
                upcoming.ask();
                Some(self.state.load(Ordering::Acquire)).filter(|state| state & OPEN != 0 && state >> 17 != seen)
            };
            if let Some(state) = self.patience.spin(open) {
                return Some(state);
            }
            self.parked[index].store(true, Ordering::SeqCst);
            let state = self.state.load(Ordering::SeqCst);
            let idle = state & OPEN == 0 || state >> 17 == seen;
            if self.stop.load(Ordering::SeqCst) {
                return None;
            }
            if idle {
                std::thread::park();
            }
            self.parked[index].store(false, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn count(pool: &Pool, tasks: usize) {
        let hits: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
        pool.run(tasks, &|index| {
            hits[index].fetch_add(1, Ordering::Relaxed);
        });
        assert!(hits.iter().all(|hit| hit.load(Ordering::Relaxed) == 1));
    }

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads);
            for round in 0..2000 {
                count(&pool, round % 17);
            }
        }
    }

    #[test]
    fn workers_wake_after_parking() {
        let pool = Pool::new(3);
        for _ in 0..20 {
            std::thread::sleep(Duration::from_micros(200));
            count(&pool, 5);
        }
    }

    #[test]
    fn the_caller_waits_for_a_slow_worker() {
        let pool = Pool::new(2);
        for round in 0..40 {
            let done = AtomicUsize::new(0);
            let caller = std::thread::current().id();
            pool.run(2, &|_| {
                // Whichever task a worker took ends long after the caller's spinning.
                let slow = std::thread::current().id() != caller;
                std::thread::sleep(Duration::from_micros(if slow { 500 + 100 * (round % 7) } else { 50 }));
                done.fetch_add(1, Ordering::SeqCst);
            });
            assert_eq!(done.load(Ordering::SeqCst), 2);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_still_works() {
        let pool = Pool::new(3);
        for bad in 0..8 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(8, &|index| assert!(index != bad, "task {index} failed"));
            }));
            let payload = result.expect_err("the panic must come through");
            assert_eq!(payload.downcast_ref::<String>().unwrap(), &format!("task {bad} failed"));
            count(&pool, 8);
        }
    }

    #[test]
    fn nested_and_concurrent_callers_finish() {
        let pool = Pool::new(3);
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.run(6, &|_| {
                            pool.run(5, &|_| {
                                total.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(total.load(Ordering::Relaxed), 4 * 200 * 6 * 5);
    }

    #[test]
    fn install_is_seen_by_the_free_functions_and_undone() {
        let before = threads();
        let pool = Pool::new(before + 3);
        assert_eq!(pool.install(threads), before + 3);
        assert_eq!(threads(), before);
    }
}
