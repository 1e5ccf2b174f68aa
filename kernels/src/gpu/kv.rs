use crate::gpu::rows::int;
use crate::gpu::{Address, CopyKind, DeviceBuffer, Gpu, GpuError, PinnedBlocks, Pitched, Stream};
use crate::weights::WeightDtype;

/// The paged KV cache on a device: `[layers][K, V][num_blocks, kv_heads, block_size, head_dim]`, in one allocation whose
/// address never changes. Slot `block * block_size + offset` holds one token.
#[derive(Debug)]
pub struct DeviceKv {
    gpu: Gpu,
    buffer: DeviceBuffer,
    num_layers: usize,
    pub(crate) shape: KvShape,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KvShape {
    pub(crate) num_blocks: usize,
    pub(crate) block_size: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) dtype: WeightDtype,
}

impl KvShape {
    /// Bytes of one block, K or V of one layer.
    fn block_bytes(self) -> usize {
        self.block_size * self.kv_heads * self.head_dim * self.dtype.bytes()
    }

    /// Bytes of K or V of one layer.
    fn layer_bytes(self) -> usize {
        self.num_blocks * self.block_bytes()
    }
}

/// Copies of rows that lie further apart than this are issued row by row: devices have a limit, of two gigabytes.
const MAX_PITCH: usize = i32::MAX as usize;

impl DeviceKv {
    /// A cache of zeros, `num_blocks` blocks of `block_size` slots for every layer.
    pub fn new(
        gpu: &Gpu,
        num_layers: usize,
        num_blocks: usize,
        block_size: usize,
        kv_heads: usize,
        head_dim: usize,
        dtype: WeightDtype,
    ) -> Result<DeviceKv, GpuError> {
        gpu.must_compute();
        let shape = KvShape { num_blocks, block_size, kv_heads, head_dim, dtype };
        let buffer = DeviceBuffer::filled(gpu, 2 * num_layers * shape.layer_bytes(), 0)?;
        Ok(DeviceKv { gpu: gpu.clone(), buffer, num_layers, shape })
    }

    /// K of a layer, `[num_blocks, kv_heads, block_size, head_dim]`.
    pub fn k(&self, layer: usize) -> Address {
        assert!(layer < self.num_layers, "layer {layer} of {}", self.num_layers);
        self.buffer.address().at(2 * layer * self.shape.layer_bytes())
    }

    /// V of a layer, `[num_blocks, kv_heads, block_size, head_dim]`.
    pub fn v(&self, layer: usize) -> Address {
        self.k(layer).at(self.shape.layer_bytes())
    }

    /// Bytes of the whole cache.
    pub fn bytes(&self) -> usize {
        self.buffer.bytes()
    }

    /// Layers of the cache.
    pub fn num_layers(&self) -> usize {
        self.num_layers
    }

    /// Blocks of a layer.
    pub fn num_blocks(&self) -> usize {
        self.shape.num_blocks
    }

    /// Slots of a block.
    pub fn block_size(&self) -> usize {
        self.shape.block_size
    }

    /// How K and V are stored.
    pub fn dtype(&self) -> WeightDtype {
        self.shape.dtype
    }

    /// Copies block `src` to block `dst` in every layer, behind all that was issued to [`Stream::Compute`].
    ///
    /// # Panics
    /// When a block is outside the cache.
    pub fn copy_block(&self, src: u32, dst: u32) -> Result<(), GpuError> {
        if src == dst {
            return Ok(());
        }
        // SAFETY: both are blocks of the cache, which is freed only after what was issued to it has happened.
        unsafe { self.copy(CopyKind::OnDevice, self.place(dst), self.place(src)) }
    }

    /// Copies block `block` to `to` and waits for it: for each layer its K, then its V.
    ///
    /// # Panics
    /// When the block is outside the cache or `to` is not exactly one block.
    pub fn read_block(&self, block: u32, to: &mut [u8]) -> Result<(), GpuError> {
        let from = self.place(block);
        self.check_len(to.len());
        let staging = self.gpu.staging(to.len())?;
        let host = Pitched { first: staging.address(), pitch: self.shape.block_bytes() };
        // SAFETY: a block of the cache, and a buffer of the same size that lives until it has happened.
        unsafe { self.copy(CopyKind::ToHost, host, from)? };
        self.gpu.finish(Stream::Compute)?;
        to.copy_from_slice(&staging.bytes()[..to.len()]);
        Ok(())
    }

