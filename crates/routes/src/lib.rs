//! Routed experts as data: which experts every layer chose for every token, by absolute position.
//!
//! Nothing here knows a device or an engine, so a router or a trainer can use it alone.
//! A row is one token's ids, `[num_layers, top_k]`; row `i` belongs to the token at absolute position `i`.
#![forbid(unsafe_code)]

mod dtype;
pub mod format;
mod layout;
mod ledger;
mod merge;
mod rows;
mod segments;
mod span;
mod stats;
mod stitch;

pub use dtype::ExpertDtype;
pub use layout::RowLayout;
pub use ledger::{LedgerError, RowLedger};
pub use merge::{MergeError, Merged, Overlap, merge};
pub use rows::{ExpertRows, RowsError};
pub use segments::{Segment, SegmentError, merge_segments};
pub use span::TokenSpan;
pub use stats::{LayerStats, RoutingStats};
pub use stitch::{Branch, StitchError, StitchReason, Stitched, Turn, stitch};
