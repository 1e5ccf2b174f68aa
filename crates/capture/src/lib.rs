//! The ring of routed experts, one row per KV slot, and the one way rows leave it for a ledger.
//!
//! A row is valid exactly as long as its block's KV is: block and generation name it.
#![forbid(unsafe_code)]

mod drain;
mod layout;
mod plan;
mod ring;

pub use drain::{DrainError, Drained, drain};
pub use layout::RingLayout;
pub use plan::{GatherPlan, SlotRun};
pub use ring::{CaptureRing, Cells};
