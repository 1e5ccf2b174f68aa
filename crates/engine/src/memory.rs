//! How much KV fits.

use moetrail_kernels::SeqSpan;
use moetrail_kernels::gpu::SampleParams;
use moetrail_models::{Decoder, HiddenOutput, ModelError, StepInput};

use crate::config::EngineConfig;
use crate::start::{ROW_STAGING, StartError};

/// Share of the free host memory that the KV pool may take by default; the rest is left to activations and other
/// programs.
const KV_SHARE: f64 = 0.4;

/// Free memory assumed where the system does not tell.
const ASSUMED_FREE: usize = 4 << 30;

/// Number of blocks for a pool sized from free memory: at least one sequence of `max_model_len`, at most what
/// `max_num_seqs` of them can use. A block takes `block_bytes`, KV and rows together.
///
/// # Errors
/// A GPU has no room for one sequence, or refuses.
pub(crate) fn default_num_blocks(
    decoder: &Decoder,
    config: &EngineConfig,
    max_model_len: usize,
    block_bytes: usize,
) -> Result<usize, StartError> {
    let one = max_model_len.div_ceil(config.block_size);
    let Some(gpu) = decoder.gpu() else {
        let budget = (available().unwrap_or(ASSUMED_FREE) as f64 * KV_SHARE) as usize;
        return Ok(num_blocks(budget, block_bytes, one, config).max(one));
    };
    // What a step takes besides is known once the largest has run.
    warm_up(decoder, config, max_model_len)?;
    let memory = gpu.driver().memory().map_err(ModelError::from)?;
    let [free, total] = memory.map(|bytes| bytes as f64);
    let budget = free - total * (1.0 - config.gpu_memory_utilization) - ROW_STAGING as f64;
    let blocks = num_blocks(budget.max(0.0) as usize, block_bytes, one, config);
    if blocks < one {
        let tokens = blocks * config.block_size;
        let message = format!(
            "{}: leaves room for the KV of {tokens} tokens, one sequence of --max-model-len {max_model_len} needs \
             {block_bytes} bytes for each {}; raise it, or lower --max-model-len or --max-num-batched-tokens",
            config.gpu_memory_utilization, config.block_size
        );
        return Err(StartError::Config { flag: "--gpu-memory-utilization", message });
    }
    Ok(blocks)
}

/// Blocks of `block_bytes` in `budget` bytes, at most what `max_num_seqs` sequences of `one` blocks can use.
fn num_blocks(budget: usize, block_bytes: usize, one: usize, config: &EngineConfig) -> usize {
    // Slots are numbered by u32.
    let most = one.saturating_mul(config.max_num_seqs).min(u32::MAX as usize / config.block_size);
    (budget / block_bytes.max(1)).min(most.max(one))
}

/// Runs the largest step there may be.
fn warm_up(decoder: &Decoder, config: &EngineConfig, max_model_len: usize) -> Result<(), ModelError> {
    let num_tokens = config.max_num_batched_tokens;
    let blocks = |tokens: usize| tokens.div_ceil(config.block_size);
    let lengths: Vec<usize> =
        (0..num_tokens).step_by(max_model_len).map(|first| max_model_len.min(num_tokens - first)).collect();
    let mut kv = decoder.new_kv(lengths.iter().map(|&length| blocks(length)).sum(), config.block_size)?;
    let table: Vec<u32> = (0..kv.num_blocks() as u32).collect();
    let (mut seqs, mut positions, mut slots, mut first_block) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for &length in &lengths {
        let first_row = positions.len();
        positions.extend(0..length as u32);
        slots.extend((0..length as u32).map(|position| (first_block * config.block_size) as u32 + position));
        let block_table = &table[first_block..first_block + blocks(length)];
        seqs.push(SeqSpan { rows: first_row..first_row + length, first_position: 0, block_table });
        first_block += blocks(length);
    }
    let logit_rows: Vec<u32> = (0..num_tokens as u32).collect();
    let token_ids = vec![0; num_tokens];
    let input = StepInput {
        token_ids: &token_ids,
        positions: &positions,
        slot_mapping: &slots,
        seqs: &seqs,
        logit_rows: &logit_rows,
        replay: None,
        awaited: None,
    };
    let HiddenOutput { hidden, marks } = decoder.hidden(&input, &mut kv, None)?;
    // Logits go to the host for next tokens; all rows of a prompt are scored on the device.
    decoder.logits(&hidden, 0..num_tokens.min(config.max_num_seqs))?;
    let logprobs = decoder.max_sampled_logprobs();
    let costly = SampleParams { temperature: 1.0, top_p: 0.5, uniform: 0.5, logprobs, ..SampleParams::GREEDY };
    let scored = logprobs.map_or(0, |_| num_tokens);
    let tokens: Vec<(u32, SampleParams)> = (0..scored as u32).map(|row| (row, costly)).collect();
    marks.finish(&decoder.sample(&hidden, &tokens)?).map(|_| ())
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
    fn no_more_is_taken_than_can_be_used() {
        let config = EngineConfig { max_num_seqs: 4, ..EngineConfig::default() };
        assert_eq!(num_blocks(1 << 40, 1, 7, &config), 28);
        assert_eq!(num_blocks(100, 10, 7, &config), 10);
        assert_eq!(num_blocks(9, 10, 7, &config), 0);
    }
}
