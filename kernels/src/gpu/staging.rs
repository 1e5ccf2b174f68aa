//! The way of drained rows to the host.

use std::collections::{HashMap, VecDeque};
use std::mem;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::gpu::memory::bytes_of;
use crate::gpu::{CopyKind, DeviceBuffer, DeviceRing, Event, Gpu, GpuError, PinnedBuffer, Pitched, Stream};

/// Ranges of the staging memory start at multiples of this: no two share a cache line.
const ALIGN: usize = 64;

/// The way of drained rows to the host, which blocks nobody: neither the stream of the kernels nor who asks.
///
/// Staging memory is a ring of byte ranges, taken and given back in one order. It exists twice, on the device and pinned
/// on the host, and a range is the same bytes of both: the list of slots, then their rows. A drain is issued as
///
/// 1. on [`Stream::Compute`]: the slots are copied from the pinned range to the device's, and the rows are gathered;
/// 2. on [`Stream::Copy`], behind an event of the gather: the rows are copied to the pinned range; an event ends it.
///
/// Why nothing is overwritten too early:
///
/// * *The ring's rows.* Their blocks may be given to a new owner as soon as `drain` has returned: what writes them next is
///   issued to the stream of the gather, behind it.
/// * *A range, on both sides.* It is given again only after the host has seen its last event. That event is behind the
///   copy of the rows, which waited for the gather, which was behind the copy of the slots: nothing of the range is still
///   to be read or written. So the pinned slots also stay as they are until they have been copied.
///
/// When no range is free, the rows that have waited longest are copied to the heap, after a wait for their own event
/// alone; whoever asks for them later finds them there.
#[derive(Debug)]
pub struct RowStaging {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    gpu: Gpu,
    device: DeviceBuffer,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    host: PinnedBuffer,
    /// In the order of their ranges, the oldest first.
    pieces: VecDeque<Piece>,
    /// Pieces that had to make room before somebody asked for them.
    landed: HashMap<u64, Vec<u8>>,
    next: u64,
    bytes_issued: u64,
}

/// A range of the staging memory.
#[derive(Debug)]
struct Piece {
    id: u64,
    range: Range<usize>,
    /// The rows in it.
    rows: Range<usize>,
    event: Arc<Recorded>,
    /// Whether somebody may still ask for the rows.
    wanted: bool,
}

/// An event that is forgotten when it is dropped.
#[derive(Debug)]
struct Recorded {
    gpu: Gpu,
    event: Event,
}

/// Rows on their way to the host. Dropped, they are of no interest any more.
#[derive(Debug)]
pub struct StagedRows {
    shared: Arc<Shared>,
    bytes: Vec<u8>,
    /// What is still to be appended to `bytes`, in order.
    left: VecDeque<u64>,
}

impl RowStaging {
    /// Staging memory of `bytes` bytes, on both sides.
    pub fn new(gpu: &Gpu, bytes: usize) -> Result<RowStaging, GpuError> {
        let bytes = bytes / ALIGN * ALIGN;
        let state = State {
            host: PinnedBuffer::new(gpu, bytes)?,
            pieces: VecDeque::new(),
            landed: HashMap::new(),
            next: 0,
            bytes_issued: 0,
        };
        let device = DeviceBuffer::new(gpu, bytes)?;
        Ok(RowStaging { shared: Arc::new(Shared { gpu: gpu.clone(), device, state: Mutex::new(state) }) })
    }

    /// Sends the rows of these slots, as all that was issued before leaves them, on their way to the host.
    ///
    /// # Errors
    /// A slot lies outside the ring, the staging memory has no room for a row, or the device refuses.
    pub fn drain(&self, ring: &DeviceRing, slots: &[u32]) -> Result<StagedRows, GpuError> {
        if let Some(slot) = slots.iter().find(|&&slot| slot as usize >= ring.num_slots()) {
            let limit = ring.num_slots();
            return Err(GpuError::new("drain", format!("slot {slot} is not below {limit}")));
        }
        let mut rows = StagedRows { shared: self.shared.clone(), bytes: Vec::new(), left: VecDeque::new() };
        // Two pieces at once: one is landed while the other is copied.
        let capacity = self.shared.device.bytes();
        let fitting = |bytes: usize| bytes.saturating_sub(2 * ALIGN) / (ring.row_bytes() + 4);
        let at_once = fitting(capacity / 2 / ALIGN * ALIGN).max(fitting(capacity).min(1));
        if at_once == 0 {
            return Err(GpuError::new("drain", format!("no room for a row in {capacity} bytes")));
        }
        for slots in slots.chunks(at_once) {
            rows.left.push_back(self.shared.issue(ring, slots)?);
        }
        Ok(rows)
    }

