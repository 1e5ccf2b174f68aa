use std::sync::Arc;

use moetrail_kernels::gpu::{Address, AttentionPlan, DeviceRing, Scratch, Upload, bytes_of, take_sampled};

use crate::error::Result;
use crate::pending::{DeviceMarks, MarksShape};
use crate::step::StepInput;

/// Where a step's numbers are on the device.
pub(crate) struct GpuStep<'a> {
    pub(crate) num_rows: usize,
    pub(crate) token_ids: Address,
    pub(crate) positions: Address,
    pub(crate) slots: Address,
    pub(crate) logit_rows: Address,
    pub(crate) num_logit_rows: usize,
    pub(crate) plan: AttentionPlan,
    pub(crate) plan_at: Address,
    pub(crate) ring: Option<&'a DeviceRing>,
    /// Row of each row in the ids, and the ids.
    pub(crate) replay: Option<[Address; 2]>,
    pub(crate) moe_layers: usize,
    /// As [`DeviceMarks`] has them.
    pub(crate) marks: Arc<Scratch>,
}

impl<'a> GpuStep<'a> {
    /// Issues the copy of a step's numbers, completes its tokens, and makes its marks zero.
    pub(crate) fn new(
        upload: &mut Upload,
        marks: Arc<Scratch>,
        input: &StepInput<'_>,
        plan: AttentionPlan,
        ring: Option<&'a DeviceRing>,
        moe_layers: usize,
    ) -> Result<Self> {
        let num_rows = input.token_ids.len();
        let (row_of, ids) = input.replay.map_or((&[][..], &[][..]), |replay| (replay.row_of, replay.ids));
        let sources = input.awaited.map_or(&[][..], |awaited| awaited.sources);
        let [token_ids, positions, slots, logit_rows, plan_at, row_of, ids, sources] = upload.put([
            bytes_of(input.token_ids),
            bytes_of(input.positions),
            bytes_of(input.slot_mapping),
            bytes_of(input.logit_rows),
            bytes_of(plan.words()),
            bytes_of(row_of),
            bytes_of(ids),
            bytes_of(sources),
        ])?;
        if let Some(awaited) = input.awaited {
            take_sampled(&awaited.samples.0, sources, token_ids, num_rows)?;
        }
        marks.fill(0, 2 * num_rows * 4)?;
        Ok(Self {
            num_rows,
            token_ids,
            positions,
            slots,
            logit_rows,
            num_logit_rows: input.logit_rows.len(),
            plan,
            plan_at,
            ring,
            replay: input.replay.map(|_| [row_of, ids]),
            moe_layers,
            marks,
        })
    }

    /// What the routers are to tell of the first `num_rows` rows.
    pub(crate) fn marks(self, num_rows: usize) -> DeviceMarks {
        let shape = MarksShape { step_rows: self.num_rows, num_rows, replayed: self.replay.is_some() };
        DeviceMarks { words: self.marks, shape }
    }
}
