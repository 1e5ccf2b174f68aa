use moetrail_kernels::gpu::{self, DeviceRows, SampleBatch, SampleParams};

use crate::backend::GpuBackend;
use crate::error::Result;
use crate::pending::PendingTokens;

/// Logits of at most this many floats are held at once (256 MiB).
const LOGITS: usize = 64 << 20;

impl GpuBackend {
    /// Issues the sampling of tokens, pairs of a row and how, ascending by row. `logits` gives those of `len` rows from
    /// the first on, `[len, vocab]`.
    pub(crate) fn sample(
        &self,
        tokens: &[(u32, SampleParams)],
        vocab: usize,
        logits: impl Fn(usize, usize) -> Result<DeviceRows>,
    ) -> Result<PendingTokens> {
        let slices = slices(tokens, (LOGITS / vocab).max(1));
        let batch = |slice: &Slice| (slice.first, slice.len, SampleBatch::new(&slice.tokens));
        let batches: Vec<(usize, usize, SampleBatch)> = slices.iter().map(batch).collect();
        let bytes: Vec<u8> = batches.iter().flat_map(|(_, _, batch)| batch.bytes()).copied().collect();
        // Held until all that reads it has been issued.
        let mut upload = self.sampling.lock().unwrap_or_else(|poison| poison.into_inner());
        let [mut params] = self.made(&mut upload)?.put([&bytes])?;
        let mut samples = Vec::with_capacity(batches.len());
        for (first, len, batch) in &batches {
            samples.push(gpu::sample(&self.arena, &logits(*first, *len)?, batch, params)?);
            params = params.at(batch.bytes().len());
        }
        Ok(PendingTokens(samples))
    }
}

/// Tokens of neighbouring rows; theirs count from the first.
#[derive(Debug, PartialEq)]
struct Slice {
    first: usize,
    len: usize,
    tokens: Vec<(u32, SampleParams)>,
}

/// Slices of at most `most` rows.
fn slices(tokens: &[(u32, SampleParams)], most: usize) -> Vec<Slice> {
    let mut slices: Vec<Slice> = Vec::new();
    for &(row, params) in tokens {
        let row = row as usize;
        match slices.last_mut() {
            Some(slice) if row < slice.first + most => {
                slice.len = row + 1 - slice.first;
                slice.tokens.push(((row - slice.first) as u32, params));
            }
            _ => slices.push(Slice { first: row, len: 1, tokens: vec![(0, params)] }),
        }
    }
    slices
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_keep_the_tokens_of_a_row_together() {
        let tokens = |rows: &[u32]| rows.iter().map(|row| (*row, SampleParams::GREEDY)).collect::<Vec<_>>();
        let slice = |first, len, rows: &[u32]| Slice { first, len, tokens: tokens(rows) };
        let all = tokens(&[0, 1, 1, 1, 2, 5, 6, 6]);
        assert_eq!(slices(&all, 2), [slice(0, 2, &[0, 1, 1, 1]), slice(2, 1, &[0]), slice(5, 2, &[0, 1, 1])]);
        assert_eq!(slices(&all, 1).len(), 5);
        assert_eq!(slices(&all, 7), [slice(0, 7, &[0, 1, 1, 1, 2, 5, 6, 6])]);
        assert_eq!(slices(&[], 7), []);
    }
}
