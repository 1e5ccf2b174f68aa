//! From stored tensors to packed weights, tensor by tensor.

use std::collections::BTreeSet;
use std::ops::Range;

use candle_core::Device;
use candle_core::quantized::{QStorage, QTensor};
use indicatif::{ProgressBar, ProgressStyle};
use moetrail_kernels::{BlockRows, KernelError, WeightDtype, WeightFormat, WeightRows, WeightView};

use crate::backend::{Backend, KernelResult, PutRows};
use crate::dtype::StoredType;
use crate::error::{ModelError, Result};
use crate::shards::{Shards, StoredTensor};

/// Hands out checked tensors, counts what was used, and gives the pages back once they are packed.
///
/// Shapes are checked before anything is allocated, so a corrupt configuration cannot ask for more memory than the
/// files it comes with account for.
pub(crate) struct Loader<'a, B> {
    backend: B,
    shards: &'a Shards,
    dtype: WeightDtype,
    /// Of matrices that come as floats.
    format: WeightFormat,
    progress: ProgressBar,
    used: BTreeSet<String>,
    packed_bytes: usize,
    /// Formats of the packed matrices, in the order in which they came.
    formats: Vec<WeightFormat>,
}

/// A stored tensor whose shape and dtype were checked.
#[derive(Debug, Clone)]
pub(crate) struct Checked<'a> {
    pub(crate) name: String,
    pub(crate) stored: StoredTensor<'a>,
}

impl<'a, B: Backend> Loader<'a, B> {
    pub(crate) fn new(
        backend: B,
        shards: &'a Shards,
        dtype: WeightDtype,
        format: WeightFormat,
        progress: bool,
    ) -> Self {
        let bar = match progress {
            true => ProgressBar::new(shards.bytes()),
            false => ProgressBar::hidden(),
        };
        let template = "loading weights {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        bar.set_style(ProgressStyle::with_template(template).expect("the template is well formed"));
        let (used, formats) = (BTreeSet::new(), Vec::new());
        Self { backend, shards, dtype, format, progress: bar, used, packed_bytes: 0, formats }
    }

    /// What the weights are packed for.
    pub(crate) fn backend(&self) -> &B {
        &self.backend
    }

