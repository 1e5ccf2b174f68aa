//! From logits to tokens on a GPU.

use crate::error::{KernelError, check_index, check_shape};
use crate::gpu::memory::bytes_of;
use crate::gpu::rows::int;
use crate::gpu::{Address, Arena, Arg, DeviceRows, Gpu, GpuError, Launch, Scratch, Stream};

const OP: &str = "sample";

/// Below this temperature sampling is greedy.
const GREEDY_BELOW: f32 = 1e-5;

/// Stands for no token.
const NONE: u32 = u32::MAX;

/// As in `kernels/cuda/sample.cuh` and in the files that include it.
const STATE_BYTES: usize = 64;
const BUCKETS: usize = 1024;
const LIST: usize = 2048;
const CHUNK: usize = 4096;

/// How a token is chosen, or one that is given is scored. Rows whose logits must be changed first (penalties, biases,
/// masks) are not for the device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampleParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Number of candidates kept; 0 is off.
    pub top_k: u32,
    /// Nucleus mass in `(0, 1]`; 1 is off.
    pub top_p: f32,
    /// Candidates below `min_p` times the best probability are dropped; 0 is off.
    pub min_p: f32,
    /// The random number of this row's position, in `[0, 1)`.
    pub uniform: f64,
    /// Whether logprobs are reported, and how many of the most likely tokens.
    pub logprobs: Option<usize>,
    /// The token, if it is not to be chosen but only scored.
    pub given: Option<u32>,
}

impl SampleParams {
    /// The best token.
    pub const GREEDY: SampleParams =
        SampleParams { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, uniform: 0.0, logprobs: None, given: None };

    /// The most likely tokens that a row may ask to be listed, at most.
    pub const MAX_TOP: usize = 20;

    /// Logits that a row may have: ids and their sums of weights, 2^44 each, fit their words.
    pub const MAX_VOCAB: usize = 1 << 18;

    /// Words of a row.
    pub const WORDS: usize = 10;

    /// Whether no random number is used.
    pub fn is_greedy(&self) -> bool {
        self.temperature < GREEDY_BELOW || self.given.is_some()
    }

    /// What the kernels read, for this row of the logits.
    pub fn words(&self, row: u32) -> [u32; Self::WORDS] {
        let greedy = self.is_greedy();
        let uniform = self.uniform.to_bits();
        let ln_min_p = if self.min_p > 0.0 { self.min_p.ln() } else { f32::NEG_INFINITY };
        [
            if greedy { 1.0f32 } else { self.temperature }.to_bits(),
            self.top_k,
            self.top_p.to_bits(),
            ln_min_p.to_bits(),
            uniform as u32,
            (uniform >> 32) as u32,
            greedy.into(),
            self.logprobs.map_or(0, |top| int(top) + 1),
            row,
            self.given.unwrap_or(NONE),
        ]
    }

    fn truncates(&self) -> bool {
        !self.is_greedy() && (self.top_k > 0 || self.top_p < 1.0)
    }
}

/// The parameters of a call: what is uploaded, and what has to be launched for it.
#[derive(Clone, Debug, Default)]
pub struct SampleBatch {
    words: Vec<u32>,
    /// Of each token.
    logprobs: Vec<Option<usize>>,
    /// Rows of the logits that are read.
    rows: usize,
    sampled: bool,
    truncated: bool,
}

impl SampleBatch {
    /// One token for each pair of a row of the logits and parameters; several may be of one row.
    pub fn new(tokens: &[(u32, SampleParams)]) -> SampleBatch {
        SampleBatch {
            words: tokens.iter().flat_map(|(row, params)| params.words(*row)).collect(),
            logprobs: tokens.iter().map(|(_, params)| params.logprobs).collect(),
            rows: tokens.iter().map(|(row, _)| *row as usize + 1).max().unwrap_or(0),
            sampled: tokens.iter().any(|(_, params)| !params.is_greedy()),
            truncated: tokens.iter().any(|(_, params)| params.truncates()),
        }
    }

    /// u32 `[len, SampleParams::WORDS]`, for the caller to upload.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// The same as bytes.
    pub fn bytes(&self) -> &[u8] {
        bytes_of(&self.words)
    }

    /// Tokens.
    pub fn len(&self) -> usize {
        self.logprobs.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.logprobs.is_empty()
    }
}

/// A token on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct SampledToken {
    /// The token; `None` if nothing can be sampled.
    pub token: Option<u32>,
    /// Whether a logit of its row is NaN; the request fails.
    pub is_nan: bool,
    /// Its logprob and the most likely tokens, if they were asked for.
    pub logprobs: Option<TokenLogprob>,
}

/// Log-probabilities of raw logits.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// Of the token.
    pub logprob: f32,
    /// 1 + the number of larger logits.
    pub rank: u32,
    /// The most likely tokens, best first, ties lower id first.
    pub top: Vec<(u32, f32)>,
}

/// Tokens on the device.
#[derive(Debug)]
pub struct DeviceSamples {
    words: Scratch,
    logprobs: Vec<Option<usize>>,
    top: usize,
}

impl DeviceSamples {
    /// Where the words are, u32 `[len, row_words]`, and how many: for [`Gpu::send_words`](crate::gpu::Gpu::send_words).
    pub fn place(&self) -> (Address, usize) {
        (self.words.address(), self.len() * self.row_words())
    }

    /// Tokens.
    pub fn len(&self) -> usize {
        self.logprobs.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.logprobs.is_empty()
    }

    /// Where they are.
    pub(crate) fn gpu(&self) -> &Gpu {
        self.words.gpu()
    }

    /// Words of a token: id, NaN, logprob, rank, then ids and logprobs of the most likely tokens.
    pub fn row_words(&self) -> usize {
        4 + 2 * self.top
    }