    /// Bytes of rows whose copy to the host was issued, ever.
    pub fn bytes_issued(&self) -> u64 {
        self.shared.state().bytes_issued
    }

    /// Bytes of the staging memory that are not free, and bytes of rows that had to leave it before they were asked for.
    pub fn bytes_held(&self) -> Result<[usize; 2], GpuError> {
        let mut state = self.shared.state();
        state.reclaim()?;
        let staged = state.pieces.iter().map(|piece| piece.range.len()).sum();
        Ok([staged, state.landed.values().map(Vec::len).sum()])
    }
}

impl StagedRows {
    /// The rows' bytes, one row after another. Waits for their own copy alone.
    pub fn land(&mut self) -> Result<&[u8], GpuError> {
        while let Some(&id) = self.left.front() {
            self.shared.land(id, &mut self.bytes)?;
            self.left.pop_front();
        }
        Ok(&self.bytes)
    }

    /// The rows' bytes. Waits as [`land`](Self::land) does.
    pub fn into_bytes(mut self) -> Result<Vec<u8>, GpuError> {
        self.land()?;
        Ok(mem::take(&mut self.bytes))
    }

    /// Appends the rows' bytes, with one copy from the staging memory. Waits as [`land`](Self::land) does.
    pub fn append_to(mut self, to: &mut Vec<u8>) -> Result<(), GpuError> {
        to.append(&mut self.bytes);
        mem::swap(to, &mut self.bytes);
        let landed = self.land().map(|_| ());
        mem::swap(to, &mut self.bytes);
        landed
    }

