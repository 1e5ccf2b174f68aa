//! One file a family: what its configuration and its tensor names have of their own.

pub(crate) mod mixtral;
pub(crate) mod olmoe;
pub(crate) mod qwen3_moe;
