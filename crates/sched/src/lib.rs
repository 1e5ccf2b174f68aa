//! Who runs next, and where its KV lives: sequences, batches, the block pool with its prefix cache, the scheduler.
//!
//! Pure data: no tensor, no device, no async. The engine executes what a [`Batch`] says.
#![forbid(unsafe_code)]

mod batch;
mod block_hash;
mod block_pool;
mod free_list;
mod scheduler;
#[cfg(test)]
mod scheduler_tests;
mod sequence;
mod tiers;

pub use batch::{Batch, BlockMove, Scheduled};
pub use block_hash::{BlockHash, CacheScope};
pub use block_pool::{BlockPool, BlockRef};
pub use scheduler::{BeforeRelease, Release, Scheduler, SchedulerConfig};
pub use sequence::{NewSequence, RequestKey, SeqId, Sequence};
