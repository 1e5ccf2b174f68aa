use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use moetrail_kernels::{
    ExpertMatrix, KvPool, Linear, PackedExperts, PackedExpertsBuilder, PackedMatrix, PackedMatrixBuilder, QkNorm,
    RingCells, RingWrite, RopeTable, RouterConfig, RouterWeight, Routing, WeightDtype, WeightFormat, WeightRows,
    WeightView, add_rms_norm, embedding, expert_ffn, paged_attention, qkv_rope_store, rms_norm, route, silu_and_mul,
};

use crate::backend::{AttentionOf, Backend, KernelResult, LayerCache, PutExperts, PutRows, Residual};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::pending::PendingMarks;
use crate::step::{Marks, StepInput};

/// The processor that everything else runs on. All rows are f32 tensors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cpu;

/// A step's slices, and what the routers have told so far.
pub(crate) struct CpuStep<'a> {
    input: StepInput<'a>,
    ring: Option<RingCells<'a>>,
    /// MoE layers, and experts of a row in each: the row of a replay.
    replay_shape: [usize; 2],
    marks: Marks,
}

impl Backend for Cpu {
    type Rows = Tensor;
    type Operand = Tensor;
    type Vector = Tensor;
    type Matrix = PackedMatrix;
    type MatrixBuilder = PackedMatrixBuilder;
    type Linear = Linear;
    type Router = RouterWeight;
    type Experts = PackedExperts;
    type ExpertsBuilder = PackedExpertsBuilder;
    type QkNorm = Arc<QkNorm>;
    type Rope = Arc<RopeTable>;
    type Kv = KvPool;
    type Ring<'a> = RingCells<'a>;
    type Step<'a> = CpuStep<'a>;
    type Routing = Routing;

    fn packs(&self, _blocks: WeightFormat) -> bool {
        true
    }

    fn matrix(&self, out: usize, inp: usize, format: WeightFormat) -> KernelResult<PackedMatrixBuilder> {
        Ok(PackedMatrix::zeros(out, inp, format))
    }

    fn experts(&self, config: &ModelConfig, [gate_up, down]: [WeightFormat; 2]) -> KernelResult<PackedExpertsBuilder> {
        let (count, hidden, inter) = (config.num_experts, config.hidden_size, config.moe_intermediate_size);
        Ok(PackedExperts::builder(count, hidden, inter, gate_up, down))
    }

    fn with_bias(&self, matrix: PackedMatrix, bias: Option<Vec<f32>>) -> Result<Linear> {
        Ok(Linear::new(matrix, bias))
    }

    fn router(&self, gate: WeightView<'_>) -> KernelResult<RouterWeight> {
        RouterWeight::new(gate)
    }

    fn vector(&self, values: Vec<f32>) -> Result<Tensor> {
        let len = values.len();
        Ok(Tensor::from_vec(values, len, &Device::Cpu)?)
    }

    fn qk_norm(&self, norm: QkNorm) -> Result<Arc<QkNorm>> {
        Ok(Arc::new(norm))
    }

    fn rope(&self, table: RopeTable) -> Result<Arc<RopeTable>> {
        Ok(Arc::new(table))
    }

    fn kv(&self, config: &ModelConfig, num_blocks: usize, block_size: usize, dtype: WeightDtype) -> Result<KvPool> {
        let (layers, kv_heads) = (config.num_hidden_layers, config.num_key_value_heads);
        Ok(KvPool::new(layers, num_blocks, block_size, kv_heads, config.head_dim, dtype))
    }

    fn matrix_bytes(matrix: &PackedMatrix) -> usize {
        matrix.bytes()
    }

    fn router_bytes(router: &RouterWeight) -> usize {
        router.bytes()
    }

    fn experts_bytes(experts: &PackedExperts) -> usize {
        experts.bytes()
    }

