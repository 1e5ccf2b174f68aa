//! From stored tensors to packed weights, tensor by tensor.

use std::collections::BTreeSet;
use std::ops::Range;

use indicatif::{ProgressBar, ProgressStyle};
use moetrail_kernels::{KernelError, PackedMatrix, WeightDtype, WeightView};

use crate::dtype::from_safetensors;
use crate::error::{ModelError, Result};
use crate::shards::{Shards, StoredTensor};

/// Hands out checked tensors, counts what was used, and gives the pages back once they are packed.
///
/// Shapes are checked before anything is allocated, so a corrupt configuration cannot ask for more memory than the
/// files it comes with account for.
pub(crate) struct Loader<'a> {
    shards: &'a Shards,
    dtype: WeightDtype,
    progress: ProgressBar,
    used: BTreeSet<String>,
    packed_bytes: usize,
}

/// A stored tensor whose shape and dtype were checked.
#[derive(Debug, Clone)]
pub(crate) struct Checked<'a> {
    pub(crate) name: String,
    pub(crate) dtype: WeightDtype,
    pub(crate) stored: StoredTensor<'a>,
}

impl<'a> Loader<'a> {
    pub(crate) fn new(shards: &'a Shards, dtype: WeightDtype, progress: bool) -> Self {
        let bar = match progress {
            true => ProgressBar::new(shards.bytes()),
            false => ProgressBar::hidden(),
        };
        let template = "loading weights {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        bar.set_style(ProgressStyle::with_template(template).expect("the template is well formed"));
        Self { shards, dtype, progress: bar, used: BTreeSet::new(), packed_bytes: 0 }
    }

    pub(crate) fn shards(&self) -> &'a Shards {
        self.shards
    }

    /// The dtype that weights are packed in.
    pub(crate) fn dtype(&self) -> WeightDtype {
        self.dtype
    }

    /// The tensor of that name, which must have one of the shapes.
    pub(crate) fn tensor(&mut self, name: &str, shapes: &[&[usize]]) -> Result<Checked<'a>> {
        let Some(stored) = self.shards.get(name) else {
            return Err(ModelError::MissingTensor {
                folder: self.shards.folder().to_owned(),
                tensor: name.to_owned(),
                expected: shapes[0].to_vec(),
            });
        };
        if !shapes.contains(&stored.shape()) {
            let mut expected: Vec<String> = shapes.iter().map(|shape| format!("{shape:?}")).collect();
            expected.dedup();
            return Err(ModelError::Shape {
                path: stored.path().to_owned(),
                tensor: name.to_owned(),
                expected: expected.join(" or "),
                found: stored.shape().to_vec(),
            });
        }
        let Some(dtype) = from_safetensors(stored.dtype()) else {
            return Err(ModelError::Dtype {
                path: stored.path().to_owned(),
                tensor: name.to_owned(),
                found: format!("{:?}", stored.dtype()),
            });
        };
        self.used.insert(name.to_owned());
        let name = name.to_owned();
        Ok(Checked { name, dtype, stored })
    }

    /// Matrices of one width packed below each other: `[sum of rows, width]`.
    pub(crate) fn packed(&mut self, parts: &[(&str, usize)], width: usize) -> Result<PackedMatrix> {
        let mut tensors = Vec::with_capacity(parts.len());
        for &(name, rows) in parts {
            tensors.push((self.tensor(name, &[&[rows, width]])?, rows));
        }
        let rows = parts.iter().map(|(_, rows)| rows).sum();
        let mut matrix = PackedMatrix::zeros(rows, width, self.dtype);
        let mut first = 0;
        for (tensor, rows) in tensors {
            let view = WeightView::row_major(tensor.stored.bytes(), tensor.dtype, rows, width);
            let put = matrix.put_rows(first, view);
            put.map_err(|source| tensor.pack_error(source))?;
            self.done(&tensor, 0..tensor.stored.bytes().len());
            first += rows;
        }
        let matrix = matrix.finish();
        self.count_packed(matrix.bytes());
        Ok(matrix)
    }

    /// Counts weights that were packed other than by [`packed`](Self::packed).
    pub(crate) fn count_packed(&mut self, bytes: usize) {
        self.packed_bytes += bytes;
    }

    /// Tensors of any shape as f32, one after the other.
    pub(crate) fn floats(&mut self, parts: &[(&str, &[usize])]) -> Result<Vec<f32>> {
        let mut tensors = Vec::with_capacity(parts.len());
        for &(name, shape) in parts {
            tensors.push(self.tensor(name, &[shape])?);
        }
        let mut floats = Vec::new();
        for tensor in tensors {
            let bytes = tensor.stored.bytes();
            let len = bytes.len() / tensor.dtype.bytes();
            let view = WeightView::row_major(bytes, tensor.dtype, 1, len);
            floats.extend((0..len).map(|col| view.get(0, col)));
            self.done(&tensor, 0..bytes.len());
        }
        Ok(floats)
    }

    /// Notes that a range of a tensor's bytes is packed and will not be read again.
    pub(crate) fn done(&self, tensor: &Checked<'_>, range: Range<usize>) {
        self.progress.inc(range.len() as u64);
        tensor.stored.release(range);
    }

    /// Ends a layer: the system maps pages around each that is read, also of tensors that are done with.
    pub(crate) fn end_layer(&self) {
        self.shards.release();
    }

    /// Marks a tensor as known although nothing of it is packed.
    pub(crate) fn skip(&mut self, name: &str) {
        self.used.insert(name.to_owned());
    }

    /// Ends the bar, names the tensors that nothing asked for, and returns the bytes of the packed weights.
    pub(crate) fn finish(self) -> usize {
        self.progress.finish_and_clear();
        self.shards.release();
        let unknown = |name: &&str| !self.used.contains(*name) && !name.ends_with("rotary_emb.inv_freq");
        let unused: Vec<&str> = self.shards.names().filter(unknown).collect();
        if let Some(first) = unused.first() {
            tracing::warn!(
                folder = %self.shards.folder().display(),
                count = unused.len(),
                first,
                "the checkpoint has tensors that its configuration does not call for; they were not loaded"
            );
        }
        self.packed_bytes
    }
}

impl Checked<'_> {
    pub(crate) fn pack_error(&self, source: KernelError) -> ModelError {
        ModelError::Pack { path: self.stored.path().to_owned(), tensor: self.name.clone(), source: Box::new(source) }
    }
}
