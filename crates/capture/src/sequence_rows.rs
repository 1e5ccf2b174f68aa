//! The rows of one sequence on their way to its client.

use std::sync::{Arc, Mutex};

use moetrail_kernels::gpu::GpuError;
use moetrail_routes::{RowLedger, TokenSpan};
use moetrail_sched::{BlockPool, BlockRef, RequestKey};

use crate::drain::{Coming, DrainError, Drained, drain};
use crate::ring::CaptureRing;

/// What a client gets of a sequence's routing: rows from the honoured start on, each from the first forward of its
/// position, and which weights computed them.
#[derive(Debug, Clone)]
pub struct SequenceRows {
    ledger: RowLedger,
    rows_of_others: usize,
    /// Ends of stretches computed by the same weights, in order.
    versions: Vec<(Arc<str>, usize)>,
    /// Where the rows begin that have not been taken.
    taken: usize,
    lost: Option<DrainError>,
    /// Stretches of the ledger that are still on their way.
    coming: Vec<Arc<Mutex<Coming>>>,
}

impl SequenceRows {
    /// No rows yet, from position `start` on; room for those up to position `end`.
    pub fn new(start: usize, end: usize, row_bytes: usize) -> Self {
        let mut ledger = RowLedger::new(start, row_bytes);
        ledger.reserve(end);
        Self { ledger, rows_of_others: 0, versions: Vec::new(), taken: start, lost: None, coming: Vec::new() }
    }

    /// Bytes of a row on the host.
    pub fn row_bytes(&self) -> usize {
        self.ledger.row_bytes()
    }

    /// The positions on the host.
    pub fn span(&self) -> TokenSpan {
        self.ledger.span()
    }

    /// Rows on the host whose block another request computed.
    pub fn rows_of_others(&self) -> usize {
        self.rows_of_others
    }

    /// Why rows were lost, if they were.
    pub fn lost(&self) -> Option<&DrainError> {
        self.lost.as_ref()
    }

    /// Rows up to position `upto` that are not on the host yet.
    pub fn num_missing(&self, upto: usize) -> usize {
        if self.lost.is_some() { 0 } else { self.ledger.missing(upto).len() }
    }

    /// Brings the rows up to position `upto` to the host; `version` names the weights that computed the new ones.
    ///
    /// # Errors
    /// [`DrainError`], once; from then on nothing is drained and [`lost`](Self::lost) says why.
    pub fn drain(
        &mut self,
        ring: &CaptureRing,
        pool: &BlockPool,
        blocks: &[BlockRef],
        request: RequestKey,
        upto: usize,
        version: &Arc<str>,
    ) -> Result<Drained, DrainError> {
        if self.lost.is_some() {
            return Ok(Drained::default());
        }
        let (drained, coming) = drain(ring, pool, blocks, request, &mut self.ledger, upto)
            .inspect_err(|error| self.lost = Some(error.clone()))?;
        self.coming.extend(coming.map(|coming| Arc::new(Mutex::new(coming))));
        self.rows_of_others += drained.rows_of_others;
        if drained.rows > 0 {
            match self.versions.last_mut() {
                Some((last, end)) if last == version => *end = self.ledger.end(),
                _ => self.versions.push((version.clone(), self.ledger.end())),
            }
        }
        Ok(drained)
    }

    /// Whether [`settle`](Self::settle) would not wait.
    pub fn has_landed(&self) -> bool {
        // What cannot be asked is found out by settling.
        let landed = |coming: &Arc<Mutex<Coming>>| {
            coming.lock().unwrap_or_else(|poison| poison.into_inner()).rows.has_landed().unwrap_or(true)
        };
        self.coming.iter().all(landed)
    }

    /// Waits for the rows that are still on their way. A failure loses them, and [`lost`](Self::lost) says why.
    pub fn settle(&mut self) {
        for coming in std::mem::take(&mut self.coming) {
            let mut coming = coming.lock().unwrap_or_else(|poison| poison.into_inner());
            let start = coming.start;
            match coming.rows.land() {
                Ok(rows) => self.ledger.land(start, rows),
                Err(error) => self.lost = Some(error.into()),
            }
        }
    }

    /// Of the positions of `span` that were computed again, how many have other rows in the ring than on the host.
    ///
    /// Returns `(compared, differing)`; positions that the host does not have are not compared.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn compare(
        &mut self,
        ring: &CaptureRing,
        blocks: &[BlockRef],
        span: TokenSpan,
    ) -> Result<(usize, usize), GpuError> {
        self.settle();
        let known = self.ledger.span();
        let span = span.intersection(known);
        let slot = |position: usize| {
            blocks[position / ring.block_size()].id as usize * ring.block_size() + position % ring.block_size()
        };
        let now = ring.ids(span.iter().map(slot))?;
        let row_len = now.len().checked_div(span.len()).unwrap_or(0);
        let row_bytes = self.ledger.row_bytes();
        let differs = |index: usize| {
            let first = (span.start + index - known.start) * row_bytes;
            let then = &self.ledger.data()[first..first + row_bytes];
            let now = &now[index * row_len..][..row_len];
            match row_bytes == row_len {
                true => then.iter().zip(now).any(|(then, now)| u16::from(*then) != *now),
                false => then.chunks_exact(2).zip(now).any(|(then, now)| then != now.to_le_bytes()),
            }
        };
        Ok((span.len(), (0..span.len()).filter(|index| differs(*index)).count()))
    }

    /// Takes the rows up to position `upto` that were not taken before: where they start, and their bytes. Rows on their
    /// way must have been [settled](Self::settle).
    pub fn take(&mut self, upto: usize) -> (usize, Vec<u8>) {
        debug_assert!(self.coming.is_empty(), "rows are on their way");
        let (first, start) = (self.taken, self.ledger.start());
        self.taken = upto.clamp(first, self.ledger.end().max(first));
        let row_bytes = self.ledger.row_bytes();
        let rows = &self.ledger.data()[(first - start) * row_bytes..(self.taken - start) * row_bytes];
        (first, rows.to_vec())
    }

    /// As [`take`](Self::take) for the last time: without a copy if nothing was taken before.
    pub fn into_rest(mut self, upto: usize) -> (usize, Vec<u8>) {
        debug_assert!(self.coming.is_empty(), "rows are on their way");
        if self.taken > self.ledger.start() {
            return self.take(upto);
        }
        self.ledger.truncate(upto);
        (self.ledger.start(), self.ledger.into_data())
    }

    /// Which weights computed the rows up to position `upto`.
    pub fn versions(&self, upto: usize) -> Vec<(Arc<str>, TokenSpan)> {
        let mut start = self.ledger.start();
        let spans = self.versions.iter().map(|(version, end)| {
            let span = TokenSpan::new(start, (*end).min(upto));
            start = span.end;
            (version.clone(), span)
        });
        spans.filter(|(_, span)| !span.is_empty()).collect()
    }
}
