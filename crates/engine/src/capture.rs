//! The engine's ring, and everything that reads it.

use std::sync::Arc;
use std::time::Instant;

use moetrail_capture::{CaptureRing, DrainError, HostRows, SequenceRows};
use moetrail_kernels::gpu::GpuError;
use moetrail_models::Ring;
use moetrail_routes::{ExpertRows, TokenSpan};
use moetrail_sched::{BlockMove, BlockPool, Sequence};

use crate::expert_load::ExpertLoad;
use crate::replay::ReplayRows;
use crate::request::{RowsError, WeightVersionSpan};
use crate::self_check::ring_cells;
use crate::stats::EngineStats;

/// The ring, if routing is captured, and the rows of the swap space.
pub(crate) struct Capture {
    ring: Option<CaptureRing>,
    host: Option<HostRows>,
    load: Option<ExpertLoad>,
    weight_version: Arc<str>,
    stats: Arc<EngineStats>,
    #[cfg(test)]
    fault: crate::fault::Fault,
}

impl Capture {
    /// Over a ring, with room for the rows of `num_host_blocks` blocks of the swap space.
    ///
    /// # Errors
    /// The device's host has no room for them.
    pub(crate) fn new(
        ring: Option<CaptureRing>,
        num_host_blocks: usize,
        stats: Arc<EngineStats>,
    ) -> Result<Self, GpuError> {
        let host = ring.as_ref().filter(|_| num_host_blocks > 0);
        Ok(Self {
            host: host.map(|ring| HostRows::new(ring, num_host_blocks)).transpose()?,
            ring,
            load: None,
            weight_version: "0".into(),
            stats,
            #[cfg(test)]
            fault: crate::fault::Fault::None,
        })
    }

    #[cfg(test)]
    pub(crate) fn plant(&mut self, fault: crate::fault::Fault) {
        self.fault = fault;
    }

    /// Counts from now on how often each expert of each layer is selected.
    pub(crate) fn count_load(&mut self, num_experts: usize) {
        let layout = self.ring.as_ref().map(|ring| ring.layout());
        self.load = layout.map(|layout| ExpertLoad::new(layout, num_experts, &self.stats));
    }

    /// Names the weights that compute from now on.
    pub(crate) fn set_weight_version(&mut self, version: Arc<str>) {
        self.weight_version = version;
    }

    /// Whether selections are counted, step by step.
    pub(crate) fn counts_load(&self) -> bool {
        self.load.is_some()
    }

    /// Whether routing is captured.
    pub(crate) fn is_on(&self) -> bool {
        self.ring.is_some()
    }

    /// No rows yet, from position `start` on, with room up to position `end`; `None` if nothing is captured.
    pub(crate) fn new_rows(&self, start: usize, end: usize) -> Option<SequenceRows> {
        Some(SequenceRows::new(start, end, self.ring.as_ref()?.layout().row_bytes()))
    }

