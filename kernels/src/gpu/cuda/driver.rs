use std::ffi::c_void;
use std::ptr::{null, null_mut};
use std::sync::{Mutex, MutexGuard};

use cudarc::driver::sys;
use sys::{CUmemorytype, CUresult};

use super::call::{check, initialise};
use super::context::{Context, Queue};
use super::events::{Events, raw};
use super::functions::Functions;
use crate::gpu::{Address, Arg, CopyKind, Driver, Event, GpuError, Graph, Launch, Pitched, Stream};

/// A device of the CUDA driver. Every call may come from any thread; while one records a graph, no other issues to the
/// compute stream.
#[derive(Debug)]
pub(super) struct CudaDriver {
    functions: Functions,
    events: Events,
    /// Compute, copy, load.
    streams: [Queue; 3],
    /// While the compute stream records: an event behind all that was issued to it before. Held by whoever would spoil a
    /// recording, so that none begins meanwhile.
    recording: Mutex<Option<Event>>,
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
        let streams = [Queue::new()?, Queue::new()?, Queue::new()?];
        Ok(CudaDriver { functions, events: Events::default(), streams, recording: Mutex::default(), context })
    }

    fn queue(&self, stream: Stream) -> &Queue {
        match stream {
            Stream::Compute => &self.streams[0],
            Stream::Copy => &self.streams[1],
            Stream::Load => &self.streams[2],
        }
    }

    fn raw(&self, stream: Stream) -> sys::CUstream {
        self.queue(stream).0
    }

    fn recording(&self) -> MutexGuard<'_, Option<Event>> {
        self.recording.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    /// What would spoil a recording, and leave everything after it to fail, is refused within one. None begins on the
    /// stream as long as the answer is held.
    fn outside_recording(&self, stream: Stream, call: &str) -> Result<Option<MutexGuard<'_, Option<Event>>>, GpuError> {
        if stream != Stream::Compute {
            return Ok(None);
        }
        match self.recording() {
            recording if recording.is_some() => Err(GpuError::new(call, "within a recording")),
            recording => Ok(Some(recording)),
        }
    }

    /// An event behind all that was issued to the stream, which does not record.
    fn mark(&self, stream: Stream) -> Result<Event, GpuError> {
        let event = self.events.take()?;
        // SAFETY: both are there as long as `self`.
        check(unsafe { sys::cuEventRecord(raw(event), self.raw(stream)) }, "cuEventRecord")
            .inspect_err(|_| self.events.give(event))?;
        Ok(event)
    }

    /// Blocks until all that was issued has happened. What fails then has failed before, and was or will be told.
    fn finish_all(&self) {
        _ = self.context.enter();
        let recording = self.recording();
        if let Some(before) = *recording {
            // A stream that records must not be asked for anything. But all that was issued to it was issued before, and
            // a recording issues nothing. It does not end, and its event mean another moment, before the lock is given
            // back.
            _ = self.finish(before);
        } else if let Ok(event) = self.mark(Stream::Compute) {
            // The wait is for the event, and not for the stream: a recording may begin meanwhile.
            drop(recording);
            _ = self.finish(event);
            self.forget(event);
        } else {
            _ = self.queue(Stream::Compute).finish();
        }
        _ = self.queue(Stream::Copy).finish();
        _ = self.queue(Stream::Load).finish();
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
        let _outside = self.outside_recording(stream, "cuEventRecord")?;
        self.context.enter()?;
        self.mark(stream)
    }

    fn wait(&self, stream: Stream, event: Event) -> Result<(), GpuError> {
        let _outside = self.outside_recording(stream, "cuStreamWaitEvent")?;
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
        let mut recording = self.recording();
        if recording.is_some() {
            return Err(GpuError::new("cuStreamBeginCapture", "within a recording"));
        }
        self.context.enter()?;
        let before = self.mark(Stream::Compute)?;
        // Relaxed: this thread and others may allocate and give back memory, look a kernel up and load weights meanwhile,
        // none of which goes through the stream.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is there as long as `self`.
        check(unsafe { sys::cuStreamBeginCapture_v2(self.raw(Stream::Compute), mode) }, "cuStreamBeginCapture")
            .inspect_err(|_| self.events.give(before))?;
        *recording = Some(before);
        Ok(())
    }

    fn end_graph(&self) -> Result<Graph, GpuError> {
        self.context.enter()?;
        let (mut graph, mut ready) = (null_mut(), null_mut());
        {
            // Held until the stream records no more.
            let mut recording = self.recording();
            recording.take().into_iter().for_each(|before| self.events.give(before));
            // SAFETY: it writes one pointer.
            check(unsafe { sys::cuStreamEndCapture(self.raw(Stream::Compute), &mut graph) }, "cuStreamEndCapture")?;
        }
        // SAFETY: the graph is there, and it writes one pointer; no flags.
        let answer = unsafe { sys::cuGraphInstantiateWithFlags(&mut ready, graph, 0) };
        // SAFETY: what was made of it stands by itself.
        _ = unsafe { sys::cuGraphDestroy(graph) };
        check(answer, "cuGraphInstantiate")?;
        Ok(Graph(ready as u64))
    }

    fn launch_graph(&self, graph: Graph) -> Result<(), GpuError> {
        let _outside = self.outside_recording(Stream::Compute, "cuGraphLaunch")?;
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
