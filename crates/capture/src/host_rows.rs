//! The rows of blocks in the swap space.

use moetrail_kernels::gpu::GpuError;

use crate::layout::RingLayout;
use crate::ring::CaptureRing;

/// One stretch of rows for each block of the swap space, moved whole and together with the block's KV.
///
/// This is the second door of the ring: nothing is trimmed or deduplicated here, and nobody reads rows out of it.
#[derive(Debug)]
pub struct HostRows {
    rows: Vec<u8>,
    block_bytes: usize,
}

impl HostRows {
    /// Room for `num_blocks` blocks of `block_size` slots; memory is taken as blocks come.
    pub fn new(layout: &RingLayout, num_blocks: usize, block_size: usize) -> Self {
        let block_bytes = block_size * layout.row_bytes();
        Self { rows: vec![0; num_blocks * block_bytes], block_bytes }
    }

    /// Moves the rows of `block` to block `host` of the swap space. Returns the bytes moved.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn move_out(&mut self, ring: &CaptureRing, block: u32, host: u32) -> Result<usize, GpuError> {
        let first = host as usize * self.block_bytes;
        ring.read_block(block, &mut self.rows[first..first + self.block_bytes])?;
        Ok(self.block_bytes)
    }

    /// Moves the rows of block `host` of the swap space to `block`. Returns the bytes moved.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn move_in(&self, ring: &mut CaptureRing, host: u32, block: u32) -> Result<usize, GpuError> {
        let first = host as usize * self.block_bytes;
        ring.write_block(block, &self.rows[first..first + self.block_bytes])?;
        Ok(self.block_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::Cells;

    #[test]
    fn rows_come_back_to_any_block_as_they_left() {
        for num_experts in [8, 300] {
            let layout = RingLayout::new(2, vec![0, 1], 2, num_experts);
            let mut ring = CaptureRing::new(layout.clone(), 3, 2);
            match ring.cells_mut() {
                Cells::U8(cells) => cells.iter_mut().zip(1..).for_each(|(cell, id)| *cell = id),
                Cells::U16(cells) => cells.iter_mut().zip(250..).for_each(|(cell, id)| *cell = id),
                Cells::Device(_) => unreachable!("it was made in host memory"),
            }
            let mut before = vec![0; 2 * layout.row_bytes()];
            ring.read_block(1, &mut before).unwrap();
            let mut host = HostRows::new(&layout, 4, 2);
            assert_eq!(host.move_out(&ring, 1, 3).unwrap(), before.len());
            assert_eq!(host.move_in(&mut ring, 3, 0).unwrap(), before.len());
            let mut after = vec![0; before.len()];
            ring.read_block(0, &mut after).unwrap();
            assert_eq!(after, before);
        }
    }
}
