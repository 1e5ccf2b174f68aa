//! Every hot operation of the engine, on CPU beneath candle tensors, in the form ([`Form`]) that is chosen once.
//!
//! The kernels are batch-invariant: the order in which an output element is summed depends on the layer's shape (and,
//! in attention, on absolute key positions) alone, never on the number of rows, the threads, the chunk or the block
//! size. A row computed alone has the same bits as the row computed in any batch.
//!
//! This is the only crate that knows pointers and vector instructions. `reference` holds the obvious form of each
//! operation, the truth of the tests.

// Index loops run over several slices and pointers at once, as the shapes in the comments say.
#![allow(clippy::needless_range_loop)]

mod activation;
mod acts;
mod affinity;
mod attention;
mod blocks;
mod buffer;
mod error;
mod expert_ffn;
mod expert_middle;
mod expert_plan;
mod expert_product;
mod experts;
mod form;
mod format;
pub mod gpu;
mod kv;
mod linear;
mod norm;
mod pack;
mod packed;
mod patience;
pub mod pool;
mod product;
mod qkv;
pub mod reference;
mod replay;
mod rope;
mod router;
mod scratch;
mod simd;
mod tensor;
mod upcoming;
mod weights;

pub use activation::{silu_and_mul, silu_and_mul_rows};
pub use attention::{AttentionCall, AttentionShape, SeqSpan, paged_attention};
pub use blocks::BlockRows;
pub use error::KernelError;
pub use expert_ffn::{expert_ffn, experts_rows};
pub use experts::{ExpertMatrix, PackedExperts, PackedExpertsBuilder};
pub use form::Form;
pub use format::WeightFormat;
pub use kv::{KvPool, LayerKv};
pub use linear::{Linear, embedding};
pub use norm::{add_rms_norm, add_rms_norm_rows, rms_norm, rms_norm_rows};
pub use pack::WeightRows;
pub use packed::{PANEL, PackedMatrix, PackedMatrixBuilder};
pub use product::linear;
pub use qkv::{QkNorm, QkvCall, qkv_rope_store};
pub use replay::ReplayRows;
pub use rope::RopeTable;
pub use router::{RingCells, RingWrite, RouterConfig, RouterWeight, Routing, RowMarks, route, select};
pub use tensor::with_elements;
pub use weights::{WeightDtype, WeightView};