    pub(crate) fn shards(&self) -> &'a Shards {
        self.shards
    }

    /// The dtype of weights that are not quantised.
    pub(crate) fn dtype(&self) -> WeightDtype {
        self.dtype
    }

    /// The format that tensors of these types, which share a matrix, are packed in: blocks that the kernels read stay as
    /// they are, where the dtype is theirs and all are of one type.
    pub(crate) fn format(&self, types: impl IntoIterator<Item = StoredType>) -> WeightFormat {
        let mut formats = types.into_iter().map(StoredType::packed_as_is);
        match formats.next().flatten() {
            Some(first) if self.dtype == WeightDtype::BF16 && formats.all(|format| format == Some(first)) => {
                if self.backend.packs(first) { first } else { self.format }
            }
            _ => self.format,
        }
    }

    /// The tensor of that name, which must have one of the shapes.
    pub(crate) fn tensor(&mut self, name: &str, shapes: &[&[usize]]) -> Result<Checked<'a>> {
        let Some(stored) = self.shards.get_or_dummy(name, shapes[0]) else {
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
        if let StoredType::Other(_) = stored.dtype() {
            return Err(dtype_error(name, stored));
        }
        self.used.insert(name.to_owned());
        Ok(Checked { name: name.to_owned(), stored })
    }

    /// Matrices of one width packed below each other: `[sum of rows, width]`.
    pub(crate) fn packed(&mut self, parts: &[(&str, usize)], width: usize) -> Result<B::Matrix> {
        let mut tensors = Vec::with_capacity(parts.len());
        for &(name, rows) in parts {
            tensors.push((self.tensor(name, &[&[rows, width]])?, rows));
        }
        let rows = parts.iter().map(|(_, rows)| rows).sum();
        let format = self.format(tensors.iter().map(|(tensor, _)| tensor.stored.dtype()));
        let first_name = parts.first().map_or("", |(name, _)| name);
        let mut matrix = self.made(first_name, self.backend.matrix(rows, width, format))?;
        let mut first = 0;
        for (tensor, rows) in tensors {
            tensor.rows(0, rows, width, format, |view| matrix.put_rows(first, view))?;
            self.done(&tensor, 0..tensor.stored.bytes().len());
            first += rows;
        }
        let matrix = matrix.finish();
        self.count_packed(B::matrix_bytes(&matrix), &[format]);
        Ok(matrix)
    }

    /// What a backend made to hold the tensor of that name, or why it could not.
    pub(crate) fn made<T>(&self, tensor: &str, made: KernelResult<T>) -> Result<T> {
        made.map_err(|source| ModelError::Pack {
            path: self.shards.folder().to_owned(),
            tensor: tensor.to_owned(),
            source: Box::new(source),
        })
    }

    /// Counts weights that were packed other than by [`packed`](Self::packed).
    pub(crate) fn count_packed(&mut self, bytes: usize, formats: &[WeightFormat]) {
        self.packed_bytes += bytes;
        for format in formats {
            if !self.formats.contains(format) {
                self.formats.push(*format);
            }
        }
    }

    /// Tensors of any shape as f32, one after the other.
    pub(crate) fn floats(&mut self, parts: &[(&str, &[usize])]) -> Result<Vec<f32>> {
        let mut tensors = Vec::with_capacity(parts.len());
        for &(name, shape) in parts {
            tensors.push(self.tensor(name, &[shape])?);
        }
        let mut floats = Vec::new();
        for tensor in tensors {
            let (bytes, dtype) = (tensor.stored.bytes(), tensor.float()?);
            let len = bytes.len() / dtype.bytes();
            let view = WeightView::row_major(bytes, dtype, 1, len);
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

    /// Ends the bar, names the tensors that nothing asked for, and returns the bytes of the packed weights with the formats
    /// of the matrices.
    pub(crate) fn finish(self) -> (usize, Vec<WeightFormat>) {
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
        (self.packed_bytes, self.formats)
    }
}

impl Checked<'_> {
    /// The dtype of a tensor that is not quantised.
    pub(crate) fn float(&self) -> Result<WeightDtype> {
        self.stored.dtype().float().ok_or_else(|| dtype_error(&self.name, self.stored))
    }

    /// Calls `put` with rows `first..first + rows` of width `width`, as they are or as floats: as `format` can be packed
    /// from.
    pub(crate) fn rows(
        &self,
        first: usize,
        rows: usize,
        width: usize,
        format: WeightFormat,
        put: impl FnOnce(WeightRows<'_>) -> std::result::Result<(), KernelError>,
    ) -> Result<()> {
        let total: usize = self.stored.shape().iter().product::<usize>() / width.max(1);
        let row = self.stored.bytes().len() / total.max(1);
        let bytes = &self.stored.bytes()[first * row..(first + rows) * row];
        let in_order = self.stored.interleaved_heads().map(|heads| halves_in_order(bytes, row, rows / heads.max(1)));
        let bytes = in_order.as_deref().unwrap_or(bytes);
        let kind = match self.stored.dtype() {
            StoredType::Float(dtype) => {
                let view = WeightView::row_major(bytes, dtype, rows, width);
                return put(view.into()).map_err(|source| self.pack_error(source));
            }
            StoredType::Blocks(kind) => kind,
            StoredType::Other(_) => return Err(dtype_error(&self.name, self.stored)),
        };
        let packed = if self.stored.dtype().packed_as_is() == Some(format) {
            BlockRows::new(bytes, format, rows, width).and_then(|blocks| put(blocks.into()))
        } else {
            let tensor = QTensor::new(QStorage::from_data(bytes.into(), &Device::Cpu, kind)?, (rows, width))?;
            let floats = tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
            let bytes: Vec<u8> = floats.iter().flat_map(|value| value.to_le_bytes()).collect();
            put(WeightView::row_major(&bytes, WeightDtype::F32, rows, width).into())
        };
        packed.map_err(|source| self.pack_error(source))
    }

    pub(crate) fn pack_error(&self, source: KernelError) -> ModelError {
        ModelError::Pack { path: self.stored.path().to_owned(), tensor: self.name.clone(), source: Box::new(source) }
    }
}

/// Rows of heads of `dim` rows that alternate between the halves of a head, half after half.
fn halves_in_order(bytes: &[u8], row: usize, dim: usize) -> Vec<u8> {
    let mut ordered = Vec::with_capacity(bytes.len());
    for head in bytes.chunks(row * dim) {
        for half in 0..2 {
            (0..dim / 2).for_each(|i| ordered.extend_from_slice(&head[(2 * i + half) * row..][..row]));
        }
    }
    ordered
}

fn dtype_error(tensor: &str, stored: StoredTensor<'_>) -> ModelError {
    let (path, tensor) = (stored.path().to_owned(), tensor.to_owned());
    ModelError::Dtype { path, tensor, found: stored.dtype().to_string() }
}
