use crate::buffer::Buffer;
use crate::weights::WeightDtype;

/// The paged KV cache: per layer one K and one V buffer `[num_blocks, kv_heads, block_size, head_dim]`, where slot
/// `block * block_size + offset` holds one token.
///
/// Heads come before offsets so that attention, which walks one head at a time, reads whole stretches of a block.
///
/// Addresses never change. Memory is zeroed lazily: a block that was never written costs nothing.
pub struct KvPool {
    layers: Vec<LayerBuffers>,
    shape: KvShape,
}

struct LayerBuffers {
    k: Buffer,
    v: Buffer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct KvShape {
    num_blocks: usize,
    block_size: usize,
    kv_heads: usize,
    head_dim: usize,
    dtype: WeightDtype,
}

impl KvPool {
    /// A cache of `num_blocks` blocks of `block_size` slots for every layer.
    pub fn new(
        num_layers: usize,
        num_blocks: usize,
        block_size: usize,
        kv_heads: usize,
        head_dim: usize,
        dtype: WeightDtype,
    ) -> KvPool {
        let shape = KvShape { num_blocks, block_size, kv_heads, head_dim, dtype };
        let len = num_blocks * shape.block_bytes();
        let layer = |_| LayerBuffers { k: Buffer::zeroed(len), v: Buffer::zeroed(len) };
        KvPool { layers: (0..num_layers).map(layer).collect(), shape }
    }

    /// Bytes of one block over all layers, K and V.
    pub fn bytes_per_block(
        num_layers: usize,
        block_size: usize,
        kv_heads: usize,
        head_dim: usize,
        dtype: WeightDtype,
    ) -> usize {
        2 * num_layers * block_size * kv_heads * head_dim * dtype.bytes()
    }

    /// Bytes of the whole cache, touched or not.
    pub fn bytes(&self) -> usize {
        2 * self.layers.len() * self.shape.num_blocks * self.shape.block_bytes()
    }

    /// Layers of the cache.
    pub fn num_layers(&self) -> usize {
        self.layers.len()
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

    /// Copies block `src` to block `dst` in every layer.
    ///
    /// # Panics
    /// When a block is outside the cache.
    pub fn copy_block(&mut self, src: u32, dst: u32) {
        let len = self.shape.block_bytes();
        let (src, dst) = (self.shape.block_start(src), self.shape.block_start(dst));
        for buffer in self.buffers_mut() {
            buffer.bytes_mut().copy_within(src..src + len, dst);
        }
    }

    /// Copies block `block` to `to`: for each layer its K, then its V.
    ///
    /// # Panics
    /// When the block is outside the cache or `to` is not exactly one block.
    pub fn read_block(&self, block: u32, to: &mut [u8]) {
        let (start, len) = (self.shape.block_start(block), self.shape.block_bytes());
        assert_eq!(to.len(), 2 * self.layers.len() * len, "the bytes of one block of every layer");
        let buffers = self.layers.iter().flat_map(|layer| [&layer.k, &layer.v]);
        for (buffer, part) in buffers.zip(to.chunks_exact_mut(len.max(1))) {
            part.copy_from_slice(&buffer.bytes()[start..start + len]);
        }
    }

    /// Overwrites block `block` with the bytes [`KvPool::read_block`] gave.
    ///
    /// # Panics
    /// When the block is outside the cache or the bytes are not exactly one block.
    pub fn write_block(&mut self, block: u32, from: &[u8]) {
        let (start, len) = (self.shape.block_start(block), self.shape.block_bytes());
        assert_eq!(from.len(), 2 * self.layers.len() * len, "the bytes of one block of every layer");
        let mut parts = from.chunks_exact(len.max(1));
        for (buffer, part) in self.buffers_mut().zip(&mut parts) {
            buffer.bytes_mut()[start..start + len].copy_from_slice(part);
        }
    }

    /// K and V of layer `index`.
    pub fn layer_mut(&mut self, index: usize) -> LayerKv<'_> {
        let layer = &mut self.layers[index];
        LayerKv {
            k: layer.k.bytes_mut(),
            v: layer.v.bytes_mut(),
            num_blocks: self.shape.num_blocks,
            block_size: self.shape.block_size,
            kv_heads: self.shape.kv_heads,
            head_dim: self.shape.head_dim,
            dtype: self.shape.dtype,
        }
    }

    fn buffers_mut(&mut self) -> impl Iterator<Item = &mut Buffer> {
        self.layers.iter_mut().flat_map(|layer| [&mut layer.k, &mut layer.v])
    }
}

impl KvShape {
    /// Bytes of one block in one buffer.
    fn block_bytes(self) -> usize {
        self.block_size * self.kv_heads * self.head_dim * self.dtype.bytes()
    }

    fn block_start(self, block: u32) -> usize {
        assert!((block as usize) < self.num_blocks, "block {block} of {} blocks", self.num_blocks);
        block as usize * self.block_bytes()
    }
}

/// K and V of one layer, `[num_blocks, kv_heads, block_size, head_dim]` each.
pub struct LayerKv<'a> {
    pub(crate) k: &'a mut [u8],
    pub(crate) v: &'a mut [u8],
    pub(crate) num_blocks: usize,
    pub(crate) block_size: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) dtype: WeightDtype,
}

impl LayerKv<'_> {
    /// Elements of one slot, all heads.
    pub(crate) fn width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Slots of the cache.
    pub(crate) fn num_slots(&self) -> usize {
        self.num_blocks * self.block_size
    }

    /// Where a head of a slot starts.
    pub(crate) fn start(&self, slot: usize, head: usize) -> usize {
        let (block, offset) = (slot / self.block_size, slot % self.block_size);
        ((block * self.kv_heads + head) * self.block_size + offset) * self.head_dim
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_copied_and_moved_whole() {
        for dtype in [WeightDtype::F32, WeightDtype::BF16] {
            let mut pool = KvPool::new(2, 4, 3, 2, 5, dtype);
            assert_eq!(pool.bytes(), 4 * KvPool::bytes_per_block(2, 3, 2, 5, dtype));
            let content: Vec<u8> = (0..pool.bytes() / 4).map(|i| (i % 255) as u8 + 1).collect();
            pool.write_block(1, &content);
            pool.copy_block(1, 3);
            let read = |block| {
                let mut bytes = vec![0; content.len()];
                pool.read_block(block, &mut bytes);
                bytes
            };
            assert_eq!(read(1), content);
            assert_eq!(read(3), content);
            assert!(read(0).iter().chain(&read(2)).all(|&byte| byte == 0));
        }
    }

    #[test]
    #[should_panic(expected = "block 4 of 4 blocks")]
    fn a_block_outside_the_cache_is_refused() {
        KvPool::new(1, 4, 2, 1, 4, WeightDtype::F16).copy_block(4, 0);
    }
}
