use std::sync::{Arc, Mutex};

use moetrail_kernels::gpu::{
    self, Arena, AttentionPlan, DeviceBuffer, DeviceExperts, DeviceExpertsBuilder, DeviceKv, DeviceMatrix,
    DeviceMatrixBuilder, DeviceQkNorm, DeviceReplay, DeviceRing, DeviceRingWrite, DeviceRope, DeviceRouter,
    DeviceRouterConfig, DeviceRouting, DeviceRows, Gpu, RoutedRows, Upload,
};
use moetrail_kernels::{
    ExpertMatrix, QkNorm, RopeTable, RouterConfig, WeightDtype, WeightFormat, WeightRows, WeightView,
};

use crate::backend::gpu_step::GpuStep;
use crate::backend::recordings::Recordings;
use crate::backend::{AttentionOf, Backend, KernelResult, LayerCache, PutExperts, PutRows, Residual};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::pending::PendingMarks;
use crate::step::StepInput;

/// A GPU and what a decoder keeps there besides weights.
#[derive(Debug)]
pub(crate) struct GpuBackend {
    pub(crate) arena: Arena,
    /// What weights are packed with.
    loading: Gpu,
    /// Of operands and the cache.
    dtype: WeightDtype,
    /// One step at a time is begun.
    upload: LazyUpload,
    /// Of what is sampled after it.
    pub(super) sampling: LazyUpload,
    pub(crate) recordings: Mutex<Recordings>,
}

/// Made when it is first used.
pub(super) type LazyUpload = Mutex<Option<Upload>>;

impl Clone for GpuBackend {
    /// The same device with scratch memory of its own: what a recorded step of one clone writes is nothing to the others.
    fn clone(&self) -> Self {
        Self::new(self.gpu(), self.dtype)
    }
}

/// A projection's weights and bias.
#[derive(Clone, Debug)]
pub(crate) struct DeviceLinear {
    matrix: DeviceMatrix,
    bias: Option<Arc<DeviceBuffer>>,
}

/// The experts of a step's rows, and how many each has.
pub(crate) struct GpuRouting {
    chosen: DeviceRouting,
    top_k: usize,
}

impl GpuBackend {
    /// A backend whose operands are of this dtype.
    pub(crate) fn new(gpu: &Gpu, dtype: WeightDtype) -> Self {
        let (upload, sampling, recordings) = Default::default();
        Self { arena: Arena::new(gpu), loading: gpu.for_loading(), dtype, upload, sampling, recordings }
    }

    pub(crate) fn gpu(&self) -> &Gpu {
        self.arena.gpu()
    }

    /// What a locked upload holds.
    pub(super) fn made<'a>(&self, upload: &'a mut Option<Upload>) -> Result<&'a mut Upload> {
        Ok(match upload {
            Some(upload) => upload,
            none => none.insert(Upload::new(self.gpu(), 1 << 16)?),
        })
    }
}

impl DeviceLinear {
    pub(crate) fn out_features(&self) -> usize {
        self.matrix.out_features()
    }
}

impl Backend for GpuBackend {
    type Rows = DeviceRows;
    type Operand = DeviceRows;
    type Vector = Arc<DeviceBuffer>;
    type Matrix = DeviceMatrix;
    type MatrixBuilder = DeviceMatrixBuilder;
    type Linear = DeviceLinear;
    type Router = Arc<DeviceRouter>;
    type Experts = DeviceExperts;
    type ExpertsBuilder = DeviceExpertsBuilder;
    type QkNorm = Arc<DeviceQkNorm>;
    type Rope = Arc<DeviceRope>;
    type Kv = DeviceKv;
    type Ring<'a> = &'a DeviceRing;
    type Step<'a> = GpuStep<'a>;
    type Routing = GpuRouting;

    fn packs(&self, _blocks: WeightFormat) -> bool {
        false
    }

    fn matrix(&self, out: usize, inp: usize, _format: WeightFormat) -> KernelResult<DeviceMatrixBuilder> {
        Ok(DeviceMatrixBuilder::zeros(&self.loading, out, inp, self.dtype)?)
    }

    fn experts(&self, config: &ModelConfig, _formats: [WeightFormat; 2]) -> KernelResult<DeviceExpertsBuilder> {
        let (count, hidden, inter) = (config.num_experts, config.hidden_size, config.moe_intermediate_size);
        Ok(DeviceExperts::builder(&self.loading, count, hidden, inter, self.dtype)?)
    }

    fn with_bias(&self, matrix: DeviceMatrix, bias: Option<Vec<f32>>) -> Result<DeviceLinear> {
        let bias = bias.map(|bias| DeviceBuffer::of(&self.loading, &bias)).transpose()?;
        Ok(DeviceLinear { matrix, bias: bias.map(Arc::new) })
    }

    fn router(&self, gate: WeightView<'_>) -> KernelResult<Arc<DeviceRouter>> {
        Ok(Arc::new(DeviceRouter::new(&self.loading, gate, None)?))
    }

    fn vector(&self, values: Vec<f32>) -> Result<Arc<DeviceBuffer>> {
        Ok(DeviceBuffer::of(&self.loading, &values).map(Arc::new)?)
    }

    fn qk_norm(&self, norm: QkNorm) -> Result<Arc<DeviceQkNorm>> {
        Ok(DeviceQkNorm::new(&self.loading, &norm).map(Arc::new)?)
    }

    fn rope(&self, table: RopeTable) -> Result<Arc<DeviceRope>> {
        Ok(DeviceRope::new(&self.loading, &table).map(Arc::new)?)
    }

    fn loaded(&self) -> Result<()> {
        Ok(self.loading.finish(self.loading.stream())?)
    }