    /// What the words, copied to the host, say.
    pub fn parse(&self, words: &[u32]) -> Vec<SampledToken> {
        let token = |word: u32| (word != NONE).then_some(word);
        let row = |(words, logprobs): (&[u32], &Option<usize>)| SampledToken {
            token: token(words[0]),
            is_nan: words[1] != 0,
            logprobs: logprobs.map(|top| TokenLogprob {
                logprob: f32::from_bits(words[2]),
                rank: words[3],
                top: (0..top)
                    .filter_map(|at| Some((token(words[4 + at])?, f32::from_bits(words[4 + self.top + at]))))
                    .collect(),
            }),
        };
        words.chunks_exact(self.row_words()).zip(&self.logprobs).map(row).collect()
    }

    /// Copies the tokens to the host and waits for them.
    pub fn to_host(&self) -> Result<Vec<SampledToken>, GpuError> {
        let (address, len) = self.place();
        let words = self.words.gpu().read(address, len)?;
        Ok(self.parse(&words))
    }
}

/// What decides how the work is spread, and no result.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Candidates that are sorted; rows with more are cut level by level.
    list: usize,
    /// Blocks of a row.
    blocks: usize,
}

/// Samples the batch's `m` tokens from rows of `logits` f32 `[rows, vocab]`. `params` are the batch's words,
/// `[m, SampleParams::WORDS]` on the device.
///
/// Tokens are those of the CPU's sampler, except where rounding decides: weights are f32, their sums exact.
pub fn sample(
    arena: &Arena,
    logits: &DeviceRows,
    batch: &SampleBatch,
    params: Address,
) -> Result<DeviceSamples, KernelError> {
    // Blocks of all rows that fill a device, each with at least 2048 tokens.
    const BLOCKS: usize = 1024;
    let most = logits.width().div_ceil(2048).max(1);
    let blocks = (BLOCKS / batch.len().max(1)).clamp(1, most);
    launch(arena, logits, batch, params, Limits { list: LIST, blocks })
}

/// As [`sample`], with other limits: no token depends on them.
#[doc(hidden)]
pub fn sample_with_limits(
    arena: &Arena,
    logits: &DeviceRows,
    batch: &SampleBatch,
    params: Address,
    list: usize,
    blocks: usize,
) -> Result<DeviceSamples, KernelError> {
    launch(arena, logits, batch, params, Limits { list, blocks })
}

fn launch(
    arena: &Arena,
    logits: &DeviceRows,
    batch: &SampleBatch,
    params: Address,
    limits: Limits,
) -> Result<DeviceSamples, KernelError> {
    let (m, vocab) = (batch.len(), logits.width());
    check_index(OP, "rows of the logits", batch.rows, logits.len() + 1)?;
    check_shape(OP, "row stride of the logits", &[logits.ld()], &[vocab])?;
    check_index(OP, "vocabulary", vocab.wrapping_sub(1), SampleParams::MAX_VOCAB)?;
    check_index(OP, "candidates to sort", limits.list, LIST + 1)?;
    let top = batch.logprobs.iter().flatten().copied().max();
    check_index(OP, "most likely tokens", top.unwrap_or(0), SampleParams::MAX_TOP + 1)?;
    let with_logprobs = top.is_some();
    let top = top.unwrap_or(0);
    let words = arena.take(m * (4 + 2 * top) * 4)?;
    let samples = DeviceSamples { words, logprobs: batch.logprobs.clone(), top };
    if m == 0 {
        return Ok(samples);
    }

    // What starts as zeros: states, then the buckets' masses and counts.
    let buckets = if batch.truncated { m * BUCKETS } else { 0 };
    let zeroed = m * STATE_BYTES + buckets * 12;
    let states = arena.take(zeroed)?;
    let masses = states.address().at(m * STATE_BYTES);
    let counts = masses.at(buckets * 8);
    // SAFETY: the memory was just taken, and is as long.
    unsafe { arena.gpu().driver().fill(Stream::Compute, states.address(), 0, zeroed)? };
    let parts = arena.take(m * limits.blocks * 8)?;
    let [out, rows] = [samples.words.address(), logits.address()];
    let grid = [int(limits.blocks), int(m), 1];
    let run = |kernel: &'static str, grid: [u32; 3], block: u32, args: &[Arg]| -> Result<(), GpuError> {
        // SAFETY: every kernel is given the rows, the tokens' parameters and states, and memory of the size it takes.
        unsafe { arena.gpu().launch(Launch { kernel, grid, block, shared: 0 }, args) }
    };
    let common: [Arg; 3] = [rows.into(), params.into(), states.address().into()];
    let last: [Arg; 3] = [out.into(), int(top).into(), int(vocab).into()];
    let with = |args: &[Arg]| -> Vec<Arg> { common.iter().chain(args).chain(&last).copied().collect() };

    let best_ids = parts.address().at(m * limits.blocks * 4);
    run("sample_max", grid, 256, &with(&[parts.address().into(), best_ids.into()]))?;
    if batch.sampled || with_logprobs {
        let mut args = with(&[parts.address().into(), counts.into(), masses.into()]);
        args.push(int(limits.list).into());
        run("sample_masses", grid, 256, &args)?;
    }
    if batch.truncated {
        let lists = arena.take(m * LIST * 8)?;
        run("sample_list", grid, 256, &with(&[lists.address().into()]))?;
        run("sample_levels", [int(m), 1, 1], 512, &with(&[]))?;
    }
    if with_logprobs {
        let chunks = vocab.div_ceil(CHUNK);
        let keys = arena.take(m * chunks * SampleParams::MAX_TOP * 8)?;
        run("sample_logprobs", [int(chunks), int(m), 1], 256, &with(&[keys.address().into()]))?;
    }
    Ok(samples)
}
