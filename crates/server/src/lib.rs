//! HTTP over the engine: routes, server-sent events, errors, authentication, metrics.
//!
//! What bodies mean is `moetrail-api`'s business; this crate moves them. A request is cancelled by dropping its events,
//! which happens by itself when a client goes away and its handler or body is dropped.

#![forbid(unsafe_code)]

mod access;
mod app;
mod auth;
mod body;
mod control;
mod generation;
mod meta;
mod metrics;
mod rejection;
mod serve;
mod sse;
mod state;

pub use app::app;
pub use serve::serve;
pub use state::AppState;
