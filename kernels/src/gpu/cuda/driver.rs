use std::ffi::c_void;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::sys;
use sys::{CUmemorytype, CUresult};

use super::call::{check, initialise};
use super::context::{Context, Queue};
use super::events::{Events, raw};
use super::functions::Functions;
use crate::gpu::{Address, Arg, CopyKind, Driver, Event, GpuError, Graph, Launch, Pitched, Stream};

/// A device of the CUDA driver. Every call may come from any thread; those that record a graph, from one at a time.
#[derive(Debug)]
pub(super) struct CudaDriver {
    functions: Functions,
    events: Events,
    /// Compute, copy.
    streams: [Queue; 2],
    recording: AtomicBool,
    /// Dropped last.
    context: Context,
}

// SAFETY: the driver's handles belong to the process, and its functions may be called from any thread.
unsafe impl Send for CudaDriver {}
// SAFETY: as above; what is changed here is behind locks.
unsafe impl Sync for CudaDriver {}

impl CudaDriver {
    pub(super) fn open(index: usize) -> Result<CudaDriver, GpuError> {
        let driver = initialise()?;
        let context = Context::open(index)?;
        let functions = Functions::load(context.most_shared, driver)?;
        let streams = [Queue::new()?, Queue::new()?];
        Ok(CudaDriver { functions, events: Events::default(), streams, recording: AtomicBool::new(false), context })
    }

    fn queue(&self, stream: Stream) -> &Queue {
        match stream {
            Stream::Compute => &self.streams[0],
            Stream::Copy => &self.streams[1],
        }
    }

    fn raw(&self, stream: Stream) -> sys::CUstream {
        self.queue(stream).0
    }

    fn is_recording(&self) -> bool {
        self.recording.load(Ordering::Relaxed)
    }

    /// What would spoil a recording, and leave everything after it to fail.
    fn refuse_in_recording(&self, stream: Stream, call: &str) -> Result<(), GpuError> {
        match stream == Stream::Compute && self.is_recording() {
            true => Err(GpuError::new(call, "within a recording")),
            false => Ok(()),
        }
    }

    /// Blocks until all that was issued has happened. What fails then has failed before, and was or will be told.
    fn finish_all(&self) {
        _ = self.context.enter();
        // A stream that records cannot be waited for; `cuMemFree` waits by itself, if not by contract.
        if !self.is_recording() {
            _ = self.queue(Stream::Compute).finish();
        }
        _ = self.queue(Stream::Copy).finish();
    }
}

impl Driver for CudaDriver {
    fn name(&self) -> String {
        self.context.about.name.clone()
    }

