//! The wire: what clients send becomes engine requests, and the engine's events become what clients read.
//!
//! The only crate that knows JSON. It knows no HTTP either: an [`ApiError`] names a status code, a body is bytes.
//! A request is read by [`accept`]; the [`Reply`] it gives turns the events of its requests into the body or the
//! chunks of the answer.

#![forbid(unsafe_code)]

mod accept;
#[cfg(test)]
mod accept_tests;
mod body;
mod chat;
mod chat_reply;
mod completion_reply;
mod completions;
mod control;
mod error;
#[cfg(test)]
mod fixtures;
mod generate;
mod generate_reply;
mod head;
mod logprobs;
mod models;
mod nvext;
mod openapi;
mod output;
mod prompt;
mod replay;
#[cfg(test)]
mod reply_tests;
mod rows;
mod rows_reply;
mod sampling;
mod sglang;
mod sglang_reply;
mod stream_options;
mod tokenize;
mod unsupported;
mod usage;

pub use accept::{Accepted, Dialect, Reply, RequestContext, accept};
pub use control::{Done, PauseOrder, UpdateOrder, abort_order, pause_order, server_info, update_order};
pub use error::ApiError;
pub use models::{model_card, model_list, version};
pub use openapi::openapi;
pub use output::{ChoiceOutput, RequestOutput, event_weight};
pub use rows::RowsFormat;
pub use sampling::DefaultSampling;
pub use tokenize::{detokenize, tokenize};