    fn kv(&self, config: &ModelConfig, num_blocks: usize, block_size: usize, dtype: WeightDtype) -> Result<DeviceKv> {
        let (layers, kv_heads) = (config.num_hidden_layers, config.num_key_value_heads);
        Ok(DeviceKv::new(self.gpu(), layers, num_blocks, block_size, kv_heads, config.head_dim, dtype)?)
    }

    fn matrix_bytes(matrix: &DeviceMatrix) -> usize {
        matrix.bytes()
    }

    fn router_bytes(router: &Arc<DeviceRouter>) -> usize {
        router.bytes()
    }

    fn experts_bytes(experts: &DeviceExperts) -> usize {
        experts.bytes()
    }

    fn begin<'a>(
        &self,
        input: &StepInput<'a>,
        ring: Option<&'a DeviceRing>,
        config: &ModelConfig,
        kv: &DeviceKv,
    ) -> Result<GpuStep<'a>> {
        let plan = AttentionPlan::new(&config.attention_shape(), kv, input.seqs)?;
        let marks = Arc::new(self.arena.take(2 * input.token_ids.len() * 4)?);
        let mut upload = self.upload.lock().unwrap_or_else(|poison| poison.into_inner());
        GpuStep::new(self.made(&mut upload)?, marks, input, plan, ring, config.moe_layers.len())
    }

    fn embed(&self, step: &GpuStep<'_>, table: &DeviceMatrix) -> Result<DeviceRows> {
        Ok(gpu::embedding(&self.arena, table, step.token_ids, step.num_rows)?)
    }

    fn norm(&self, stream: Residual<Self>, weight: &Arc<DeviceBuffer>, eps: f32) -> Result<(DeviceRows, DeviceRows)> {
        let Residual { x, addition } = stream;
        let normed = gpu::add_rms_norm(&self.arena, &x, addition.as_ref(), weight, eps, self.dtype)?;
        Ok((x, normed))
    }

    fn linear(&self, x: &DeviceRows, linear: &DeviceLinear) -> Result<DeviceRows> {
        Ok(gpu::linear(&self.arena, x, &linear.matrix, linear.bias.as_deref())?)
    }

    fn silu_and_mul(&self, x: &DeviceRows) -> Result<DeviceRows> {
        Ok(gpu::silu_and_mul(&self.arena, x, self.dtype)?)
    }

    fn attend(
        &self,
        step: &GpuStep<'_>,
        qkv: &DeviceRows,
        attention: AttentionOf<'_, Self>,
        cache: LayerCache<'_, Self>,
    ) -> Result<DeviceRows> {
        let (AttentionOf { shape, norm }, LayerCache { kv, layer, rope }) = (attention, cache);
        let norm = norm.map(|norm| &**norm);
        let q = gpu::qkv_rope_store(&self.arena, qkv, shape, norm, rope, step.positions, step.slots, kv, layer)?;
        Ok(gpu::paged_attention(&self.arena, &q, shape, &step.plan, step.plan_at, kv, layer)?)
    }

    fn route(
        &self,
        step: &mut GpuStep<'_>,
        x: &DeviceRows,
        router: &Arc<DeviceRouter>,
        routing: &RouterConfig,
        moe_layer: usize,
    ) -> Result<GpuRouting> {
        let capture = step.ring.map(|ring| DeviceRingWrite { ring, moe_layer });
        let moe_layers = step.moe_layers;
        let replay = step.replay.map(|[row_of, ids]| DeviceReplay { row_of, ids, moe_layers, moe_layer });
        let config = DeviceRouterConfig::from(*routing);
        // Also where nothing is captured: rows that pad a recorded step are to choose no expert.
        let rows = RoutedRows { slots: Some(step.slots), capture, replay, marks: step.marks.address() };
        let chosen = gpu::route(&self.arena, x, router, &config, &rows)?;
        Ok(GpuRouting { chosen, top_k: routing.top_k })
    }

    fn expert_ffn(&self, x: &DeviceRows, routing: &GpuRouting, experts: &DeviceExperts) -> Result<DeviceRows> {
        let (ids, weights) = (routing.chosen.topk_ids.address(), routing.chosen.topk_weights.address());
        Ok(gpu::expert_ffn(&self.arena, x, ids, weights, routing.top_k, experts)?)
    }

    fn logit_rows(&self, step: &GpuStep<'_>, stream: Residual<Self>) -> Result<Residual<Self>> {
        let Residual { x, addition } = stream;
        let x = gpu::select_rows(&self.arena, &x, addition.as_ref(), step.logit_rows, step.num_logit_rows)?;
        Ok(Residual { x, addition: None })
    }

    fn end(&self, step: GpuStep<'_>) -> PendingMarks {
        let num_rows = step.num_rows;
        PendingMarks::Device(step.marks(num_rows))
    }
}

impl PutRows for DeviceMatrixBuilder {
    type Packed = DeviceMatrix;

    fn put_rows(&mut self, first: usize, rows: WeightRows<'_>) -> KernelResult<()> {
        DeviceMatrixBuilder::put_rows(self, first, rows)
    }

    fn finish(self) -> DeviceMatrix {
        DeviceMatrixBuilder::finish(self)
    }
}

impl PutExperts for DeviceExpertsBuilder {
    type Packed = DeviceExperts;

    fn put(&mut self, expert: usize, matrix: ExpertMatrix, rows: WeightRows<'_>) -> KernelResult<()> {
        DeviceExpertsBuilder::put(self, expert, matrix, rows)
    }

    fn finish(self) -> DeviceExperts {
        DeviceExpertsBuilder::finish(self)
    }
}