    /// Overwrites block `block` with the bytes that [`read_block`](Self::read_block) gave, and waits for it.
    ///
    /// # Panics
    /// When the block is outside the cache or the bytes are not exactly one block.
    pub fn write_block(&self, block: u32, from: &[u8]) -> Result<(), GpuError> {
        let to = self.place(block);
        self.check_len(from.len());
        let mut staging = self.gpu.staging(from.len())?;
        staging.bytes_mut()[..from.len()].copy_from_slice(from);
        let host = Pitched { first: staging.address(), pitch: self.shape.block_bytes() };
        // SAFETY: as in `read_block`.
        unsafe { self.copy(CopyKind::ToDevice, to, host)? };
        self.gpu.finish(Stream::Compute)
    }

    /// Issues the copy of block `block` to block `host` of `to`: for each layer its K, then its V.
    ///
    /// # Panics
    /// When a block is outside, or those of `to` have another size.
    pub fn move_out(&self, block: u32, to: &mut PinnedBlocks, host: u32) -> Result<(), GpuError> {
        self.check_len(to.block_bytes());
        let host = Pitched { first: to.place(host), pitch: self.shape.block_bytes() };
        // SAFETY: a block of the cache and one of the same size, each freed only after what was issued has happened.
        unsafe { self.copy(CopyKind::ToHost, host, self.place(block)) }
    }

    /// Issues the copy of block `host` of `from` over block `block`.
    ///
    /// # Panics
    /// As [`move_out`](Self::move_out).
    pub fn move_in(&self, from: &PinnedBlocks, host: u32, block: u32) -> Result<(), GpuError> {
        self.check_len(from.block_bytes());
        let host = Pitched { first: from.place(host), pitch: self.shape.block_bytes() };
        // SAFETY: as in `move_out`.
        unsafe { self.copy(CopyKind::ToDevice, self.place(block), host) }
    }

    /// Pinned memory for `num_blocks` blocks that move out.
    pub fn pinned_blocks(&self, num_blocks: usize) -> Result<PinnedBlocks, GpuError> {
        PinnedBlocks::new(&self.gpu, num_blocks, 2 * self.num_layers * self.shape.block_bytes())
    }

    /// A block of every layer, K and V.
    fn place(&self, block: u32) -> Pitched {
        let shape = self.shape;
        assert!((block as usize) < shape.num_blocks, "block {block} of {} blocks", shape.num_blocks);
        let first = self.buffer.address().at(block as usize * shape.block_bytes()).0;
        Pitched { first, pitch: shape.layer_bytes() }
    }

    fn check_len(&self, len: usize) {
        assert_eq!(len, 2 * self.num_layers * self.shape.block_bytes(), "the bytes of one block of every layer");
    }

    /// # Safety
    /// As [`Driver::copy`](crate::gpu::Driver::copy), for one block of every layer, K and V.
    unsafe fn copy(&self, kind: CopyKind, to: Pitched, from: Pitched) -> Result<(), GpuError> {
        let (width, rows) = (self.shape.block_bytes(), 2 * self.num_layers);
        if width == 0 || rows == 0 {
            return Ok(());
        }
        let driver = self.gpu.driver();
        if to.pitch.max(from.pitch) <= MAX_PITCH {
            // SAFETY: the caller's contract.
            return unsafe { driver.copy(Stream::Compute, kind, to, from, width, rows) };
        }
        for row in 0..rows {
            let at = |side: Pitched| Pitched { first: side.first + (row * side.pitch) as u64, pitch: width };
            // SAFETY: the caller's contract.
            unsafe { driver.copy(Stream::Compute, kind, at(to), at(from), width, 1)? };
        }
        Ok(())
    }
}

/// How a kernel divides positions by the block size.
pub(crate) struct BlockDivision {
    pub(crate) magic: u32,
    pub(crate) shift: u32,
}

impl BlockDivision {
    /// `position / block_size` is `(high half of position * magic + position) >> shift`, below 2^31.
    pub(crate) fn new(block_size: usize) -> BlockDivision {
        let divisor = u64::from(int(block_size));
        let shift = divisor.next_power_of_two().trailing_zeros();
        let magic = ((1u64 << 32) * ((1u64 << shift) - divisor)) / divisor + 1;
        BlockDivision { magic: u32::try_from(magic).expect("below 2^32"), shift }
    }
}

#[cfg(test)]
mod tests {
    use super::BlockDivision;

    #[test]
    fn divisions_are_exact() {
        for divisor in (1..70).chain([1000, 4096, 65_537]) {
            let BlockDivision { magic, shift } = BlockDivision::new(divisor);
            let near = (0..40_000u32).chain((1..200).flat_map(|i| {
                let multiple = (i31() / divisor as u32 / i) * divisor as u32;
                [multiple.saturating_sub(1), multiple, multiple + 1]
            }));
            for position in near.chain([i31() - 1, i31()]) {
                let high = ((u64::from(position) * u64::from(magic)) >> 32) as u32;
                assert_eq!((high + position) >> shift, position / divisor as u32, "{position} / {divisor}");
            }
        }
    }

    fn i31() -> u32 {
        i32::MAX as u32
    }
}
