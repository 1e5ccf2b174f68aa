//! What a step tells of itself, which on a device is there once it has run.

use std::sync::Arc;

use moetrail_kernels::gpu::{DeviceSamples, PendingWords, SampledToken, Scratch};

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
    pub(crate) shape: MarksShape,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct MarksShape {
    pub(crate) step_rows: usize,
    /// Those that do not pad the step.
    pub(crate) num_rows: usize,
    /// Whether cells could change.
    pub(crate) replayed: bool,
}

/// Tokens that a device samples, in order.
#[derive(Debug, Default)]
pub struct PendingTokens(pub(crate) Vec<DeviceSamples>);

/// Marks and tokens of a step on their way to the host.
#[derive(Debug)]
#[must_use]
pub struct PendingReport(Report);

#[derive(Debug)]
enum Report {
    Host(Marks),
    Device(PendingWords, MarksShape),
}

impl PendingMarks {
    /// Issues the copy of the marks, and of tokens sampled after the step. The next step, which may take the same memory,
    /// may be issued then.
    ///
    /// # Errors
    /// The device refuses.
    pub fn send(self, tokens: &PendingTokens) -> Result<PendingReport> {
        Ok(PendingReport(match self {
            PendingMarks::Host(marks) => Report::Host(marks),
            PendingMarks::Device(DeviceMarks { words, shape }) => {
                let mut parts: Vec<_> = tokens.0.iter().map(DeviceSamples::place).collect();
                parts.push((words.address(), 2 * shape.step_rows));
                Report::Device(words.gpu().send_words(&parts)?, shape)
            }
        }))
    }

    /// [`send`](Self::send) and wait.
    ///
    /// # Errors
    /// The device failed.
    pub fn finish(self, tokens: &PendingTokens) -> Result<(Marks, Vec<SampledToken>)> {
        self.send(tokens)?.finish(tokens)
    }
}

impl PendingReport {
    /// Waits for the step, and for the tokens sampled after it, which are those that were sent.
    ///
    /// # Errors
    /// The device failed.
    pub fn finish(self, tokens: &PendingTokens) -> Result<(Marks, Vec<SampledToken>)> {
        let (words, shape) = match self.0 {
            Report::Host(marks) => return Ok((marks, tokens.finish()?)),
            Report::Device(words, shape) => (words, shape),
        };
        let mut words = words.finish()?;
        let marks = shape.parse(&words.pop().unwrap_or_default());
        Ok((marks, tokens.0.iter().zip(&words).flat_map(|(samples, words)| samples.parse(words)).collect()))
    }
}

impl PendingTokens {
    /// How many.
    pub fn len(&self) -> usize {
        self.0.iter().map(DeviceSamples::len).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Waits for the tokens.
    ///
    /// # Errors
    /// The device failed.
    pub fn finish(&self) -> Result<Vec<SampledToken>> {
        let tokens: std::result::Result<Vec<_>, _> = self.0.iter().map(DeviceSamples::to_host).collect();
        Ok(tokens?.concat())
    }
}

impl MarksShape {
    fn parse(self, words: &[u32]) -> Marks {
        let (nan, changed) = words.split_at(self.step_rows);
        let rows = (0..).zip(&nan[..self.num_rows]).filter(|(_, nan)| **nan != 0);
        Marks {
            nan_rows: rows.map(|(row, _)| row).collect(),
            changed_cells: if self.replayed { changed[..self.num_rows].to_vec() } else { Vec::new() },
        }
    }
}
