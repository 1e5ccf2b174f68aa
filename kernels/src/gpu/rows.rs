use std::sync::Arc;

use crate::gpu::{Address, Arena, Gpu, GpuError, Scratch};
use crate::weights::WeightDtype;

/// Rows of two-byte activations are padded to this many elements, with zeros.
pub const ROW_PAD: usize = 32;

/// Activations `[len, width]` on a device, rows `ld` elements apart. A clone is the same memory.
#[derive(Clone, Debug)]
pub struct DeviceRows {
    scratch: Arc<Scratch>,
    first: usize,
    len: usize,
    width: usize,
    ld: usize,
    dtype: WeightDtype,
}

impl DeviceRows {
    /// Rows of f32, densely packed, with undefined content.
    pub fn floats(arena: &Arena, len: usize, width: usize) -> Result<DeviceRows, GpuError> {
        let scratch = Arc::new(arena.take(len * width * 4)?);
        Ok(DeviceRows { scratch, first: 0, len, width, ld: width, dtype: WeightDtype::F32 })
    }

    /// Rows that a product reads, with undefined content: whoever fills them writes zeros from `width` to `ld`.
    pub fn operand(arena: &Arena, len: usize, width: usize, dtype: WeightDtype) -> Result<DeviceRows, GpuError> {
        let ld = width.next_multiple_of(ROW_PAD);
        let scratch = Arc::new(arena.take(len * ld * dtype.bytes())?);
        Ok(DeviceRows { scratch, first: 0, len, width, ld, dtype })
    }

    /// Where the first row is.
    pub fn address(&self) -> Address {
        self.scratch.address().at(self.first * self.ld * self.dtype.bytes())
    }

    /// Rows `first..first + len`, the same memory.
    pub fn slice(&self, first: usize, len: usize) -> DeviceRows {
        assert!(first + len <= self.len, "rows {first}..{} of {}", first + len, self.len);
        DeviceRows { first: self.first + first, len, ..self.clone() }
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Elements from one row to the next.
    pub fn ld(&self) -> usize {
        self.ld
    }

    /// Element type.
    pub fn dtype(&self) -> WeightDtype {
        self.dtype
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        self.scratch.gpu()
    }

    /// Copies rows `first..first + len` of f32 to the host and waits for them.
    pub fn to_host(&self, first: usize, len: usize) -> Result<Vec<f32>, GpuError> {
        assert!(self.dtype == WeightDtype::F32 && self.ld == self.width, "dense rows of f32");
        assert!(first + len <= self.len, "rows {first}..{} of {}", first + len, self.len);
        self.gpu().read(self.address().at(first * self.width * 4), len * self.width)
    }
}

/// The suffix of a kernel's name.
pub(crate) fn by_dtype(dtype: WeightDtype, [f32, bf16, f16]: [&'static str; 3]) -> &'static str {
    match dtype {
        WeightDtype::F32 => f32,
        WeightDtype::BF16 => bf16,
        WeightDtype::F16 => f16,
    }
}

/// A size as the kernels take it.
pub(crate) fn int(value: usize) -> u32 {
    u32::try_from(value).expect("sizes of a step fit 32 bits")
}
