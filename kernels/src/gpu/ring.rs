//! The capture ring in device memory.

use crate::gpu::rows::int;
use crate::gpu::{Address, CopyKind, DeviceBuffer, Gpu, GpuError, Launch, PinnedBlocks, Pitched, Stream};

/// The expert ids of every KV slot: one long-lived allocation `[num_slots, moe_layers, top_k]` of u8, or of u16 where
/// there are more than 256 experts. The router writes it (`route`); little-endian, as the host reads it.
#[derive(Debug)]
pub struct DeviceRing {
    gpu: Gpu,
    buffer: DeviceBuffer,
    num_slots: usize,
    moe_layers: usize,
    top_k: usize,
    wide: bool,
}

impl DeviceRing {
    /// A ring whose rows are not valid before they are written; `wide` cells are u16.
    pub fn new(
        gpu: &Gpu,
        num_slots: usize,
        moe_layers: usize,
        top_k: usize,
        wide: bool,
    ) -> Result<DeviceRing, GpuError> {
        gpu.must_compute();
        let bytes = num_slots * moe_layers * top_k * if wide { 2 } else { 1 };
        let buffer = DeviceBuffer::filled(gpu, bytes, 0)?;
        Ok(DeviceRing { gpu: gpu.clone(), buffer, num_slots, moe_layers, top_k, wide })
    }

    /// Where the row of slot 0 is.
    pub fn address(&self) -> Address {
        self.buffer.address()
    }

    /// Rows.
    pub fn num_slots(&self) -> usize {
        self.num_slots
    }

    /// MoE layers of a row.
    pub fn moe_layers(&self) -> usize {
        self.moe_layers
    }

    /// Ids of a layer.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// Whether cells are u16.
    pub fn is_wide(&self) -> bool {
        self.wide
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.moe_layers * self.top_k * if self.wide { 2 } else { 1 }
    }

    /// Size of the allocation.
    pub fn bytes(&self) -> usize {
        self.buffer.bytes()
    }

    /// Sets every byte.
    pub fn fill(&self, value: u8) -> Result<(), GpuError> {
        // SAFETY: the buffer is as long.
        unsafe { self.gpu.driver().fill(Stream::Compute, self.address(), value, self.bytes()) }
    }

    /// Copies a block's rows to another block: the row half of a copy-on-write.
    pub fn copy_block(&self, from: u32, to: u32, block_size: usize) -> Result<(), GpuError> {
        let [from, to] = [self.block(from, block_size), self.block(to, block_size)];
        if from == to {
            return Ok(());
        }
        let [from, to] = [from, to].map(|address| Pitched { first: address.0, pitch: 0 });
        let width = block_size * self.row_bytes();
        // SAFETY: `block` checked both.
        unsafe { self.gpu.driver().copy(Stream::Compute, CopyKind::OnDevice, to, from, width, 1) }
    }

    /// Copies a block's rows to host bytes, behind all that was issued, and waits for them.
    pub fn read_block(&self, block: u32, block_size: usize, to: &mut [u8]) -> Result<(), GpuError> {
        assert_eq!(to.len(), block_size * self.row_bytes(), "bytes of a block");
        self.gpu.download(self.block(block, block_size), to)
    }

    /// Overwrites a block's rows with what [`read_block`](Self::read_block) gave, behind all that was issued.
    pub fn write_block(&self, block: u32, block_size: usize, from: &[u8]) -> Result<(), GpuError> {
        assert_eq!(from.len(), block_size * self.row_bytes(), "bytes of a block");
        self.gpu.upload(self.block(block, block_size), from)
    }

    /// Pinned memory for the rows of `num_blocks` blocks that move out.
    pub fn pinned_blocks(&self, num_blocks: usize, block_size: usize) -> Result<PinnedBlocks, GpuError> {
        PinnedBlocks::new(&self.gpu, num_blocks, block_size * self.row_bytes())
    }

    /// Issues the copy of a block's rows to block `host` of `to`, whose blocks have as many slots.
    ///
    /// # Panics
    /// When a block is outside.
    pub fn move_out(&self, block: u32, to: &mut PinnedBlocks, host: u32) -> Result<(), GpuError> {
        let [from, to] = self.move_ends(block, to, host);
        // SAFETY: a block of the ring and one of the same size, each freed only after what was issued has happened.
        unsafe { self.gpu.driver().copy(Stream::Compute, CopyKind::ToHost, to, from, to.pitch, 1) }
    }

    /// Issues the copy of block `host` of `from` over a block's rows.
    ///
    /// # Panics
    /// As [`move_out`](Self::move_out).
    pub fn move_in(&self, from: &PinnedBlocks, host: u32, block: u32) -> Result<(), GpuError> {
        let [to, from] = self.move_ends(block, from, host);
        // SAFETY: as in `move_out`.
        unsafe { self.gpu.driver().copy(Stream::Compute, CopyKind::ToDevice, to, from, to.pitch, 1) }
    }

    /// A block here and one in pinned memory.
    fn move_ends(&self, block: u32, pinned: &PinnedBlocks, host: u32) -> [Pitched; 2] {
        let bytes = pinned.block_bytes();
        let here = self.block(block, bytes / self.row_bytes().max(1));
        [here.0, pinned.place(host)].map(|first| Pitched { first, pitch: bytes })
    }

    /// Copies the rows of `n` slots (u32 on the device, checked by the caller) to `out`, one after another.
    ///
    /// A list of slots, not of runs: it is a hundredth of the rows that it names, the launch depends on `n` alone, and no
    /// thread has to search for the run that its row is in. `out` lies at a multiple of 16 bytes.
    pub fn gather(&self, slots: Address, n: usize, out: Address) -> Result<(), GpuError> {
        const EACH_BLOCK: usize = 4 * 256;
        let row = self.row_bytes();
        if n * row == 0 {
            return Ok(());
        }
        assert!(out.0.is_multiple_of(16), "rows are gathered to a multiple of 16 bytes");
        // Rows follow one another without a gap, so the largest power of two in their length aligns them all.
        let width = 1 << row.trailing_zeros().min(4);
        let kernel = match width {
            16 => "ring_gather_16",
            8 => "ring_gather_8",
            4 => "ring_gather_4",
            2 => "ring_gather_2",
            _ => "ring_gather_1",
        };
        let (units, all) = (row / width, n * row / width);
        let grid = [int(all.div_ceil(EACH_BLOCK)), 1, 1];
        let args = [out.into(), self.address().into(), slots.into(), int(units).into(), int(all).into()];
        // SAFETY: the slots are rows of the ring, and `out` has room for them, by the caller's check.
        unsafe { self.gpu.launch(Launch { kernel, grid, block: 256, shared: 0 }, &args) }
    }

    fn block(&self, block: u32, block_size: usize) -> Address {
        let first = block as usize * block_size;
        assert!(first + block_size <= self.num_slots, "block {block} of {block_size} lies outside the ring");
        self.address().at(first * self.row_bytes())
    }
}
