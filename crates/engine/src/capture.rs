//! The engine's ring, and the rows of its choices.

use std::sync::Arc;
use std::time::Instant;

use moetrail_capture::{CaptureRing, DrainError, drain};
use moetrail_kernels::RingCells;
use moetrail_routes::{ExpertRows, RowLedger};
use moetrail_sched::{BlockCopy, BlockPool, Sequence};

use crate::request::RowsError;
use crate::self_check::ring_cells;
use crate::stats::EngineStats;

/// The rows of a choice so far.
#[derive(Clone)]
pub(crate) struct ChoiceRows {
    pub(crate) ledger: RowLedger,
    /// Rows in the ledger whose block another request computed.
    pub(crate) rows_of_others: usize,
    /// Set once rows were lost; the ledger is then of no use.
    error: Option<RowsError>,
}

/// The ring, if routing is captured, and the only calls that read it.
pub(crate) struct Capture {
    ring: Option<CaptureRing>,
    stats: Arc<EngineStats>,
    weight_version: Arc<str>,
    #[cfg(test)]
    fault: crate::fault::Fault,
}

impl Capture {
    pub(crate) fn new(ring: Option<CaptureRing>, stats: Arc<EngineStats>) -> Self {
        Self {
            ring,
            stats,
            weight_version: "0".into(),
            #[cfg(test)]
            fault: crate::fault::Fault::None,
        }
    }

    #[cfg(test)]
    pub(crate) fn plant(&mut self, fault: crate::fault::Fault) {
        self.fault = fault;
    }

    /// What drains from now on was computed by other weights.
    pub(crate) fn set_weight_version(&mut self, version: Arc<str>) {
        self.weight_version = version;
    }

    /// Whether routing is captured.
    pub(crate) fn is_on(&self) -> bool {
        self.ring.is_some()
    }

    /// An empty ledger from `start` on, if routing is captured.
    pub(crate) fn new_rows(&self, start: usize) -> Option<ChoiceRows> {
        let ring = self.ring.as_ref()?;
        Some(ChoiceRows { ledger: RowLedger::new(start, ring.layout().row_bytes()), rows_of_others: 0, error: None })
    }

    /// The cells, for the router to write.
    pub(crate) fn cells(&mut self) -> Option<RingCells<'_>> {
        self.ring.as_mut().map(ring_cells)
    }

    /// The row half of a copy-on-write.
    pub(crate) fn copy_block(&mut self, copy: BlockCopy) {
        #[cfg(test)]
        if self.fault == crate::fault::Fault::RowLostOnCopyOnWrite {
            return;
        }
        if let Some(ring) = &mut self.ring {
            ring.copy_block(copy.from, copy.to);
        }
    }

    /// Brings a choice's ledger up to position `upto`; a failure is the choice's alone.
    pub(crate) fn drain(&self, sequence: &Sequence, pool: &BlockPool, rows: &mut ChoiceRows, upto: usize) {
        let Some(ring) = self.ring.as_ref().filter(|_| rows.error.is_none()) else { return };
        let began = Instant::now();
        let blocks = sequence.blocks();
        #[cfg(test)]
        let (blocks, old_end) = (&*self.fault.blocks(blocks, pool), rows.ledger.end());
        match drain(ring, pool, blocks, sequence.request(), &mut rows.ledger, upto) {
            Ok(drained) if drained.rows > 0 => {
                self.stats.d2h_bytes.inc_by(drained.bytes as u64);
                rows.rows_of_others += drained.rows_of_others;
                self.stats.gather_seconds.observe(began.elapsed().as_secs_f64());
            }
            Ok(_) => {}
            Err(error) => {
                let code = match &error {
                    DrainError::GenerationMismatch { .. } => {
                        self.stats.generation_mismatch.inc();
                        "generation_mismatch"
                    }
                    _ => "rows_lost",
                };
                rows.error = Some(RowsError { code, message: error.to_string() });
            }
        }
        #[cfg(test)]
        self.fault.damage(&mut rows.ledger, old_end);
    }

    /// The rows as the client gets them: up to position `upto`, all hidden layers.
    pub(crate) fn deliver(&self, mut rows: ChoiceRows, upto: usize) -> Option<Result<ExpertRows, RowsError>> {
        let layout = self.ring.as_ref()?.layout();
        if let Some(error) = rows.error {
            return Some(Err(error));
        }
        rows.ledger.truncate(upto);
        let start = rows.ledger.start();
        let rows = ExpertRows::new(start, layout.wire(), layout.to_wire(rows.ledger.into_data()));
        Some(rows.map_err(|error| RowsError { code: "rows_lost", message: error.to_string() }))
    }
}
