use std::sync::Arc;

use crate::error::{KernelError, check_index, check_shape};
use crate::experts::ExpertMatrix;
use crate::gpu::linear::PANEL;
use crate::gpu::matrix::pack;
use crate::gpu::rows::ROW_PAD;
use crate::gpu::{Address, DeviceBuffer, Gpu, GpuError};
use crate::pack::WeightRows;
use crate::weights::WeightDtype;

/// The routed experts of one layer in device memory: `gate`, `up` `[inter, hidden]` and `down` `[hidden, inter]` for
/// each.
///
/// Gate and up panels of 16 rows alternate, so that one pass over an expert's bytes gives `silu(gate x) * (up x)`;
/// every expert starts on a panel. A clone shares the memory.
#[derive(Clone, Debug)]
pub struct DeviceExperts {
    gate_up: Arc<DeviceBuffer>,
    down: Arc<DeviceBuffer>,
    shape: ExpertsShape,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ExpertsShape {
    num_experts: usize,
    hidden: usize,
    inter: usize,
    dtype: WeightDtype,
}

impl ExpertsShape {
    /// Bytes of 16 rows of `cols` weights.
    fn panel_bytes(self, cols: usize) -> usize {
        PANEL * cols.next_multiple_of(ROW_PAD) * self.dtype.bytes()
    }

    /// Bytes of an expert's gate or up.
    fn inner_bytes(self) -> usize {
        self.inter.div_ceil(PANEL) * self.panel_bytes(self.hidden)
    }

    /// Bytes of an expert's down.
    fn down_bytes(self) -> usize {
        self.hidden.div_ceil(PANEL) * self.panel_bytes(self.inter)
    }
}

impl DeviceExperts {
    /// A builder whose weights are all zero until they are put.
    pub fn builder(
        gpu: &Gpu,
        num_experts: usize,
        hidden: usize,
        inter: usize,
        dtype: WeightDtype,
    ) -> Result<DeviceExpertsBuilder, GpuError> {
        let shape = ExpertsShape { num_experts, hidden, inter, dtype };
        let gate_up = Arc::new(DeviceBuffer::filled(gpu, num_experts * 2 * shape.inner_bytes(), 0)?);
        let down = Arc::new(DeviceBuffer::filled(gpu, num_experts * shape.down_bytes(), 0)?);
        Ok(DeviceExpertsBuilder { gpu: gpu.clone(), experts: DeviceExperts { gate_up, down, shape } })
    }

    /// Number of routed experts.
    pub fn num_experts(&self) -> usize {
        self.shape.num_experts
    }

    /// Width of the residual stream.
    pub fn hidden(&self) -> usize {
        self.shape.hidden
    }

    /// Width inside an expert.
    pub fn inter(&self) -> usize {
        self.shape.inter
    }

    /// Element type.
    pub fn dtype(&self) -> WeightDtype {
        self.shape.dtype
    }

    /// Size in memory, padding included.
    pub fn bytes(&self) -> usize {
        self.gate_up.bytes() + self.down.bytes()
    }

    /// Where expert 0's first gate panel is.
    pub(crate) fn gate_up(&self) -> Address {
        self.gate_up.address()
    }

    /// Where expert 0's first down panel is.
    pub(crate) fn down(&self) -> Address {
        self.down.address()
    }
}

/// Experts while their weights are being put.
#[derive(Debug)]
pub struct DeviceExpertsBuilder {
    gpu: Gpu,
    experts: DeviceExperts,
}

impl DeviceExpertsBuilder {
    /// Packs a matrix of an expert.
    pub fn put<'r>(
        &mut self,
        expert: usize,
        matrix: ExpertMatrix,
        rows: impl Into<WeightRows<'r>>,
    ) -> Result<(), KernelError> {
        const OP: &str = "put experts";
        let (rows, shape) = (rows.into(), self.experts.shape);
        let inner = |which: usize| {
            let first = expert * 2 * shape.inner_bytes() + which * shape.panel_bytes(shape.hidden);
            ([shape.inter, shape.hidden], self.experts.gate_up().at(first), 2)
        };
        // Rows go into every `step`th panel from `to` on.
        let (expected, to, step) = match matrix {
            ExpertMatrix::Gate => inner(0),
            ExpertMatrix::Up => inner(1),
            ExpertMatrix::Down => ([shape.hidden, shape.inter], self.experts.down().at(expert * shape.down_bytes()), 1),
        };
        let view = match rows {
            WeightRows::Float(view) => view,
            WeightRows::Blocks(blocks) => {
                return Err(KernelError::Format { from: blocks.format(), to: shape.dtype.into() });
            }
        };
        view.check()?;
        check_index(OP, "expert", expert, shape.num_experts)?;
        check_shape(OP, "weight", &rows.shape(), &expected)?;
        // Rows twice as long, of which the first half is written: the panels between belong to the other matrix.
        let cols16 = step * expected[1].next_multiple_of(ROW_PAD) / 16;
        pack(&self.gpu, to, 0, view, shape.dtype, cols16).map_err(KernelError::Gpu)
    }

    /// The experts.
    pub fn finish(self) -> DeviceExperts {
        self.experts
    }
}
