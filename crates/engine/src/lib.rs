//! The engine: one thread that owns the model, the KV pool and the ring, and a handle to reach it.
#![forbid(unsafe_code)]

mod capture;
mod choice;
mod config;
mod control;
mod device_sampling;
mod engine;
mod expert_load;
#[cfg(test)]
mod failure_tests;
#[cfg(test)]
mod fault;
mod finish;
mod flight;
#[cfg(test)]
mod gpu_tests;
mod hand_out;
mod handle;
mod info;
#[cfg(test)]
mod invariance_tests;
mod lifecycle;
#[cfg(test)]
mod lifecycle_tests;
mod logit_rows;
mod logprobs;
mod memory;
mod replay;
#[cfg(test)]
mod replay_tests;
mod request;
mod sampler;
mod sampling;
mod self_check;
mod start;
mod stats;
mod step;
mod swap;
mod token_counts;

pub use config::{EngineConfig, ReprefillRouting};
pub use control::{ControlError, PauseMode};
pub use handle::{EngineHandle, EventStream};
pub use info::EngineInfo;
pub use replay::{ReplayError, ReplayRows, RoutingShape};
pub use request::{
    ChoiceDelta, Event, Finish, FinishReason, GenerateRequest, PromptOutput, ReplayStats, RequestError, RowsError,
    StopReason, SubmitError, TokenLogprobs, WeightVersionSpan,
};
pub use sampling::SamplingParams;
pub use self_check::SelfCheckError;
pub use start::{Engine, StartError};
pub use stats::EngineStats;
