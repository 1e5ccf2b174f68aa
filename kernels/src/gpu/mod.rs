//! The kernels of `kernels/cuda`, and what they run on.
//!
//! Every launcher checks shapes as the CPU's entry points do, and hands addresses to a [`Driver`]: the CUDA driver, or
//! the emulation that the tests use. Nothing but [`cuda`], with the feature of that name, needs a toolkit to build.

mod arena;
mod attention;
mod choice;
pub mod cuda;
mod driver;
mod error;
mod expert_ffn;
mod experts;
mod kv;
mod linear;
mod matrix;
mod memory;
mod norm;
mod pinned_blocks;
mod plan;
mod qkv;
mod readback;
mod ring;
mod router;
mod rows;
mod sample;
mod staging;
mod take_sampled;
mod upload;

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard};

pub use arena::{Arena, Scratch};
pub use attention::paged_attention;
pub use choice::DeviceChoice;
pub use driver::{Address, Arg, CopyKind, Driver, Event, Graph, Launch, Pitched, Stream};
pub use error::GpuError;
pub use expert_ffn::{ExpertTiling, expert_ffn, expert_ffn_tiled};
pub use experts::{DeviceExperts, DeviceExpertsBuilder};
pub use kv::DeviceKv;
pub use linear::{LinearTiling, linear, linear_tiled};
pub use matrix::{DeviceMatrix, DeviceMatrixBuilder};
pub use memory::{DeviceBuffer, PinnedBuffer, Plain, bytes_of};
pub use norm::{add_rms_norm, embedding, select_rows, silu_and_mul};
pub use pinned_blocks::PinnedBlocks;
pub use plan::{ATTENTION_SPLIT, AttentionLaunches, AttentionPlan, DecodeBucket, attention_splits};
pub use qkv::{DeviceQkNorm, DeviceRope, qkv_rope_store};
pub use readback::PendingWords;
pub use ring::DeviceRing;
pub use router::{
    DeviceReplay, DeviceRingWrite, DeviceRouter, DeviceRouterConfig, DeviceRouting, RoutedRows, Scoring, route, select,
};
pub use rows::{DeviceRows, ROW_PAD};
pub use sample::{DeviceSamples, SampleBatch, SampleParams, SampledToken, TokenLogprob, sample, sample_with_limits};
pub use staging::{RowStaging, StagedRows};
pub use take_sampled::take_sampled;
pub use upload::Upload;

use crate::weights::WeightDtype;

/// A device. A clone is the same device.
#[derive(Clone, Debug)]
pub struct Gpu {
    driver: Arc<dyn Driver>,
    /// Where what is asked of this handle is issued.
    stream: Stream,
    /// Pinned memory for copies that the caller waits for.
    staging: Arc<Mutex<Option<PinnedBuffer>>>,
    /// Pinned memory for words that steps tell, while none do.
    readback: Arc<Mutex<Vec<PinnedBuffer>>>,
    /// Device memory for weights as they are stored, while they are packed.
    stored: Arc<Mutex<Option<DeviceBuffer>>>,
    deterministic: bool,
}

impl Gpu {
    /// The device behind a driver.
    pub fn new(driver: Arc<dyn Driver>) -> Gpu {
        let (staging, stored, readback) = Default::default();
        Gpu { driver, stream: Stream::Compute, staging, stored, readback, deterministic: false }
    }

    /// The same device; with `true`, the bits of a row never depend on how many rows are computed with it. Hopper's
    /// warpgroup instructions, which multiply many rows, may round otherwise than those for few, and are not used then.
    /// Everything that starts from this handle keeps it.
    pub fn with_deterministic(self, deterministic: bool) -> Gpu {
        Gpu { deterministic, ..self }
    }

    /// The same device, for weights that are loaded while others compute: everything is issued to [`Stream::Load`], and
    /// neither side waits for memory that the other copies through. What was made with this handle may be computed with
    /// once that stream has [finished](Self::finish).
    pub fn for_loading(&self) -> Gpu {
        let (staging, stored) = Default::default();
        Gpu { stream: Stream::Load, staging, stored, ..self.clone() }
    }

    /// Where what is asked of this handle is issued.
    pub fn stream(&self) -> Stream {
        self.stream
    }

    /// Refuses a handle that is for loading.
    pub(crate) fn must_compute(&self) {
        assert_eq!(self.stream, Stream::Compute, "what a step uses is made with a handle that computes");
    }

    /// Whether the bits of a row never depend on how many rows are computed with it.
    pub fn is_deterministic(&self) -> bool {
        self.deterministic
    }

    /// Whether large products with weights of this type are by Hopper's warpgroup instructions. Only machine code for
    /// compute capability 9.0 has them, which no other chip runs.
    pub fn uses_wgmma(&self, dtype: WeightDtype) -> bool {
        self.driver.capability() == 90 && !self.deterministic && dtype != WeightDtype::F32
    }

    /// What it runs on.
    pub fn driver(&self) -> &Arc<dyn Driver> {
        &self.driver
    }

    /// Launches a kernel on this handle's stream; over no blocks, nothing happens.
    ///
    /// # Safety
    /// As [`Driver::launch`].
    pub(crate) unsafe fn launch(&self, launch: Launch, args: &[Arg]) -> Result<(), GpuError> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        // SAFETY: the caller's contract.
        unsafe { self.driver.launch(self.stream, launch, args) }
    }

    /// Blocks until all that was issued to the stream has happened.
    pub fn finish(&self, stream: Stream) -> Result<(), GpuError> {
        let event = self.driver.record(stream)?;
        let done = self.driver.finish(event);
        self.driver.forget(event);
        done
    }

    /// A pinned buffer of at least this size, for the time of the borrow.
    fn staging(&self, bytes: usize) -> Result<Held<'_, PinnedBuffer>, GpuError> {
        Held::of(&self.staging, |buffer| buffer.len() >= bytes, || PinnedBuffer::new(self, room(bytes)))
    }

    /// A device buffer of at least this size, for the time of the borrow. What the last borrower issued to this handle's
    /// stream may still be to happen.
    pub(crate) fn stored(&self, bytes: usize) -> Result<Held<'_, DeviceBuffer>, GpuError> {
        Held::of(&self.stored, |buffer| buffer.bytes() >= bytes, || DeviceBuffer::new(self, room(bytes)))
    }
}

/// How large a buffer is made that is asked for so many bytes: it grows seldom, since giving the smaller one back waits for
/// all streams.
fn room(bytes: usize) -> usize {
    const LARGE: usize = 64 << 20;
    if bytes < LARGE { bytes.next_power_of_two() } else { bytes }
}

/// A buffer of a handle while somebody uses it.
pub(crate) struct Held<'a, B>(MutexGuard<'a, Option<B>>);

impl<'a, B> Held<'a, B> {
    /// The buffer, made anew unless it suits.
    fn of(
        buffer: &'a Mutex<Option<B>>,
        suits: impl FnOnce(&B) -> bool,
        make: impl FnOnce() -> Result<B, GpuError>,
    ) -> Result<Held<'a, B>, GpuError> {
        let mut held = buffer.lock().unwrap_or_else(|poison| poison.into_inner());
        if !held.as_ref().is_some_and(suits) {
            *held = None;
            *held = Some(make()?);
        }
        Ok(Held(held))
    }
}

impl<B> Deref for Held<'_, B> {
    type Target = B;

    fn deref(&self) -> &B {
        self.0.as_ref().expect("made when it was borrowed")
    }
}

impl<B> DerefMut for Held<'_, B> {
    fn deref_mut(&mut self) -> &mut B {
        self.0.as_mut().expect("made when it was borrowed")
    }
}
