//! The experts of one layer, packed from any published layout.
//!
//! ```text
//! one expert each   gate [inter, hidden], up [inter, hidden], down [hidden, inter]
//! fused             gate_up [experts, 2 * inter, hidden], down [experts, hidden, inter]     transformers 5
//! fused, [in, out]  gate_up [experts, hidden, 2 * inter], down [experts, inter, hidden]
//! stacked           gate, up [experts, inter, hidden], down [experts, hidden, inter]        GGUF
//! ```

use moetrail_kernels::{ExpertMatrix, WeightDtype, WeightFormat, WeightView};

use crate::backend::{Backend, PutExperts};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::loader::{Checked, Loader};
use crate::names::ExpertNames;

/// Packs all experts of a layer; how gate and up are stored, and how down is, comes with them.
pub(crate) fn load<B: Backend>(
    loader: &mut Loader<'_, B>,
    config: &ModelConfig,
    names: &ExpertNames,
) -> Result<(B::Experts, [WeightFormat; 2])> {
    let [gate_up, _] = names.fused();
    let [gate, ..] = names.stacked();
    match loader.shards() {
        shards if shards.contains(&gate_up) => load_fused(loader, config, names),
        shards if shards.contains(&gate) => load_stacked(loader, config, names),
        _ => load_each(loader, config, names),
    }
}