    fn memory(&self) -> Result<[usize; 2], GpuError> {
        self.context.enter()?;
        let (mut free, mut all) = (0, 0);
        // SAFETY: it writes two sizes.
        check(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut all) }, "cuMemGetInfo")?;
        Ok([free, all])
    }

    fn multiprocessors(&self) -> u32 {
        self.context.multiprocessors
    }

    fn capability(&self) -> u32 {
        self.context.about.capability
    }

    fn allocate(&self, bytes: usize) -> Result<Address, GpuError> {
        self.context.enter()?;
        let mut address = 0;
        // SAFETY: it writes one address.
        let answer = unsafe { sys::cuMemAlloc_v2(&mut address, bytes.max(1)) };
        check(answer, format_args!("cuMemAlloc of {bytes} bytes")).map_err(|mut error| {
            if let Ok([free, all]) = self.memory() {
                error.message += &format!(" ({} of {} MiB are free)", free >> 20, all >> 20);
            }
            error
        })?;
        Ok(Address(address))
    }

    unsafe fn free(&self, address: Address) {
        self.finish_all();
        // SAFETY: the caller's contract; all that used it has happened.
        _ = unsafe { sys::cuMemFree_v2(address.0) };
    }

    fn allocate_pinned(&self, bytes: usize) -> Result<*mut u8, GpuError> {
        self.context.enter()?;
        let mut pointer = null_mut();
        // Not write-combined: the processor reads what the device copies there.
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE;
        // SAFETY: it writes one pointer.
        let answer = unsafe { sys::cuMemHostAlloc(&mut pointer, bytes.max(1), flags) };
        check(answer, format_args!("cuMemHostAlloc of {bytes} bytes"))?;
        let pointer = pointer.cast::<u8>();
        // SAFETY: as many bytes are there.
        unsafe { pointer.write_bytes(0, bytes) };
        Ok(pointer)
    }

    unsafe fn free_pinned(&self, pointer: *mut u8, _bytes: usize) {
        self.finish_all();
        // SAFETY: the caller's contract.
        _ = unsafe { sys::cuMemFreeHost(pointer.cast()) };
    }

    unsafe fn launch(&self, stream: Stream, launch: Launch, args: &[Arg]) -> Result<(), GpuError> {
        self.context.enter()?;
        // SAFETY: the caller's contract.
        unsafe { self.functions.launch(self.raw(stream), launch, args) }
    }

    unsafe fn copy(
        &self,
        stream: Stream,
        kind: CopyKind,
        to: Pitched,
        from: Pitched,
        width: usize,
        rows: usize,
    ) -> Result<(), GpuError> {
        if width == 0 || rows == 0 {
            return Ok(());
        }
        self.context.enter()?;
        let stream = self.raw(stream);
        if rows == 1 || (to.pitch == width && from.pitch == width) {
            let bytes = width * rows;
            // SAFETY: the caller vouches for both ends.
            let (answer, call) = unsafe {
                match kind {
                    CopyKind::ToDevice => {
                        let from = from.first as *const c_void;
                        (sys::cuMemcpyHtoDAsync_v2(to.first, from, bytes, stream), "cuMemcpyHtoDAsync")
                    }
                    CopyKind::ToHost => {
                        let to = to.first as *mut c_void;
                        (sys::cuMemcpyDtoHAsync_v2(to, from.first, bytes, stream), "cuMemcpyDtoHAsync")
                    }
                    CopyKind::OnDevice => {
                        (sys::cuMemcpyDtoDAsync_v2(to.first, from.first, bytes, stream), "cuMemcpyDtoDAsync")
                    }
                }
            };
            return check(answer, format_args!("{call} of {bytes} bytes"));
        }
        let (host, device) = (CUmemorytype::CU_MEMORYTYPE_HOST, CUmemorytype::CU_MEMORYTYPE_DEVICE);
        let (to_type, from_type) = match kind {
            CopyKind::ToDevice => (device, host),
            CopyKind::ToHost => (host, device),
            CopyKind::OnDevice => (device, device),
        };
        // Of host and device, the driver reads the one that the type names.
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: from_type,
            srcHost: if from_type == host { from.first as *const c_void } else { null() },
            srcDevice: if from_type == device { from.first } else { 0 },
            srcArray: null_mut(),
            srcPitch: from.pitch,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: to_type,
            dstHost: if to_type == host { to.first as *mut c_void } else { null_mut() },
            dstDevice: if to_type == device { to.first } else { 0 },
            dstArray: null_mut(),
            dstPitch: to.pitch,
            WidthInBytes: width,
            Height: rows,
        };
        // SAFETY: the caller vouches for both ends.
        let answer = unsafe { sys::cuMemcpy2DAsync_v2(&copy, stream) };
        check(answer, format_args!("cuMemcpy2DAsync {kind:?} of {rows} rows of {width} bytes, {to:?}, {from:?}"))
    }

    unsafe fn fill(&self, stream: Stream, to: Address, value: u8, bytes: usize) -> Result<(), GpuError> {
        if bytes == 0 {
            return Ok(());
        }
        self.context.enter()?;
        // SAFETY: the caller vouches for the memory.
        let answer = unsafe { sys::cuMemsetD8Async(to.0, value, bytes, self.raw(stream)) };
        check(answer, format_args!("cuMemsetD8Async of {bytes} bytes"))
    }

    fn record(&self, stream: Stream) -> Result<Event, GpuError> {
        self.refuse_in_recording(stream, "cuEventRecord")?;
        self.context.enter()?;
        let event = self.events.take()?;
        // SAFETY: both are there as long as `self`.
        check(unsafe { sys::cuEventRecord(raw(event), self.raw(stream)) }, "cuEventRecord")
            .inspect_err(|_| self.events.give(event))?;
        Ok(event)
    }

    fn wait(&self, stream: Stream, event: Event) -> Result<(), GpuError> {
        self.refuse_in_recording(stream, "cuStreamWaitEvent")?;
        self.context.enter()?;
        // SAFETY: both are there as long as `self`; no flags are defined that matter here.
        check(unsafe { sys::cuStreamWaitEvent(self.raw(stream), raw(event), 0) }, "cuStreamWaitEvent")
    }

    fn has_happened(&self, event: Event) -> Result<bool, GpuError> {
        self.context.enter()?;
        // SAFETY: the event is there until it is forgotten.
        match unsafe { sys::cuEventQuery(raw(event)) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            answer => check(answer, "cuEventQuery").map(|()| true),
        }
    }

    fn finish(&self, event: Event) -> Result<(), GpuError> {
        self.context.enter()?;
        // SAFETY: the event is there until it is forgotten.
        check(unsafe { sys::cuEventSynchronize(raw(event)) }, "cuEventSynchronize")
    }

    fn forget(&self, event: Event) {
        self.events.give(event);
    }

    fn begin_graph(&self) -> Result<(), GpuError> {
        self.refuse_in_recording(Stream::Compute, "cuStreamBeginCapture")?;
        self.context.enter()?;
        // Relaxed: memory may be allocated and a kernel looked up meanwhile, neither of which goes through the stream.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is there as long as `self`.
        check(unsafe { sys::cuStreamBeginCapture_v2(self.raw(Stream::Compute), mode) }, "cuStreamBeginCapture")?;
        self.recording.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn end_graph(&self) -> Result<Graph, GpuError> {
        self.context.enter()?;
        let (mut graph, mut ready) = (null_mut(), null_mut());
        self.recording.store(false, Ordering::Relaxed);
        // SAFETY: it writes one pointer.
        check(unsafe { sys::cuStreamEndCapture(self.raw(Stream::Compute), &mut graph) }, "cuStreamEndCapture")?;
        // SAFETY: the graph is there, and it writes one pointer; no flags.
        let answer = unsafe { sys::cuGraphInstantiateWithFlags(&mut ready, graph, 0) };
        // SAFETY: what was made of it stands by itself.
        _ = unsafe { sys::cuGraphDestroy(graph) };
        check(answer, "cuGraphInstantiate")?;
        Ok(Graph(ready as u64))
    }

    fn launch_graph(&self, graph: Graph) -> Result<(), GpuError> {
        self.refuse_in_recording(Stream::Compute, "cuGraphLaunch")?;
        self.context.enter()?;
        // SAFETY: the graph is there until it is dropped.
        check(unsafe { sys::cuGraphLaunch(graph.0 as sys::CUgraphExec, self.raw(Stream::Compute)) }, "cuGraphLaunch")
    }

    fn drop_graph(&self, graph: Graph) {
        _ = self.context.enter();
        // SAFETY: nobody launches it any more; where it runs, the driver waits until it has run.
        _ = unsafe { sys::cuGraphExecDestroy(graph.0 as sys::CUgraphExec) };
    }
}

impl Drop for CudaDriver {
    fn drop(&mut self) {
        // The parts are given back to this context, in the order of the fields, when nothing uses them any more.
        self.finish_all();
    }
}
