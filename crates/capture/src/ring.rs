//! Ids of every KV slot, kept beside the KV.

use moetrail_kernels::gpu::{Gpu, GpuError};
use moetrail_routes::ExpertDtype;

use crate::device_ring::DeviceCells;
use crate::layout::RingLayout;

/// The cells of a ring, `[num_slots, moe_layers, top_k]`, in the model's dtype.
#[derive(Debug)]
pub enum Cells {
    /// In host memory, one byte an id.
    U8(Vec<u8>),
    /// In host memory, two bytes an id.
    U16(Vec<u16>),
    /// In device memory.
    Device(DeviceCells),
}

/// The ring: one long-lived allocation, one row per KV slot, where the KV is; written by the router.
#[derive(Debug)]
pub struct CaptureRing {
    layout: RingLayout,
    block_size: usize,
    cells: Cells,
}

impl CaptureRing {
    /// A ring in host memory for `num_blocks` blocks of `block_size` slots.
    ///
    /// Rows of slots that were never written are not valid, and no plan names them.
    pub fn new(layout: RingLayout, num_blocks: usize, block_size: usize) -> Self {
        let len = num_blocks * block_size * layout.num_moe_layers() * layout.top_k();
        let cells = match layout.dtype() {
            ExpertDtype::U8 => Cells::U8(vec![0; len]),
            ExpertDtype::U16 => Cells::U16(vec![0; len]),
        };
        Self { layout, block_size, cells }
    }

    /// A ring in device memory.
    ///
    /// # Errors
    /// The device has no room for it, or for `staging` bytes there and as many pinned ones here: the way of its rows.
    pub fn on_device(
        gpu: &Gpu,
        layout: RingLayout,
        num_blocks: usize,
        block_size: usize,
        staging: usize,
    ) -> Result<Self, GpuError> {
        let cells = Cells::Device(DeviceCells::new(gpu, &layout, num_blocks * block_size, staging)?);
        Ok(Self { layout, block_size, cells })
    }

    /// Axis sizes of a row.
    pub fn layout(&self) -> &RingLayout {
        &self.layout
    }

    /// Slots in a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Size of the allocation.
    pub fn bytes(&self) -> usize {
        match &self.cells {
            Cells::U8(cells) => cells.len(),
            Cells::U16(cells) => cells.len() * 2,
            Cells::Device(cells) => cells.ring().bytes(),
        }
    }

    /// The cells.
    pub fn cells(&self) -> &Cells {
        &self.cells
    }

    /// The cells, for the router to write.
    pub fn cells_mut(&mut self) -> &mut Cells {
        &mut self.cells
    }

    /// Ids per row.
    fn row_len(&self) -> usize {
        self.layout.num_moe_layers() * self.layout.top_k()
    }

    /// Copies a block's rows to another block: the row half of a copy-on-write.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn copy_block(&mut self, from: u32, to: u32) -> Result<(), GpuError> {
        let len = self.block_size * self.row_len();
        let (first, to_first) = (from as usize * len, to as usize * len);
        match &mut self.cells {
            Cells::U8(cells) => cells.copy_within(first..first + len, to_first),
            Cells::U16(cells) => cells.copy_within(first..first + len, to_first),
            Cells::Device(cells) => cells.ring().copy_block(from, to, self.block_size)?,
        }
        Ok(())
    }

    /// Copies a block's rows of host memory to host bytes, little-endian.
    pub(crate) fn read_block(&self, block: u32, to: &mut [u8]) {
        let len = self.block_size * self.row_len();
        let first = block as usize * len;
        match &self.cells {
            Cells::U8(cells) => to.copy_from_slice(&cells[first..first + len]),
            Cells::U16(cells) => write_ids(&cells[first..first + len], to),
            Cells::Device(_) => unreachable!("blocks of a device are moved by it"),
        }
    }

    /// Overwrites a block's rows of host memory with what [`read_block`](Self::read_block) gave.
    pub(crate) fn write_block(&mut self, block: u32, from: &[u8]) {
        let len = self.block_size * self.row_len();
        let first = block as usize * len;
        match &mut self.cells {
            Cells::U8(cells) => cells[first..first + len].copy_from_slice(from),
            Cells::U16(cells) => {
                for (id, from) in cells[first..first + len].iter_mut().zip(from.chunks_exact(2)) {
                    *id = u16::from_le_bytes([from[0], from[1]]);
                }
            }
            Cells::Device(_) => unreachable!("blocks of a device are moved by it"),
        }
    }

    /// The ids of some slots, widened: what is counted, or saved to be replayed.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn ids(&self, slots: impl Iterator<Item = usize>) -> Result<Vec<u16>, GpuError> {
        let len = self.row_len();
        match &self.cells {
            Cells::U8(cells) => {
                Ok(slots.flat_map(|slot| &cells[slot * len..][..len]).map(|id| u16::from(*id)).collect())
            }
            Cells::U16(cells) => Ok(slots.flat_map(|slot| &cells[slot * len..][..len]).copied().collect()),
            Cells::Device(cells) => {
                let rows = cells.send(slots)?.into_bytes()?;
                Ok(match self.layout.dtype() {
                    ExpertDtype::U8 => rows.into_iter().map(u16::from).collect(),
                    ExpertDtype::U16 => rows.chunks_exact(2).map(|id| u16::from_le_bytes([id[0], id[1]])).collect(),
                })
            }
        }
    }

    /// Appends the rows of consecutive slots of host memory to host bytes, little-endian.
    pub(crate) fn read(&self, first_slot: usize, num_slots: usize, to: &mut Vec<u8>) {
        let (first, len) = (first_slot * self.row_len(), num_slots * self.row_len());
        match &self.cells {
            Cells::U8(cells) => to.extend_from_slice(&cells[first..first + len]),
            Cells::U16(cells) => {
                let old = to.len();
                to.resize(old + 2 * len, 0);
                write_ids(&cells[first..first + len], &mut to[old..]);
            }
            Cells::Device(_) => unreachable!("rows of a device are sent"),
        }
    }
}

fn write_ids(ids: &[u16], to: &mut [u8]) {
    for (id, to) in ids.iter().zip(to.chunks_exact_mut(2)) {
        to.copy_from_slice(&id.to_le_bytes());
    }
}
