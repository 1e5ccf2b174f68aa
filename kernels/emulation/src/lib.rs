//! Runs the CUDA kernels on the host, for tests: each thread of a block is a fiber, device memory is host memory.
//!
//! Streams are queues that advance as late as they may, or by chance, so that an order that nothing enforces does not hold.
//! Device memory starts as NaN and ends at a page that cannot be touched.

mod memory;
mod queues;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use moetrail_kernels::gpu::{Address, Arg, CopyKind, Driver, Event, Gpu, GpuError, Graph, Launch, Pitched, Stream};

use crate::memory::Guarded;
use crate::queues::{Op, Queues};

/// The emulated device.
#[derive(Debug)]
pub struct Emulation {
    queues: Mutex<Queues>,
    memory: Mutex<HashMap<u64, Guarded>>,
    limit: usize,
    capability: u32,
    launches: AtomicU64,
}

/// An emulated device with `limit` bytes of memory, or `None` where the kernels could not be compiled, which is said.
///
/// `seed` decides how far streams run ahead of what waits for them; 0 is as late as possible.
pub fn gpu(seed: u64, limit: usize) -> Option<Gpu> {
    gpu_of(seed, limit, 80)
}

/// As [`gpu`], with a compute capability, as in 90 for 9.0: launchers choose kernels by it. Those that only Hopper has round
/// otherwise than the others, as they may.
pub fn gpu_of(seed: u64, limit: usize, capability: u32) -> Option<Gpu> {
    if cfg!(no_kernels) {
        println!("skipped: the GPU kernels could not be compiled as C++");
        return None;
    }
    Some(Gpu::new(Arc::new(Emulation {
        queues: Mutex::new(Queues::new(seed)),
        memory: Mutex::default(),
        limit,
        capability,
        launches: AtomicU64::new(0),
    })))
}

impl Emulation {
    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    fn memory(&self) -> MutexGuard<'_, HashMap<u64, Guarded>> {
        self.memory.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

impl Driver for Emulation {
    fn name(&self) -> String {
        "emulation".to_owned()
    }

    fn memory(&self) -> Result<[usize; 2], GpuError> {
        let used: usize = Emulation::memory(self).values().map(Guarded::bytes).sum();
        Ok([self.limit.saturating_sub(used), self.limit])
    }

    fn multiprocessors(&self) -> u32 {
        3
    }

    fn capability(&self) -> u32 {
        self.capability
    }

    fn allocate(&self, bytes: usize) -> Result<Address, GpuError> {
        let used: usize = Emulation::memory(self).values().map(Guarded::bytes).sum();
        if used + bytes > self.limit {
            return Err(GpuError::new(format!("allocate {bytes} bytes"), "out of memory"));
        }
        let guarded = Guarded::new(bytes);
        let address = guarded.address();
        Emulation::memory(self).insert(address, guarded);
        Ok(Address(address))
    }

    unsafe fn free(&self, address: Address) {
        self.queues().run_all();
        Emulation::memory(self).remove(&address.0);
    }

    fn allocate_pinned(&self, bytes: usize) -> Result<*mut u8, GpuError> {
        // Of a real host less can be pinned than it has.
        if bytes > self.limit {
            return Err(GpuError::new(format!("pin {bytes} bytes"), "out of memory"));
        }
        Ok(Box::leak(vec![0u8; bytes].into_boxed_slice()).as_mut_ptr())
    }

    unsafe fn free_pinned(&self, pointer: *mut u8, bytes: usize) {
        self.queues().run_all();
        // SAFETY: it came from a boxed slice of this length.
        drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(pointer, bytes)) });
    }

    unsafe fn launch(&self, stream: Stream, launch: Launch, args: &[Arg]) -> Result<(), GpuError> {
        self.launches.fetch_add(1, Ordering::Relaxed);
        if launch.grid.contains(&0) || launch.block == 0 || launch.block > 1024 {
            return Err(GpuError::new(format!("launch {}", launch.kernel), format!("bad dimensions: {launch:?}")));
        }
        if launch.grid[1] > 65535 || launch.grid[2] > 65535 || launch.shared > 227 << 10 {
            return Err(GpuError::new(format!("launch {}", launch.kernel), format!("beyond the limits: {launch:?}")));
        }
        let args = args.to_vec();
        let op: Op = Arc::new(move || {
            let name = std::ffi::CString::new(launch.kernel).expect("a name without NUL");
            let mut args = args.clone();
            let mut pointers: Vec<*mut std::ffi::c_void> =
                args.iter_mut().map(|arg| std::ptr::from_mut(arg).cast()).collect();
            // SAFETY: the caller of `launch` vouches for the arguments.
            let code = unsafe {
                moetrail_emulate(
                    name.as_ptr(),
                    launch.grid.as_ptr(),
                    launch.block,
                    launch.shared as usize,
                    pointers.as_mut_ptr(),
                )
            };
            assert_eq!(code, 0, "there is no kernel {}", launch.kernel);
        });
        self.queues().issue(stream, op);
        Ok(())
    }

    unsafe fn copy(
        &self,
        stream: Stream,
        _kind: CopyKind,
        to: Pitched,
        from: Pitched,
        width: usize,
        rows: usize,
    ) -> Result<(), GpuError> {
        let op: Op = Arc::new(move || {
            for row in 0..rows {
                let (to, from) = ((to.first as usize + row * to.pitch), (from.first as usize + row * from.pitch));
                // SAFETY: the caller vouches for both ends.
                unsafe { std::ptr::copy(from as *const u8, to as *mut u8, width) };
            }
        });
        self.queues().issue(stream, op);
        Ok(())
    }

    unsafe fn fill(&self, stream: Stream, to: Address, value: u8, bytes: usize) -> Result<(), GpuError> {
        // SAFETY: the caller vouches for the memory.
        let op: Op = Arc::new(move || unsafe { std::ptr::write_bytes(to.0 as *mut u8, value, bytes) });
        self.queues().issue(stream, op);
        Ok(())
    }

    fn record(&self, stream: Stream) -> Result<Event, GpuError> {
        Ok(self.queues().record(stream))
    }

    fn wait(&self, stream: Stream, event: Event) -> Result<(), GpuError> {
        self.queues().wait(stream, event);
        Ok(())
    }

    fn has_happened(&self, event: Event) -> Result<bool, GpuError> {
        Ok(self.queues().has_happened(event))
    }

    fn finish(&self, event: Event) -> Result<(), GpuError> {
        self.queues().finish(event);
        Ok(())
    }

    fn forget(&self, _event: Event) {}

    fn begin_graph(&self) -> Result<(), GpuError> {
        self.queues().begin_graph();
        Ok(())
    }

    fn end_graph(&self) -> Result<Graph, GpuError> {
        Ok(self.queues().end_graph())
    }

    fn launch_graph(&self, graph: Graph) -> Result<(), GpuError> {
        self.queues().launch_graph(graph);
        Ok(())
    }

    fn drop_graph(&self, graph: Graph) {
        self.queues().drop_graph(graph);
    }
}

#[cfg(not(no_kernels))]
unsafe extern "C" {
    fn moetrail_emulate(
        name: *const std::ffi::c_char,
        grid: *const u32,
        threads: u32,
        shared: usize,
        args: *mut *mut std::ffi::c_void,
    ) -> std::ffi::c_int;
}

#[cfg(no_kernels)]
unsafe fn moetrail_emulate(
    _: *const std::ffi::c_char,
    _: *const u32,
    _: u32,
    _: usize,
    _: *mut *mut std::ffi::c_void,
) -> std::ffi::c_int {
    1
}
