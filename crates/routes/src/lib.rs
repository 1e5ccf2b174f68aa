//! Routed experts as data: which experts every layer chose for every token, by absolute position.
//!
//! Nothing here knows a device or an engine, so a router or a trainer can use it alone.
//! A row is one token's ids, `[num_layers, top_k]`; row `i` belongs to the token at absolute position `i`.
//!
//! A router merges what a prefill and a decode worker say of one request, whatever the format, and passes it on:
//!
//! ```
//! use moetrail_routes::format::{Format, Import};
//! use moetrail_routes::{Overlap, merge};
//! use serde_json::{Value, json};
//!
//! let prefill = json!({"choices": [{"routed_experts":
//!     {"data": "AQIDBA==", "shape": [2, 1, 2], "start": 0, "dtype": "uint8"}}]});
//! let mut decode = json!({"choices": [{"routed_experts": [[[3, 4]], [[5, 6]]], "routed_experts_start": 1}]});
//!
//! let import = Import::default();
//! let (first, second) = (import.read(&prefill)?, import.read(&decode)?);
//! let payload: Value = match merge(first.as_ref(), second.as_ref(), Overlap::First)? {
//!     Some(merged) => serde_json::from_str(&Format::Object.to_json(&merged.rows, 0)?)?,
//!     None => Value::Null,
//! };
//! assert_eq!(payload, json!({"data": "AQIDBAUG", "shape": [3, 1, 2], "start": 0, "dtype": "uint8"}));
//! decode["choices"][0]["routed_experts"] = payload;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A trainer stitches the turns of a conversation, each of which brought the rows from the last known one on, and reads
//! the experts to replay; [`into_data`](ExpertRows::into_data) gives the bytes, owned and writable, without a copy:
//!
//! ```
//! use moetrail_routes::format::Import;
//! use moetrail_routes::{RoutingStats, Turn, stitch};
//! use serde_json::json;
//!
//! let turn = |prompt: &[u32], completion: &[u32], reply: serde_json::Value| {
//!     let rows = Import::default().read(&reply)?;
//!     Ok::<_, Box<dyn std::error::Error>>(Turn { prompt_ids: prompt.into(), completion_ids: completion.into(), rows })
//! };
//! let stitched = stitch(&[
//!     turn(&[11, 12], &[13], json!({"data": "AQIDBA==", "shape": [2, 1, 2], "start": 0}))?,
//!     turn(&[11, 12, 13, 14], &[15], json!({"data": "BQYHCA==", "shape": [2, 1, 2], "start": 2}))?,
//! ])?;
//! let branch = &stitched.branches[0];
//! let rows = branch.rows.as_ref().expect("every turn had rows");
//! assert_eq!((branch.token_ids.len(), rows.shape()), (5, [4, 1, 2]));
//! assert_eq!(rows.ids(2, 0), Some(vec![5, 6]));
//! assert_eq!(RoutingStats::new(rows).layers[0].experts_used, 8);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
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
