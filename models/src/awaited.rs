//! Tokens that a step takes from the one before, which may still be running.

use crate::error::Result;
use crate::pending::PendingTokens;
use crate::step::{equal, refused};

/// Rows whose token is still being sampled on the device that computes them: it never goes over the host.
///
/// A token that turns out impossible to sample counts as 0: its request fails, and with it what was computed of it.
#[derive(Debug, Clone, Copy)]
pub struct Awaited<'a> {
    /// What the steps before sample.
    pub samples: &'a PendingTokens,
    /// For each row of the step, which of the samples is its token, or [`Awaited::KNOWN`]; `[rows]`.
    pub sources: &'a [u32],
}

impl Awaited<'_> {
    /// In `sources`: this row's token is among the step's own.
    pub const KNOWN: u32 = u32::MAX;

    /// Refuses sources that are no samples.
    pub(crate) fn check(self, rows: usize) -> Result<()> {
        equal("awaited.sources", rows, self.sources.len())?;
        let len = self.samples.len();
        match self.sources.iter().find(|&&source| source != Self::KNOWN && source as usize >= len) {
            None => Ok(()),
            Some(source) => Err(refused("awaited.sources", format!("values below {len}, or none"), source.to_string())),
        }
    }
}
