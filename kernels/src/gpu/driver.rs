use std::fmt;

use crate::gpu::GpuError;

/// A place in the memory of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Address(pub u64);

impl Address {
    /// No memory; what a kernel takes for an absent operand.
    pub const NULL: Address = Address(0);

    /// The place `bytes` further.
    pub fn at(self, bytes: usize) -> Address {
        Address(self.0 + bytes as u64)
    }
}

/// An argument of a kernel. The kernel reads as many bytes of it as its parameter has.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct Arg(pub u64);

impl From<Address> for Arg {
    fn from(address: Address) -> Arg {
        Arg(address.0)
    }
}

impl From<u32> for Arg {
    fn from(value: u32) -> Arg {
        Arg(value.into())
    }
}

impl From<f32> for Arg {
    fn from(value: f32) -> Arg {
        Arg(value.to_bits().into())
    }
}

/// How a kernel is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Name in `kernels/cuda`.
    pub kernel: &'static str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

/// What runs in the order in which it was issued, and unordered with the other streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Kernels, and copies that they depend on.
    Compute,
    /// Copies to the host that nothing on the device waits for.
    Copy,
    /// Weights that are packed while others compute.
    Load,
}

/// A point in a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Event(pub u64);

/// Recorded launches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Graph(pub u64);

/// Bytes in rows that lie `pitch` apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pitched {
    /// The first row; an address of the device or of pinned host memory.
    pub first: u64,
    /// Bytes from one row to the next.
    pub pitch: usize,
}

/// Copies know from the kind which of their ends are on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyKind {
    /// From the host to the device.
    ToDevice,
    /// From the device to the host.
    ToHost,
    /// Within the device.
    OnDevice,
}

/// What the kernels of `kernels/cuda` run on: an NVIDIA GPU, or their emulation on the host.
///
/// Everything that takes a [`Stream`] is only issued: it happens later, in the stream's order. Memory of the host that is
/// named in a copy must be pinned, and stay as it is until the copy has happened.
pub trait Driver: Send + Sync + fmt::Debug {
    /// What the device calls itself.
    fn name(&self) -> String;

    /// Bytes of device memory: free, and all.
    fn memory(&self) -> Result<[usize; 2], GpuError>;

    /// Multiprocessors.
    fn multiprocessors(&self) -> u32;

    /// Compute capability, as in 90 for 9.0.
    fn capability(&self) -> u32;

    /// New device memory at a multiple of 256 bytes; its content is undefined.
    fn allocate(&self, bytes: usize) -> Result<Address, GpuError>;

    /// Gives device memory back, once all that was issued has happened.
    ///
    /// # Safety
    /// The address comes from [`allocate`](Self::allocate), and nobody uses it any more.
    unsafe fn free(&self, address: Address);

    /// New pinned host memory, cached by the processor; zeroed.
    fn allocate_pinned(&self, bytes: usize) -> Result<*mut u8, GpuError>;

    /// Gives pinned host memory back.
    ///
    /// # Safety
    /// The pointer comes from [`allocate_pinned`](Self::allocate_pinned) with as many bytes, and nobody uses it any more.
    unsafe fn free_pinned(&self, pointer: *mut u8, bytes: usize);

    /// Launches a kernel.
    ///
    /// # Safety
    /// The arguments are those that the kernel takes, and what they point to is there until it has run.
    unsafe fn launch(&self, stream: Stream, launch: Launch, args: &[Arg]) -> Result<(), GpuError>;

    /// Copies `rows` rows of `width` bytes.
    ///
    /// # Safety
    /// Both ends are memory of that kind, and there until it has happened.
    unsafe fn copy(
        &self,
        stream: Stream,
        kind: CopyKind,
        to: Pitched,
        from: Pitched,
        width: usize,
        rows: usize,
    ) -> Result<(), GpuError>;

    /// Sets `bytes` bytes of the device to `value`.
    ///
    /// # Safety
    /// As [`copy`](Self::copy).
    unsafe fn fill(&self, stream: Stream, to: Address, value: u8, bytes: usize) -> Result<(), GpuError>;

    /// An event that happens after all that was issued to the stream.
    fn record(&self, stream: Stream) -> Result<Event, GpuError>;

    /// Holds back what is issued to the stream from now on until the event has happened.
    fn wait(&self, stream: Stream, event: Event) -> Result<(), GpuError>;

    /// Whether the event has happened.
    fn has_happened(&self, event: Event) -> Result<bool, GpuError>;

    /// Blocks the caller until the event has happened.
    fn finish(&self, event: Event) -> Result<(), GpuError>;

    /// Forgets an event.
    fn forget(&self, event: Event);

    /// From now on what this thread issues to [`Stream::Compute`] is recorded and not issued. Until the recording ends no
    /// other thread issues anything there. To the other streams all may issue meanwhile, and memory may be given back.
    fn begin_graph(&self) -> Result<(), GpuError>;

    /// Ends a recording.
    fn end_graph(&self) -> Result<Graph, GpuError>;

    /// Issues a recording to [`Stream::Compute`].
    fn launch_graph(&self, graph: Graph) -> Result<(), GpuError>;

    /// Forgets a recording.
    fn drop_graph(&self, graph: Graph);
}
