use candle_core::{Device, Result, Tensor};

use crate::error::{KernelError, check_index, check_shape};
use crate::form::Form;
use crate::packed::PackedMatrix;
use crate::product::linear;
use crate::tensor::{check_cpu, unfilled, with_rows};

/// `x W^T + b` on packed weights.
///
/// An output element depends on its row of `x` alone, bit for bit, whatever else is in the batch.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: PackedMatrix,
    bias: Option<Vec<f32>>,
}

impl Linear {
    /// A projection with weights `[out, in]` and an optional bias `[out]`.
    ///
    /// # Panics
    /// When the bias has another length than the weights have rows.
    pub fn new(weight: PackedMatrix, bias: Option<Vec<f32>>) -> Linear {
        if let Some(bias) = &bias {
            assert_eq!(bias.len(), weight.out_features(), "a bias has one element an output");
        }
        Linear { weight, bias }
    }

    /// Says that the weights are read after the next job; threads that have to wait fetch them meanwhile.
    pub fn announce(&self) {
        self.weight.announce();
    }

    /// The packed weights.
    pub fn weight(&self) -> &PackedMatrix {
        &self.weight
    }

    /// `x` f32 `[n, in]` to f32 `[n, out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        with_rows("linear", "x", x, self.weight.in_features(), |x, n| {
            let mut out = unfilled(n * self.weight.out_features());
            linear(Form::current(), x, &self.weight, self.bias.as_deref(), &mut out);
            Tensor::from_vec(out, (n, self.weight.out_features()), &Device::Cpu)
        })
    }
}

/// Rows `ids` of the table as f32 `[n, width]`.
pub fn embedding(table: &PackedMatrix, ids: &[u32], device: &Device) -> Result<Tensor> {
    check_cpu("embedding", device)?;
    let width = table.in_features();
    let mut out = unfilled(ids.len() * width);
    for (&id, row) in ids.iter().zip(out.chunks_exact_mut(width.max(1))) {
        check_index("embedding", "token id", id as usize, table.out_features())?;
        table.unpack_row(id as usize, row);
    }
    Tensor::from_vec(out, (ids.len(), width), device)
}

/// Fails unless an optional per-feature vector has `width` elements.
pub(crate) fn check_len(
    op: &'static str,
    what: &'static str,
    got: usize,
    width: usize,
) -> std::result::Result<(), KernelError> {
    check_shape(op, what, &[got], &[width])
}
