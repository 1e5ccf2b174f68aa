//! The rows of blocks in the swap space.

use moetrail_kernels::gpu::{GpuError, PinnedBlocks};

use crate::ring::{CaptureRing, Cells};

/// One stretch of rows for each block of the swap space, moved whole and together with the block's KV.
///
/// This is the second door of the ring: nothing is trimmed or deduplicated here, and nobody reads rows out of it. Rows of a
/// device are copied in the order of its steps, and nobody waits for them.
#[derive(Debug)]
pub struct HostRows {
    rows: Rows,
    block_bytes: usize,
}

#[derive(Debug)]
enum Rows {
    /// Of a ring in host memory; memory is taken as blocks come.
    Host(Vec<u8>),
    /// Of a ring in device memory.
    Device(PinnedBlocks),
}

impl HostRows {
    /// Room for `num_blocks` blocks of the ring.
    ///
    /// # Errors
    /// A device's host has not as much pinned memory.
    pub fn new(ring: &CaptureRing, num_blocks: usize) -> Result<Self, GpuError> {
        let block_bytes = ring.block_size() * ring.layout().row_bytes();
        let rows = match ring.cells() {
            Cells::Device(cells) => Rows::Device(cells.ring().pinned_blocks(num_blocks, ring.block_size())?),
            _ => Rows::Host(vec![0; num_blocks * block_bytes]),
        };
        Ok(Self { rows, block_bytes })
    }

    /// Moves the rows of `block` to block `host` of the swap space. Returns the bytes moved.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn move_out(&mut self, ring: &CaptureRing, block: u32, host: u32) -> Result<usize, GpuError> {
        let first = host as usize * self.block_bytes;
        match (&mut self.rows, ring.cells()) {
            (Rows::Device(rows), Cells::Device(cells)) => cells.ring().move_out(block, rows, host)?,
            (Rows::Device(_), _) => unreachable!("rows are moved between a ring and its own swap space"),
            (Rows::Host(rows), _) => ring.read_block(block, &mut rows[first..first + self.block_bytes]),
        }
        Ok(self.block_bytes)
    }

    /// Moves the rows of block `host` of the swap space to `block`. Returns the bytes moved.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn move_in(&self, ring: &mut CaptureRing, host: u32, block: u32) -> Result<usize, GpuError> {
        let first = host as usize * self.block_bytes;
        match (&self.rows, ring.cells()) {
            (Rows::Device(rows), Cells::Device(cells)) => cells.ring().move_in(rows, host, block)?,
            (Rows::Device(_), _) => unreachable!("rows are moved between a ring and its own swap space"),
            (Rows::Host(rows), _) => ring.write_block(block, &rows[first..first + self.block_bytes]),
        }
        Ok(self.block_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::RingLayout;

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
            ring.read_block(1, &mut before);
            let mut host = HostRows::new(&ring, 4).unwrap();
            assert_eq!(host.move_out(&ring, 1, 3).unwrap(), before.len());
            assert_eq!(host.move_in(&mut ring, 3, 0).unwrap(), before.len());
            let mut after = vec![0; before.len()];
            ring.read_block(0, &mut after);
            assert_eq!(after, before);
        }
    }
}
