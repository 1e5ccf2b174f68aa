//! The ring of routed experts, one row per KV slot, and the two doors by which rows leave it: [`drain`] to a ledger,
//! and whole blocks that move with their KV ([`HostRows`]).
//!
//! A row is valid exactly as long as its block's KV is: block and generation name it.
#![forbid(unsafe_code)]

mod device_ring;
mod drain;
mod host_rows;
mod layout;
mod plan;
mod ring;
mod sequence_rows;
#[cfg(test)]
mod state_machine_tests;

pub use device_ring::DeviceCells;
pub use drain::{Coming, DrainError, Drained, drain};
pub use host_rows::HostRows;
pub use layout::RingLayout;
pub use plan::{GatherPlan, SlotRun};
pub use ring::{CaptureRing, Cells};
pub use sequence_rows::SequenceRows;
