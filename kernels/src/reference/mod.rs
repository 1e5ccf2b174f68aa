//! The obvious form of every kernel: plain f32 loops, the truth the fast forms are tested against.

mod attention;
mod experts;
mod norm;
mod product;
mod qkv;
mod router;
mod sample;

pub use attention::attention;
pub use experts::expert_ffn;
pub use norm::{rms_norm, silu_and_mul};
pub use product::linear;
pub use qkv::qkv_rope;
pub use router::{choose_experts, compared_scores, expert_weights, softmax_weights};
pub use sample::{sample_candidates, sample_token, token_logprobs};