/// A builder for experts that are stored like these.
fn builder<B: Backend>(
    loader: &Loader<'_, B>,
    config: &ModelConfig,
    inner: &[&Checked<'_>],
    down: &[&Checked<'_>],
) -> Result<(B::ExpertsBuilder, [WeightFormat; 2])> {
    let types = |tensors: &[&Checked<'_>]| tensors.iter().map(|tensor| tensor.stored.dtype()).collect::<Vec<_>>();
    let formats = [loader.format(types(inner)), loader.format(types(down))];
    let first = inner.first().map_or("", |tensor| &tensor.name);
    Ok((loader.made(first, loader.backend().experts(config, formats))?, formats))
}

fn load_stacked<B: Backend>(
    loader: &mut Loader<'_, B>,
    config: &ModelConfig,
    names: &ExpertNames,
) -> Result<(B::Experts, [WeightFormat; 2])> {
    let (count, hidden, inter) = (config.num_experts, config.hidden_size, config.moe_intermediate_size);
    let [gate, up, down] = names.stacked();
    let gate = loader.tensor(&gate, &[&[count, inter, hidden]])?;
    let up = loader.tensor(&up, &[&[count, inter, hidden]])?;
    let down = loader.tensor(&down, &[&[count, hidden, inter]])?;
    let (mut experts, formats) = builder(loader, config, &[&gate, &up], &[&down])?;
    let [gate_up_format, down_format] = formats;
    for expert in 0..count {
        gate.rows(expert * inter, inter, hidden, gate_up_format, |rows| experts.put(expert, ExpertMatrix::Gate, rows))?;
        up.rows(expert * inter, inter, hidden, gate_up_format, |rows| experts.put(expert, ExpertMatrix::Up, rows))?;
        down.rows(expert * hidden, hidden, inter, down_format, |rows| experts.put(expert, ExpertMatrix::Down, rows))?;
        for tensor in [&gate, &up, &down] {
            let size = tensor.stored.bytes().len() / count;
            loader.done(tensor, expert * size..(expert + 1) * size);
        }
    }
    Ok((experts.finish(), formats))
}

fn load_each<B: Backend>(
    loader: &mut Loader<'_, B>,
    config: &ModelConfig,
    names: &ExpertNames,
) -> Result<(B::Experts, [WeightFormat; 2])> {
    let (hidden, inter) = (config.hidden_size, config.moe_intermediate_size);
    let mut tensors = Vec::with_capacity(config.num_experts);
    for expert in 0..config.num_experts {
        let [gate, up, down] = names.of(expert);
        tensors.push([
            loader.tensor(&gate, &[&[inter, hidden]])?,
            loader.tensor(&up, &[&[inter, hidden]])?,
            loader.tensor(&down, &[&[hidden, inter]])?,
        ]);
    }
    let inner: Vec<&Checked<'_>> = tensors.iter().flat_map(|[gate, up, _]| [gate, up]).collect();
    let outer: Vec<&Checked<'_>> = tensors.iter().map(|[_, _, down]| down).collect();
    let (mut experts, formats) = builder(loader, config, &inner, &outer)?;
    let [gate_up_format, down_format] = formats;
    for (expert, [gate, up, down]) in tensors.iter().enumerate() {
        gate.rows(0, inter, hidden, gate_up_format, |rows| experts.put(expert, ExpertMatrix::Gate, rows))?;
        up.rows(0, inter, hidden, gate_up_format, |rows| experts.put(expert, ExpertMatrix::Up, rows))?;
        down.rows(0, hidden, inter, down_format, |rows| experts.put(expert, ExpertMatrix::Down, rows))?;
        for tensor in [gate, up, down] {
            loader.done(tensor, 0..tensor.stored.bytes().len());
        }
    }
    Ok((experts.finish(), formats))
}

fn load_fused<B: Backend>(
    loader: &mut Loader<'_, B>,
    config: &ModelConfig,
    names: &ExpertNames,
) -> Result<(B::Experts, [WeightFormat; 2])> {
    let (count, hidden, inter) = (config.num_experts, config.hidden_size, config.moe_intermediate_size);
    let [gate_up, down] = names.fused();
    let rows_first = [[count, 2 * inter, hidden], [count, hidden, inter]];
    let columns_first = [[count, hidden, 2 * inter], [count, inter, hidden]];
    let gate_up = loader.tensor(&gate_up, &[&rows_first[0], &columns_first[0]])?;
    let down = loader.tensor(&down, &[&rows_first[1], &columns_first[1]])?;
    // Where a shape fits both layouts the other tensor decides; where both fit both, it is transformers' own.
    let shapes = [gate_up.stored.shape(), down.stored.shape()];
    let turned = (0..2).any(|i| shapes[i] != rows_first[i]);
    if turned {
        let gate_up_shape: &[usize] = &columns_first[0];
        loader.tensor(&gate_up.name, &[gate_up_shape])?;
        loader.tensor(&down.name, &[&columns_first[1]])?;
    }
    let (mut experts, formats) = builder(loader, config, &[&gate_up], &[&down])?;
    let (gate_up_dtype, down_dtype) = (gate_up.float()?, down.float()?);
    for expert in 0..count {
        let gate = part(&gate_up, gate_up_dtype, expert, (2 * inter, hidden), (0, inter), turned);
        let up = part(&gate_up, gate_up_dtype, expert, (2 * inter, hidden), (inter, inter), turned);
        experts.put(expert, ExpertMatrix::Gate, gate.into()).map_err(|source| gate_up.pack_error(source))?;
        experts.put(expert, ExpertMatrix::Up, up.into()).map_err(|source| gate_up.pack_error(source))?;
        let outer = part(&down, down_dtype, expert, (hidden, inter), (0, hidden), turned);
        experts.put(expert, ExpertMatrix::Down, outer.into()).map_err(|source| down.pack_error(source))?;
        for tensor in [&gate_up, &down] {
            let size = tensor.stored.bytes().len() / count;
            loader.done(tensor, expert * size..(expert + 1) * size);
        }
    }
    Ok((experts.finish(), formats))
}

/// Rows `first..first + rows` of one expert's `[out, in]` matrix, which is stored `[in, out]` where `turned`.
fn part<'a>(
    tensor: &Checked<'a>,
    dtype: WeightDtype,
    expert: usize,
    (out, inp): (usize, usize),
    (first, rows): (usize, usize),
    turned: bool,
) -> WeightView<'a> {
    let width = dtype.bytes();
    let matrix = &tensor.stored.bytes()[expert * out * inp * width..][..out * inp * width];
    let (row_stride, col_stride) = if turned { (1, out) } else { (inp, 1) };
    WeightView { bytes: &matrix[first * row_stride * width..], dtype, rows, cols: inp, row_stride, col_stride }
}
