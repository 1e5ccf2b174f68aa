//! What a step tells of itself, which on a device is there once it has run.

use std::sync::Arc;

use moetrail_kernels::gpu::{DeviceSamples, SampledToken, Scratch};

use crate::error::Result;
use crate::step::Marks;

/// What the routers tell of a step's rows, when they have run.
#[derive(Debug)]
#[must_use]
pub enum PendingMarks {
    /// They have.
    Host(Marks),
    /// They may be about to.
    Device(DeviceMarks),
}

/// Marks on a device.
#[derive(Debug)]
pub struct DeviceMarks {
    /// U32 `[2, step_rows]`: NaN seen, cells changed.
    pub(crate) words: Arc<Scratch>,
    pub(crate) step_rows: usize,
    /// Those that do not pad the step.
    pub(crate) num_rows: usize,
    /// Whether cells could change.
    pub(crate) replayed: bool,
}

/// Tokens that a device samples, in order.
#[derive(Debug, Default)]
pub struct PendingTokens(pub(crate) Vec<DeviceSamples>);

impl PendingMarks {
    /// Waits for the step, and for the tokens sampled after it: once for all, and before the next step, which may take the
    /// same memory.
    ///
    /// # Errors
    /// The device failed.
    pub fn finish(self, tokens: &PendingTokens) -> Result<(Marks, Vec<SampledToken>)> {
        let samples = &tokens.0;
        let marks = match self {
            PendingMarks::Host(marks) => return Ok((marks, tokens.finish()?)),
            PendingMarks::Device(marks) => marks,
        };
        let mut parts: Vec<_> = samples.iter().map(DeviceSamples::place).collect();
        parts.push((marks.words.address(), 2 * marks.step_rows));
        let mut words: Vec<Vec<u32>> = marks.words.gpu().read_all(&parts)?;
        let found = marks.parse(&words.pop().unwrap_or_default());
        Ok((found, samples.iter().zip(&words).flat_map(|(samples, words)| samples.parse(words)).collect()))
    }
}

impl PendingTokens {
    /// Waits for the tokens.
    ///
    /// # Errors
    /// The device failed.
    pub fn finish(&self) -> Result<Vec<SampledToken>> {
        let tokens: std::result::Result<Vec<_>, _> = self.0.iter().map(DeviceSamples::to_host).collect();
        Ok(tokens?.concat())
    }
}

impl DeviceMarks {
    fn parse(&self, words: &[u32]) -> Marks {
        let (nan, changed) = words.split_at(self.step_rows);
        let rows = (0..).zip(&nan[..self.num_rows]).filter(|(_, nan)| **nan != 0);
        Marks {
            nan_rows: rows.map(|(row, _)| row).collect(),
            changed_cells: if self.replayed { changed[..self.num_rows].to_vec() } else { Vec::new() },
        }
    }
}