    /// Whether [`land`](Self::land) would not wait.
    pub fn has_landed(&self) -> Result<bool, GpuError> {
        let state = self.shared.state();
        for piece in state.pieces.iter().filter(|piece| self.left.contains(&piece.id)) {
            if !piece.event.has_happened()? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Drop for StagedRows {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        for id in &self.left {
            state.landed.remove(id);
            state.pieces.iter_mut().filter(|piece| piece.id == *id).for_each(|piece| piece.wanted = false);
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    /// Issues a piece, and says its id.
    fn issue(&self, ring: &DeviceRing, slots: &[u32]) -> Result<u64, GpuError> {
        let listed = size_of_val(slots).next_multiple_of(ALIGN);
        let bytes = slots.len() * ring.row_bytes();
        let mut state = self.state();
        let first = state.room(listed + bytes.next_multiple_of(ALIGN))?;
        let rows = first + listed..first + listed + bytes;
        state.put(first, bytes_of(slots));
        let event = self.copy(ring, slots.len(), first, &rows, state.host.address()).inspect_err(|_| {
            // What was issued before the refusal may still use the range.
            _ = self.gpu.finish(Stream::Compute);
            _ = self.gpu.finish(Stream::Copy);
        })?;
        state.bytes_issued += bytes as u64;
        let id = state.next;
        state.next += 1;
        let range = first..rows.end.next_multiple_of(ALIGN);
        let event = Arc::new(Recorded { gpu: self.gpu.clone(), event });
        state.pieces.push_back(Piece { id, range, rows, event, wanted: true });
        Ok(id)
    }

    /// Slots to the device, rows to their place there, rows to the host: an event of the last.
    fn copy(
        &self,
        ring: &DeviceRing,
        n: usize,
        first: usize,
        rows: &Range<usize>,
        host: u64,
    ) -> Result<Event, GpuError> {
        let driver = self.gpu.driver();
        let place = |base: u64, at: usize| Pitched { first: base + at as u64, pitch: 0 };
        let device = self.device.address();
        let (to, from) = (place(device.0, first), place(host, first));
        // SAFETY: the range is this call's alone, on both sides, until its event has been seen to happen.
        unsafe { driver.copy(Stream::Compute, CopyKind::ToDevice, to, from, n * 4, 1)? };
        ring.gather(device.at(first), n, device.at(rows.start))?;
        let gathered = driver.record(Stream::Compute)?;
        let waits = driver.wait(Stream::Copy, gathered);
        driver.forget(gathered);
        waits?;
        let (to, from) = (place(host, rows.start), place(device.0, rows.start));
        // SAFETY: as above.
        unsafe { driver.copy(Stream::Copy, CopyKind::ToHost, to, from, rows.len(), 1)? };
        driver.record(Stream::Copy)
    }

    /// Appends a piece's rows to `to`, once they are there, and gives its range back.
    fn land(&self, id: u64, to: &mut Vec<u8>) -> Result<(), GpuError> {
        let waiting = self.state().pieces.iter().find(|piece| piece.id == id && piece.wanted).map(|p| p.event.clone());
        if let Some(event) = waiting {
            // Without the lock: others may drain meanwhile, and perhaps take the piece to the heap.
            event.finish()?;
        }
        let mut state = self.state();
        if let Some(bytes) = state.landed.remove(&id) {
            to.extend_from_slice(&bytes);
            return Ok(());
        }
        let state = &mut *state;
        let piece = state.pieces.iter_mut().find(|piece| piece.id == id).expect("a piece is staged or landed");
        piece.wanted = false;
        let rows = piece.rows.clone();
        to.extend_from_slice(state.bytes(rows));
        _ = state.reclaim();
        Ok(())
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // Copies to the pinned memory may be under way.
        for piece in &self.state().pieces {
            _ = piece.event.finish();
        }
    }
}

impl State {
    /// Bytes of a range whose event has happened. Others may be written by a copy meanwhile, so there is never a borrow of
    /// them all.
    fn bytes(&self, range: Range<usize>) -> &[u8] {
        assert!(range.end <= self.host.len(), "a range of the staging memory");
        // SAFETY: the range lies inside the buffer, which is initialised, and no copy to it is under way.
        unsafe { std::slice::from_raw_parts((self.host.address() as *const u8).add(range.start), range.len()) }
    }

    /// Fills a range that is free.
    fn put(&mut self, first: usize, bytes: &[u8]) {
        assert!(first + bytes.len() <= self.host.len(), "a range of the staging memory");
        // SAFETY: as above, and nothing reads it either.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), (self.host.address() as *mut u8).add(first), bytes.len())
        };
    }

    /// Gives back the oldest ranges as far as nobody wants them and their copies have happened.
    fn reclaim(&mut self) -> Result<(), GpuError> {
        while let Some(piece) = self.pieces.front() {
            if piece.wanted || !piece.event.has_happened()? {
                break;
            }
            self.pieces.pop_front();
        }
        Ok(())
    }

    /// A free range of `len` bytes, which are at most all; lands the oldest rows as long as there is none.
    fn room(&mut self, len: usize) -> Result<usize, GpuError> {
        self.reclaim()?;
        loop {
            if let Some(first) = self.free(len) {
                return Ok(first);
            }
            let oldest = self.pieces.front().expect("all of the memory has room for a piece");
            oldest.event.finish()?;
            let oldest = self.pieces.pop_front().expect("it was there");
            if oldest.wanted {
                let rows = self.bytes(oldest.rows).to_vec();
                self.landed.insert(oldest.id, rows);
            }
        }
    }

    /// Behind the youngest range, or at the start.
    fn free(&self, len: usize) -> Option<usize> {
        let capacity = self.host.len();
        let (Some(oldest), Some(youngest)) = (self.pieces.front(), self.pieces.back()) else {
            return (len <= capacity).then_some(0);
        };
        let (head, tail) = (oldest.range.start, youngest.range.end);
        match head < tail {
            true if tail + len <= capacity => Some(tail),
            true => (len <= head).then_some(0),
            false => (tail + len <= head).then_some(tail),
        }
    }
}

impl Recorded {
    fn finish(&self) -> Result<(), GpuError> {
        self.gpu.driver().finish(self.event)
    }

    fn has_happened(&self) -> Result<bool, GpuError> {
        self.gpu.driver().has_happened(self.event)
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        self.gpu.driver().forget(self.event);
    }
}