    /// The cells, for the router to write.
    pub(crate) fn cells(&mut self) -> Option<Ring<'_>> {
        self.ring.as_mut().map(ring_cells)
    }

    /// The row half of a block's move.
    pub(crate) fn move_block(&mut self, step: BlockMove) -> Result<(), GpuError> {
        #[cfg(test)]
        if self.fault.loses_rows_of(step) {
            return Ok(());
        }
        let Some(ring) = &mut self.ring else { return Ok(()) };
        match (step, &mut self.host) {
            (BlockMove::Copy { from, to }, _) => ring.copy_block(from, to)?,
            (BlockMove::SwapOut { block, host }, Some(rows)) => {
                let bytes = rows.move_out(ring, block, host)?;
                self.stats.count_moved("host", bytes);
            }
            (BlockMove::SwapIn { host, block }, Some(rows)) => {
                let bytes = rows.move_in(ring, host, block)?;
                self.stats.count_moved("device", bytes);
            }
            // The scheduler knows of a swap space exactly if there is one.
            (BlockMove::SwapOut { .. } | BlockMove::SwapIn { .. }, None) => {}
        }
        Ok(())
    }

    /// Brings a choice's rows up to position `upto` to the host; a failure is the choice's alone.
    pub(crate) fn drain(&self, sequence: &Sequence, pool: &BlockPool, rows: &mut SequenceRows, upto: usize) {
        let Some(ring) = &self.ring else { return };
        let began = Instant::now();
        let blocks = sequence.blocks();
        #[cfg(test)]
        let blocks = &*self.fault.blocks(blocks, pool);
        let drained = rows.drain(ring, pool, blocks, sequence.request(), upto, &self.weight_version);
        match drained {
            Ok(drained) if drained.rows > 0 => {
                self.stats.d2h_bytes.inc_by(drained.bytes as u64);
                self.stats.gather_seconds.observe(began.elapsed().as_secs_f64());
            }
            Err(DrainError::GenerationMismatch { .. }) => _ = self.stats.generation_mismatch.inc(),
            _ => {}
        }
    }

    /// Compares rows computed again with those on the host, and counts.
    pub(crate) fn verify(&self, sequence: &Sequence, rows: &mut SequenceRows, span: TokenSpan) {
        let Some(ring) = &self.ring else { return };
        let (compared, differing) = match rows.compare(ring, sequence.blocks(), span) {
            Ok(counts) => counts,
            Err(error) => return tracing::error!(%error, "rows could not be compared"),
        };
        self.stats.reprefill_rows_compared.inc_by(compared as u64);
        self.stats.reprefill_rows_differing.inc_by(differing as u64);
        if differing > 0 {
            tracing::warn!(compared, differing, request = sequence.request().0, "rows differ after recomputation");
        }
    }

    /// The routing of all computed positions of a sequence, to be used again when they are computed again.
    pub(crate) fn save(&self, sequence: &Sequence) -> Option<ReplayRows> {
        let (ring, computed) = (self.ring.as_ref()?, sequence.num_computed_tokens());
        let block_size = ring.block_size();
        let blocks = &sequence.blocks()[..computed.div_ceil(block_size)];
        let slots = blocks.iter().flat_map(|block| (0..block_size).map(|i| block.id as usize * block_size + i));
        let ids = ring.ids(slots);
        let mut ids = ids.inspect_err(|error| tracing::error!(%error, "routing could not be saved")).ok()?;
        self.stats.count_moved("host", blocks.len() * block_size * ring.layout().row_bytes());
        let row_len = ring.layout().num_moe_layers() * ring.layout().top_k();
        ids.truncate(computed * row_len);
        Some(ReplayRows::captured(TokenSpan::new(0, computed), row_len, ids))
    }

    /// Counts the selections of the rows just computed.
    pub(crate) fn count_selections(&self, slots: &[u32]) {
        if let (Some(load), Some(ring)) = (&self.load, &self.ring) {
            match ring.ids(slots.iter().map(|slot| *slot as usize)) {
                Ok(rows) => load.add(&rows),
                Err(error) => tracing::error!(%error, "selections could not be counted"),
            }
        }
    }

    /// The rows that became known since the last delta, up to position `upto`; `None` once rows were lost.
    pub(crate) fn delta(&self, rows: &mut SequenceRows, upto: usize) -> Option<ExpertRows> {
        let layout = self.ring.as_ref()?.layout();
        rows.settle();
        if rows.lost().is_some() {
            return None;
        }
        let (start, data) = rows.take(upto);
        ExpertRows::new(start, layout.wire(), layout.to_wire(data)).ok()
    }

    /// The rows as the client gets them: those that no delta had, up to position `upto`, all hidden layers.
    pub(crate) fn deliver(&self, mut rows: SequenceRows, upto: usize) -> Option<Result<ExpertRows, RowsError>> {
        let layout = self.ring.as_ref()?.layout();
        rows.settle();
        if let Some(error) = rows.lost() {
            let code = match error {
                DrainError::GenerationMismatch { .. } => "generation_mismatch",
                _ => "rows_lost",
            };
            return Some(Err(RowsError { code, message: error.to_string() }));
        }
        let (start, data) = rows.into_rest(upto);
        #[cfg(test)]
        let data = self.fault.damaged(data, layout.row_bytes());
        let rows = ExpertRows::new(start, layout.wire(), layout.to_wire(data));
        Some(rows.map_err(|error| RowsError { code: "rows_lost", message: error.to_string() }))
    }
}

/// Which weights computed which rows, as the client gets it.
pub(crate) fn weight_versions(rows: &SequenceRows, upto: usize) -> Vec<WeightVersionSpan> {
    rows.versions(upto).into_iter().map(|(version, span)| WeightVersionSpan { version, span }).collect()
}