    fn begin<'a>(
        &self,
        input: &StepInput<'a>,
        ring: Option<RingCells<'a>>,
        config: &ModelConfig,
        _kv: &KvPool,
    ) -> Result<CpuStep<'a>> {
        let changed_cells = vec![0; input.replay.map_or(0, |replay| replay.row_of.len())];
        Ok(CpuStep {
            input: *input,
            ring,
            replay_shape: [config.moe_layers.len(), config.num_experts_per_tok],
            marks: Marks { nan_rows: Vec::new(), changed_cells },
        })
    }

    fn embed(&self, step: &CpuStep<'_>, table: &PackedMatrix) -> Result<Tensor> {
        Ok(embedding(table, step.input.token_ids, &Device::Cpu)?)
    }

    fn norm(&self, stream: Residual<Self>, weight: &Tensor, eps: f32) -> Result<(Tensor, Tensor)> {
        let Residual { x, addition } = stream;
        match addition {
            Some(addition) => Ok(add_rms_norm(&x, &addition, weight, eps)?),
            None => {
                let normed = rms_norm(&x, weight, eps)?;
                Ok((x, normed))
            }
        }
    }

    fn linear(&self, x: &Tensor, linear: &Linear) -> Result<Tensor> {
        Ok(linear.forward(x)?)
    }

    fn silu_and_mul(&self, x: &Tensor) -> Result<Tensor> {
        Ok(silu_and_mul(x)?)
    }

    fn attend(
        &self,
        step: &CpuStep<'_>,
        qkv: &Tensor,
        attention: AttentionOf<'_, Self>,
        cache: LayerCache<'_, Self>,
    ) -> Result<Tensor> {
        let (AttentionOf { shape, norm }, LayerCache { kv, layer, rope }) = (attention, cache);
        let (positions, slots) = (step.input.positions, step.input.slot_mapping);
        let q = qkv_rope_store(qkv, shape, norm.map(|norm| &**norm), rope, positions, slots, kv.layer_mut(layer))?;
        Ok(paged_attention(&q, shape, step.input.seqs, kv.layer_mut(layer))?)
    }

    fn route(
        &self,
        step: &mut CpuStep<'_>,
        x: &Tensor,
        router: &RouterWeight,
        routing: &RouterConfig,
        moe_layer: usize,
    ) -> Result<Routing> {
        let [moe_layers, _] = step.replay_shape;
        let capture = step.ring.as_mut().map(|ring| RingWrite {
            cells: again(ring),
            moe_layers,
            moe_layer,
            slots: step.input.slot_mapping,
        });
        let replay = step.input.replay.map(|replay| replay.of_layer(moe_layer, moe_layers));
        let routing = route(x, router, routing, capture, replay)?;
        step.marks.nan_rows.extend(&routing.marks.nan_rows);
        for &row in &routing.marks.changed_rows {
            step.marks.changed_cells[row as usize] += 1;
        }
        Ok(routing)
    }

    fn expert_ffn(&self, x: &Tensor, routing: &Routing, experts: &PackedExperts) -> Result<Tensor> {
        Ok(expert_ffn(x, routing, experts)?)
    }

    fn logit_rows(&self, step: &CpuStep<'_>, stream: Residual<Self>) -> Result<Residual<Self>> {
        let rows = step.input.logit_rows;
        if rows.is_empty() {
            let width = stream.x.dim(1)?;
            return Ok(Residual { x: Tensor::zeros((0, width), DType::F32, &Device::Cpu)?, addition: None });
        }
        let rows = Tensor::from_slice(rows, rows.len(), &Device::Cpu)?;
        let addition = stream.addition.map(|addition| addition.index_select(&rows, 0)).transpose()?;
        Ok(Residual { x: stream.x.index_select(&rows, 0)?, addition })
    }

    fn end(&self, step: CpuStep<'_>) -> PendingMarks {
        let mut marks = step.marks;
        marks.nan_rows.sort_unstable();
        marks.nan_rows.dedup();
        PendingMarks::Host(marks)
    }

    fn announce(&self, linear: &Linear) {
        linear.announce();
    }

    fn announce_router(&self, router: &RouterWeight) {
        router.announce();
    }
}

impl PutRows for PackedMatrixBuilder {
    type Packed = PackedMatrix;

    fn put_rows(&mut self, first: usize, rows: WeightRows<'_>) -> KernelResult<()> {
        PackedMatrixBuilder::put_rows(self, first, rows)
    }

    fn finish(self) -> PackedMatrix {
        PackedMatrixBuilder::finish(self)
    }
}

impl PutExperts for PackedExpertsBuilder {
    type Packed = PackedExperts;

    fn put(&mut self, expert: usize, matrix: ExpertMatrix, rows: WeightRows<'_>) -> KernelResult<()> {
        PackedExpertsBuilder::put(self, expert, matrix, rows)
    }

    fn finish(self) -> PackedExperts {
        PackedExpertsBuilder::finish(self)
    }
}

/// The same cells for a shorter while.
fn again<'a>(ring: &'a mut RingCells<'_>) -> RingCells<'a> {
    match ring {
        RingCells::U8(cells) => RingCells::U8(cells),
        RingCells::U16(cells) => RingCells::U16(cells),
    }
}
