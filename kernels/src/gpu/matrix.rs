use std::sync::Arc;

use crate::error::KernelError;
use crate::gpu::rows::{ROW_PAD, by_dtype, int};
use crate::gpu::{Address, DeviceBuffer, Gpu, GpuError, Launch};
use crate::pack::WeightRows;
use crate::weights::{WeightDtype, WeightView};

/// Outputs are padded to this many.
const PANEL: usize = 16;

/// Weights `[out, in]` in device memory, packed for `mma` (`packed_index` in `kernels/cuda/common.cuh`): 16 outputs by 16
/// inputs lie together. A clone shares the memory.
#[derive(Clone, Debug)]
pub struct DeviceMatrix {
    buffer: Arc<DeviceBuffer>,
    /// Bytes from the start of the buffer.
    offset: usize,
    shape: Shape,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    out_features: usize,
    in_features: usize,
    dtype: WeightDtype,
}

impl Shape {
    fn cols16(self) -> usize {
        self.in_features.next_multiple_of(ROW_PAD) / 16
    }

    fn bytes(self) -> usize {
        self.out_features.next_multiple_of(PANEL) * self.cols16() * 16 * self.dtype.bytes()
    }
}

impl DeviceMatrix {
    /// Where the first panel is.
    pub fn address(&self) -> Address {
        self.buffer.address().at(self.offset)
    }

    /// Rows.
    pub fn out_features(&self) -> usize {
        self.shape.out_features
    }

    /// Columns.
    pub fn in_features(&self) -> usize {
        self.shape.in_features
    }

    /// Blocks of 16 columns, padding included.
    pub fn cols16(&self) -> usize {
        self.shape.cols16()
    }

    /// Element type.
    pub fn dtype(&self) -> WeightDtype {
        self.shape.dtype
    }

    /// Size in memory, padding included.
    pub fn bytes(&self) -> usize {
        self.shape.bytes()
    }
}

/// A matrix while its rows are being put.
#[derive(Debug)]
pub struct DeviceMatrixBuilder {
    gpu: Gpu,
    matrix: DeviceMatrix,
}

/// Stored bytes that are on the device at once while they are packed.
const SLICE: usize = 64 << 20;

impl DeviceMatrixBuilder {
    /// A matrix of zeros.
    pub fn zeros(gpu: &Gpu, out_features: usize, in_features: usize, dtype: WeightDtype) -> Result<Self, GpuError> {
        let shape = Shape { out_features, in_features, dtype };
        let buffer = Arc::new(DeviceBuffer::filled(gpu, shape.bytes(), 0)?);
        Ok(Self { gpu: gpu.clone(), matrix: DeviceMatrix { buffer, offset: 0, shape } })
    }

    /// Packs rows from row `first` on.
    pub fn put_rows(&mut self, first: usize, rows: WeightRows<'_>) -> Result<(), KernelError> {
        let shape = self.matrix.shape;
        let WeightRows::Float(view) = rows else {
            let WeightRows::Blocks(blocks) = rows else { unreachable!("there are two kinds of rows") };
            return Err(KernelError::Format { from: blocks.format(), to: shape.dtype.into() });
        };
        view.check()?;
        let end = first + view.rows;
        if end > shape.out_features || view.cols != shape.in_features {
            let (out_features, in_features) = (shape.out_features, shape.in_features);
            return Err(KernelError::PutRows { first, end, cols: view.cols, out_features, in_features });
        }
        pack(&self.gpu, self.matrix.address(), first, view, shape.dtype, shape.cols16()).map_err(KernelError::Gpu)
    }

    /// The matrix.
    pub fn finish(self) -> DeviceMatrix {
        self.matrix
    }
}

/// Packs a view into rows `first..` of the matrix at `to`.
pub(crate) fn pack(
    gpu: &Gpu,
    to: Address,
    first: usize,
    view: WeightView<'_>,
    dtype: WeightDtype,
    cols16: usize,
) -> Result<(), GpuError> {
    if view.rows == 0 || view.cols == 0 {
        return Ok(());
    }
    let width = view.dtype.bytes();
    // A transposed view is taken whole: its rows do not lie together.
    let rows_at_once = match view.col_stride {
        1 => (SLICE / (view.row_stride * width)).clamp(1, view.rows),
        _ => view.rows,
    };
    let reach = |rows: usize| (rows - 1) * view.row_stride + (view.cols - 1) * view.col_stride + 1;
    let stored = gpu.stored(reach(rows_at_once) * width)?;
    let kernel = by_dtype(
        dtype,
        [
            by_dtype(view.dtype, ["pack_f32_from_f32", "pack_f32_from_bf16", "pack_f32_from_f16"]),
            by_dtype(view.dtype, ["pack_bf16_from_f32", "pack_bf16_from_bf16", "pack_bf16_from_f16"]),
            by_dtype(view.dtype, ["pack_f16_from_f32", "pack_f16_from_bf16", "pack_f16_from_f16"]),
        ],
    );
    for row in (0..view.rows).step_by(rows_at_once) {
        let rows = rows_at_once.min(view.rows - row);
        gpu.upload(stored.address(), &view.bytes[row * view.row_stride * width..][..reach(rows) * width])?;
        let grid = [int(view.cols.div_ceil(128)), int(rows).min(32768), 1];
        let args = [
            to.into(),
            stored.address().into(),
            int(first + row).into(),
            int(rows).into(),
            int(view.cols).into(),
            int(view.row_stride).into(),
            int(view.col_stride).into(),
            int(cols16).into(),
        ];
        // SAFETY: the view was checked, and the caller's matrix has these rows; `stored` is written again on this
        // stream alone, and given back after the kernel ran.
        unsafe { gpu.launch(Launch { kernel, grid, block: 128, shared: 0 }, &args)? };
    }
    Ok(())
}
