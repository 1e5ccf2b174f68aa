//! How much KV fits.

/// Share of the free memory that the KV pool may take by default; the rest is left to activations and other programs.
const KV_SHARE: f64 = 0.4;

/// Free memory assumed where the system does not tell.
const ASSUMED_FREE: usize = 4 << 30;

/// Number of blocks for a pool sized from free memory: at least one sequence of `max_model_len`, at most what
/// `max_num_seqs` of them can use.
pub(crate) fn default_num_blocks(
    bytes_per_block: usize,
    block_size: usize,
    max_model_len: usize,
    max_num_seqs: usize,
) -> usize {
    let budget = (available().unwrap_or(ASSUMED_FREE) as f64 * KV_SHARE) as usize;
    let one = max_model_len.div_ceil(block_size);
    // Slots are numbered by u32.
    let most = one.saturating_mul(max_num_seqs).min(u32::MAX as usize / block_size);
    (budget / bytes_per_block.max(1)).clamp(one, most.max(one))
}

/// `MemAvailable` of Linux, in bytes: what can be had without swapping.
fn available() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_sequence_always_fits_and_no_more_is_taken_than_can_be_used() {
        assert_eq!(default_num_blocks(usize::MAX, 16, 100, 4), 7);
        assert_eq!(default_num_blocks(1, 16, 100, 4), 28);
    }
}
