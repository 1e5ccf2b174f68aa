use std::sync::Arc;

use moetrail_kernels::gpu::{Address, AttentionPlan, DeviceRing, Scratch, Upload, bytes_of};

use crate::error::Result;
use crate::step::{Marks, StepInput};

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
    /// U32 `[2, rows]`: NaN seen, cells changed.
    pub(crate) marks: Arc<Scratch>,
}

impl<'a> GpuStep<'a> {
    /// Issues the copy of a step's numbers, and makes its marks zero.
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
        let [token_ids, positions, slots, logit_rows, plan_at, row_of, ids] = upload.put([
            bytes_of(input.token_ids),
            bytes_of(input.positions),
            bytes_of(input.slot_mapping),
            bytes_of(input.logit_rows),
            bytes_of(plan.words()),
            bytes_of(row_of),
            bytes_of(ids),
        ])?;
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

    /// Waits for what the routers tell of the rows.
    pub(crate) fn read_marks(&self) -> Result<Marks> {
        let n = self.num_rows;
        let marks: Vec<u32> = self.marks.gpu().read(self.marks.address(), 2 * n)?;
        let nan_rows = (0..n as u32).filter(|&row| marks[row as usize] != 0).collect();
        let changed_cells = if self.replay.is_some() { marks[n..].to_vec() } else { Vec::new() };
        Ok(Marks { nan_rows, changed_cells })
    }
}
