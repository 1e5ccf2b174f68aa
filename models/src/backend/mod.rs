//! What a network computes with: rows of activations, packed weights, and the operations on them.

mod cpu;
mod gpu;
mod gpu_step;
mod recordings;
mod sample;

use std::fmt;

use moetrail_kernels::{
    AttentionShape, ExpertMatrix, KernelError, QkNorm, RopeTable, RouterConfig, WeightDtype, WeightFormat, WeightRows,
    WeightView,
};

use crate::config::ModelConfig;
use crate::error::Result;
use crate::pending::PendingMarks;
use crate::step::StepInput;

pub(crate) use cpu::Cpu;
pub(crate) use gpu::GpuBackend;

/// What a kernel gives, or why it refuses.
pub(crate) type KernelResult<T> = std::result::Result<T, KernelError>;

/// A processor with its kernels. The network is written once, over this.
///
/// Two kinds of rows flow: [`Rows`](Self::Rows) are f32 and are added and normalised, [`Operand`](Self::Operand)s are what
/// products read. All are `[rows, width]` of one step.
pub(crate) trait Backend: Clone + fmt::Debug + Send + Sync + 'static {
    type Rows;
    type Operand;
    /// F32 `[width]`.
    type Vector: Clone + Send + Sync;
    /// `[out, in]`, packed.
    type Matrix: Clone + Send + Sync;
    type MatrixBuilder: PutRows<Packed = Self::Matrix>;
    /// A matrix with a bias.
    type Linear: Clone + Send + Sync;
    type Router: Clone + Send + Sync;
    type Experts: Clone + Send + Sync;
    type ExpertsBuilder: PutExperts<Packed = Self::Experts>;
    type QkNorm: Clone + Send + Sync;
    type Rope: Clone + Send + Sync;
    /// The cache of keys and values.
    type Kv;
    /// The ring of routed experts, for a step.
    type Ring<'a>;
    /// What a step reads besides activations, and what is to be told of its rows.
    type Step<'a>;
    /// The experts of a step's rows.
    type Routing;

    /// The format in which blocks of this one are packed: their own, if the kernels read it.
    fn packs(&self, blocks: WeightFormat) -> bool;
    fn matrix(&self, out: usize, inp: usize, format: WeightFormat) -> KernelResult<Self::MatrixBuilder>;
    fn experts(&self, config: &ModelConfig, formats: [WeightFormat; 2]) -> KernelResult<Self::ExpertsBuilder>;
    fn with_bias(&self, matrix: Self::Matrix, bias: Option<Vec<f32>>) -> Result<Self::Linear>;
    fn router(&self, gate: WeightView<'_>) -> KernelResult<Self::Router>;
    fn vector(&self, values: Vec<f32>) -> Result<Self::Vector>;
    fn qk_norm(&self, norm: QkNorm) -> Result<Self::QkNorm>;
    fn rope(&self, table: RopeTable) -> Result<Self::Rope>;
    /// Blocks until the weights are where they were put: steps do not wait for them.
    fn loaded(&self) -> Result<()> {
        Ok(())
    }
    fn kv(&self, config: &ModelConfig, num_blocks: usize, block_size: usize, dtype: WeightDtype) -> Result<Self::Kv>;

    fn matrix_bytes(matrix: &Self::Matrix) -> usize;
    fn router_bytes(router: &Self::Router) -> usize;
    fn experts_bytes(experts: &Self::Experts) -> usize;

    /// Hands a step's numbers over; they were checked.
    fn begin<'a>(
        &self,
        input: &StepInput<'a>,
        ring: Option<Self::Ring<'a>>,
        config: &ModelConfig,
        kv: &Self::Kv,
    ) -> Result<Self::Step<'a>>;
    /// The embeddings of the step's tokens.
    fn embed(&self, step: &Self::Step<'_>, table: &Self::Matrix) -> Result<Self::Rows>;
    /// The stream with its last addition made, and the norm of it.
    fn norm(&self, stream: Residual<Self>, weight: &Self::Vector, eps: f32) -> Result<(Self::Rows, Self::Operand)>;
    fn linear(&self, x: &Self::Operand, linear: &Self::Linear) -> Result<Self::Rows>;
    /// `silu(gate) * up` of rows that hold gate before up.
    fn silu_and_mul(&self, x: &Self::Rows) -> Result<Self::Operand>;
    /// Stores keys and values of projected rows in a layer of the cache, and attends.
    fn attend(
        &self,
        step: &Self::Step<'_>,
        qkv: &Self::Rows,
        attention: AttentionOf<'_, Self>,
        cache: LayerCache<'_, Self>,
    ) -> Result<Self::Operand>;
    /// Picks or takes the experts of every row in MoE layer `moe_layer`, and writes them to the ring.
    fn route(
        &self,
        step: &mut Self::Step<'_>,
        x: &Self::Operand,
        router: &Self::Router,
        routing: &RouterConfig,
        moe_layer: usize,
    ) -> Result<Self::Routing>;
    fn expert_ffn(&self, x: &Self::Operand, routing: &Self::Routing, experts: &Self::Experts) -> Result<Self::Rows>;
    /// The rows of the stream whose logits the step wants.
    fn logit_rows(&self, step: &Self::Step<'_>, stream: Residual<Self>) -> Result<Residual<Self>>;
    /// What is to be told of the step's rows.
    fn end(&self, step: Self::Step<'_>) -> PendingMarks;

    /// Says that the weights are read after the next job.
    fn announce(&self, _linear: &Self::Linear) {}
    /// As [`announce`](Self::announce).
    fn announce_router(&self, _router: &Self::Router) {}
}

/// A matrix while its rows come.
pub(crate) trait PutRows {
    type Packed;
    fn put_rows(&mut self, first: usize, rows: WeightRows<'_>) -> KernelResult<()>;
    fn finish(self) -> Self::Packed;
}

/// Experts while their matrices come: gate and up `[inter, hidden]`, down `[hidden, inter]`.
pub(crate) trait PutExperts {
    type Packed;
    fn put(&mut self, expert: usize, matrix: ExpertMatrix, rows: WeightRows<'_>) -> KernelResult<()>;
    fn finish(self) -> Self::Packed;
}

/// The residual stream, and what is still to be added to it: the norm that follows does both at once.
pub(crate) struct Residual<B: Backend> {
    pub(crate) x: B::Rows,
    pub(crate) addition: Option<B::Rows>,
}

/// How projected rows attend.
pub(crate) struct AttentionOf<'a, B: Backend> {
    pub(crate) shape: &'a AttentionShape,
    pub(crate) norm: Option<&'a B::QkNorm>,
}

/// Where a layer's keys and values go, and how positions turn them.
pub(crate) struct LayerCache<'a, B: Backend> {
    pub(crate) kv: &'a mut B::Kv,
    pub(crate) layer: usize,
    pub(crate) rope: &'a B::Rope,
}
