use crate::format::WeightFormat;
use crate::weights::WeightDtype;

/// What a kernel refuses, with the values that made it refuse.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The device refused.
    #[error(transparent)]
    Gpu(#[from] crate::gpu::GpuError),
    /// Rows were put outside the matrix, or with the wrong width.
    #[error("rows {first}..{end} of width {cols} do not fit a matrix of shape [{out_features}, {in_features}]")]
    PutRows {
        /// First row of the write.
        first: usize,
        /// One past its last row.
        end: usize,
        /// Width of the view.
        cols: usize,
        /// Rows of the matrix.
        out_features: usize,
        /// Columns of the matrix.
        in_features: usize,
    },
    /// A weight view reaches beyond its bytes.
    #[error("a {dtype} view of {rows}x{cols} (strides {row_stride}, {col_stride}) needs {needed} bytes, got {got}")]
    ViewBytes {
        /// Element type of the view.
        dtype: WeightDtype,
        /// Rows of the view.
        rows: usize,
        /// Columns of the view.
        cols: usize,
        /// Elements between rows.
        row_stride: usize,
        /// Elements between columns.
        col_stride: usize,
        /// Bytes the shape asks for.
        needed: usize,
        /// Bytes given.
        got: usize,
    },
    /// Quantised rows are no whole number of blocks, or not as many as the shape asks for.
    #[error("{got} bytes are no {format} blocks of {rows}x{cols} weights")]
    Blocks {
        /// Format of the blocks.
        format: WeightFormat,
        /// Rows.
        rows: usize,
        /// Weights of a row.
        cols: usize,
        /// Bytes given.
        got: usize,
    },
    /// Rows of one format cannot be packed as the other.
    #[error("{from} weights cannot be packed as {to}")]
    Format {
        /// Format of the rows.
        from: WeightFormat,
        /// Format of the packed matrix.
        to: WeightFormat,
    },
    /// A tensor or slice has another shape than the operation needs.
    #[error("{op}: {what} is {got:?}, expected {expected:?}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// Which operand.
        what: &'static str,
        /// Its shape.
        got: Vec<usize>,
        /// The shape it should have.
        expected: Vec<usize>,
    },
    /// An index is outside its table.
    #[error("{op}: {what} {got} is not below {limit}")]
    Index {
        /// The operation.
        op: &'static str,
        /// What the index names.
        what: &'static str,
        /// The index.
        got: usize,
        /// One past the largest legal index.
        limit: usize,
    },
    /// Two rows of one call would write the same slot.
    #[error("{op}: slot {slot} is written by two rows of one call")]
    DuplicateSlot {
        /// The operation.
        op: &'static str,
        /// The slot named twice.
        slot: u32,
    },
    /// The experts given for a row name one of them twice.
    #[error("{op}: expert {id} is given twice for row {row}")]
    RepeatedExpert {
        /// The operation.
        op: &'static str,
        /// Row of the call.
        row: usize,
        /// The expert.
        id: u16,
    },
    /// The tensor lies on a device this build has no kernel for.
    #[error("{op}: no kernel for device {device} in this build")]
    Device {
        /// The operation.
        op: &'static str,
        /// Where the tensor lies.
        device: String,
    },
}

impl From<KernelError> for candle_core::Error {
    fn from(error: KernelError) -> Self {
        candle_core::Error::wrap(error)
    }
}

/// Fails with [`KernelError::Shape`] unless both shapes agree.
pub(crate) fn check_shape(
    op: &'static str,
    what: &'static str,
    got: &[usize],
    expected: &[usize],
) -> Result<(), KernelError> {
    if got == expected {
        return Ok(());
    }
    Err(KernelError::Shape { op, what, got: got.to_vec(), expected: expected.to_vec() })
}

/// Fails with [`KernelError::Index`] unless `got < limit`.
pub(crate) fn check_index(op: &'static str, what: &'static str, got: usize, limit: usize) -> Result<(), KernelError> {
    if got < limit {
        return Ok(());
    }
    Err(KernelError::Index { op, what, got, limit })
}
