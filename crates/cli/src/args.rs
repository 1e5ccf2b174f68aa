//! What is typed on the command line. The flags are vLLM's where vLLM has them.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::builder::TypedValueParser;
use clap::{Args as ClapArgs, Parser, Subcommand};
use moetrail_engine::{EngineConfig, ReprefillRouting};
use moetrail_kernels::gpu::DeviceChoice;
use moetrail_models::{DtypeChoice, Quantization};
use moetrail_routes::Overlap;
use moetrail_routes::format::Format;

use crate::routes::{parse_format, parse_overlap, parse_shape};

/// Serves mixture-of-experts models and returns the exact routing of every token.
#[derive(Debug, Parser)]
#[command(version, about, propagate_version = true)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a model over HTTP (OpenAI-compatible, and vLLM's token-in/token-out endpoint).
    Serve(Box<ServeArgs>),
    /// Continue one prompt on the terminal, with a summary of its routing.
    Run(Box<RunArgs>),
    /// Merge, stitch, convert and sum up routed experts in files; needs no model.
    #[command(subcommand)]
    Routes(RoutesCommand),
    /// Measure prefill and decode on this machine, without HTTP; prints JSON.
    Bench(Box<BenchArgs>),
    /// Check this machine: processor, memory, the bundled model, capture.
    Doctor(DoctorArgs),
    /// Say what a checkpoint is and what serving it takes, from its files alone.
    Inspect(InspectArgs),
}

/// Which model, and how it is loaded.
#[derive(Debug, ClapArgs)]
pub struct ModelArgs {
    /// A checkpoint folder, hub id or GGUF file; the bundled toy model if absent.
    pub model: Option<String>,
    /// Folder with the tokenizer; the model's own if absent.
    #[arg(long, value_name = "FOLDER")]
    pub tokenizer: Option<PathBuf>,
    /// Branch, tag or commit of a hub id.
    #[arg(long)]
    pub revision: Option<String>,
    /// Where the weights come from: auto (the checkpoint) or dummy (random ones; a config.json is enough).
    #[arg(long, value_name = "FORMAT", default_value = "auto", value_parser = ["auto", "dummy"])]
    pub load_format: String,
    /// Number format of weights and KV: auto, float32, bfloat16 or float16.
    #[arg(long, default_value = "auto")]
    pub dtype: DtypeChoice,
    /// Quantise the weights while they are loaded: int8 (an eight-bit number each, and a scale an output). Routers stay.
    #[arg(long, value_name = "METHOD")]
    pub quantization: Option<Quantization>,
    /// Where to compute: auto (an NVIDIA GPU if there is one and the build has CUDA), cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    pub device: DeviceChoice,
    /// On a GPU, only kernels that give a request the same bits in any company. The CPU's always do.
    #[arg(long)]
    pub deterministic: bool,
    /// Share of the GPU's memory for weights, KV cache and all else.
    #[arg(long, value_name = "SHARE", default_value_t = EngineConfig::default().gpu_memory_utilization)]
    pub gpu_memory_utilization: f64,
    /// Threads that compute; all processors if absent.
    #[arg(long)]
    pub threads: Option<usize>,
    /// Keep every computing thread on a processor of its own. Not beside other busy processes.
    #[arg(long)]
    pub pin_threads: bool,
    /// Form of the CPU kernels: amx, avx512bf16, avx512, avx2 or scalar; the best one if absent.
    #[arg(long, value_name = "FORM", env = "MOETRAIL_CPU_FORM")]
    pub cpu_form: Option<String>,
    /// Do not capture routing.
    #[arg(long)]
    pub no_capture: bool,
    /// Prompt and completion tokens together, at most; the model's limit if absent.
    #[arg(long)]
    pub max_model_len: Option<usize>,
    /// Seed of requests that name none.
    #[arg(long)]
    pub seed: Option<u64>,
}

/// `serve`.
#[derive(Debug, ClapArgs)]
pub struct ServeArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1")]
    pub host: IpAddr,
    /// Port to listen on; 0 picks a free one.
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Names that requests may use for the model; the first is reported.
    #[arg(long, num_args = 1..)]
    pub served_model_name: Vec<String>,
    /// Require this bearer token.
    #[arg(long, env = "MOETRAIL_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Sequences that run at once, at most.
    #[arg(long, default_value_t = EngineConfig::default().max_num_seqs)]
    pub max_num_seqs: usize,
    /// Tokens in one step, at most; longer prompts are computed in chunks.
    #[arg(long, default_value_t = EngineConfig::default().max_num_batched_tokens)]
    pub max_num_batched_tokens: usize,
    /// Tokens in a KV block.
    #[arg(long, default_value_t = EngineConfig::default().block_size)]
    pub block_size: usize,
    /// Blocks in the KV pool; sized from free memory if absent.
    #[arg(long, value_name = "BLOCKS")]
    pub num_gpu_blocks_override: Option<usize>,
    /// Keep full KV blocks for later prompts (the default).
    #[arg(long, overrides_with = "no_enable_prefix_caching")]
    pub enable_prefix_caching: bool,
    /// Do not keep full KV blocks for later prompts.
    #[arg(long)]
    pub no_enable_prefix_caching: bool,
    /// Return routed experts to every request that does not refuse them.
    #[arg(long)]
    pub enable_return_routed_experts: bool,
    /// Encoding of routed experts where a request names none: object, npy, sglang, dynamo, list, nemo or skyrl [default:
    /// each endpoint its own].
    #[arg(long, value_name = "FORMAT")]
    pub routed_experts_format: Option<String>,
    /// GiB of host memory for the KV of preempted sequences and evicted prefixes; without any, it is computed again. For a
    /// GPU it is pinned: taken at once, and never paged out.
    #[arg(long, value_name = "GIB", default_value_t = 0.0, value_parser = gibibytes)]
    pub swap_space: f64,
    /// How experts are chosen where KV is computed again after a preemption: recompute (by the router) or replay (as
    /// the first time).
    #[arg(long, value_name = "HOW", default_value = "recompute", value_parser = reprefill_routing)]
    pub reprefill_routing: ReprefillRouting,
    /// Compare rows that are computed again with the first ones, and count those that differ.
    #[arg(long)]
    pub verify_reprefill: bool,
    /// Count selections by layer and expert in the metrics.
    #[arg(long)]
    pub expert_load_metrics: bool,
    /// Requests that may wait beyond those that run; one more gets 503.
    #[arg(long, default_value_t = EngineConfig::default().max_queued_requests)]
    pub max_queued_requests: usize,
    /// Alternatives per token that a request may ask for.
    #[arg(long, default_value_t = EngineConfig::default().max_logprobs)]
    pub max_logprobs: usize,
}

fn gibibytes(text: &str) -> Result<f64, String> {
    let gib: f64 = text.parse().map_err(|_| "expected a number of GiB".to_owned())?;
    if (0.0..=f64::from(1 << 20)).contains(&gib) { Ok(gib) } else { Err("expected 0 to 1048576 GiB".to_owned()) }
}

fn reprefill_routing(text: &str) -> Result<ReprefillRouting, String> {
    match text {
        "recompute" => Ok(ReprefillRouting::Recompute),
        "replay" => Ok(ReprefillRouting::Replay),
        _ => Err("expected recompute or replay".to_owned()),
    }
}

/// `run`.
#[derive(Debug, ClapArgs)]
pub struct RunArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// What to say to the model.
    #[arg(long, short)]
    pub prompt: String,
    /// Continue the prompt as it is, without the model's chat template.
    #[arg(long)]
    pub raw: bool,
    /// Tokens to generate at most.
    #[arg(long, default_value_t = 200)]
    pub max_tokens: usize,
    /// 0 is greedy; the checkpoint's default if absent.
    #[arg(long)]
    pub temperature: Option<f32>,
}

/// `routes`. Payloads are JSON files, or `-` for standard input, in any format that is served; `null` is no rows.
#[derive(Debug, Subcommand)]
pub enum RoutesCommand {
    /// The rows of a prefill and of a decode as one, by absolute position (also lists of segments).
    Merge(MergeArgs),
    /// The turns of conversations as branches, each with all its rows.
    Stitch(StitchArgs),
    /// The same rows in another format.
    Convert(ConvertArgs),
    /// Load, entropy and reuse of experts, layer by layer.
    Stats(StatsArgs),
}

/// What is known of a payload besides itself.
#[derive(Debug, ClapArgs)]
pub struct ImportArgs {
    /// Format of the payload: object, npy, sglang, list, nemo or skyrl; recognised if absent.
    #[arg(long, value_parser = parse_format)]
    pub from: Option<Format>,
    /// Position of the first row where neither the payload nor a routed_experts_start beside it says so [default: 0].
    #[arg(long)]
    pub start: Option<usize>,
    /// Axes of flat int32 (sglang), as ROWSxLAYERSxTOP_K.
    #[arg(long, value_parser = parse_shape)]
    pub shape: Option<[usize; 3]>,
}

/// `routes merge`.
#[derive(Debug, ClapArgs)]
pub struct MergeArgs {
    /// Payload of the prefill.
    pub prefill: String,
    /// Payload of the decode.
    pub decode: String,
    /// Whose rows count where both have some: first (prefill's), last (decode's), or strict (differing ones are an error).
    #[arg(long, default_value = "first", value_parser = parse_overlap)]
    pub overlap: Overlap,
    #[command(flatten)]
    pub import: ImportArgs,
}

/// `routes stitch`.
#[derive(Debug, ClapArgs)]
pub struct StitchArgs {
    /// `{"turns":[{"prompt_ids":[…],"completion_ids":[…],"routed_experts":…}, …]}`.
    pub turns: String,
    #[command(flatten)]
    pub import: ImportArgs,
}

/// `routes convert`.
#[derive(Debug, ClapArgs)]
pub struct ConvertArgs {
    /// Format to write: object, npy, sglang, list, nemo or skyrl.
    #[arg(long, value_parser = parse_format)]
    pub to: Format,
    /// Payload to read.
    #[arg(default_value = "-")]
    pub file: String,
    /// Routed experts of the model, for nemo's dtype; the largest id decides if absent.
    #[arg(long)]
    pub num_experts: Option<usize>,
    #[command(flatten)]
    pub import: ImportArgs,
}

/// `routes stats`.
#[derive(Debug, ClapArgs)]
pub struct StatsArgs {
    /// Payload to read.
    pub file: String,
    #[command(flatten)]
    pub import: ImportArgs,
}

/// `bench`.
#[derive(Debug, ClapArgs)]
pub struct BenchArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Prompt lengths of the prefill runs.
    #[arg(long, value_delimiter = ',', default_value = "512")]
    pub prompt_len: Vec<usize>,
    /// Batch sizes of the decode runs.
    #[arg(long, value_delimiter = ',', default_value = "1,8")]
    pub batch: Vec<usize>,
    /// Prompt tokens of each sequence of a decode run.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..).map(|tokens| tokens as usize))]
    pub context: usize,
    /// Tokens that each sequence of a decode run generates.
    #[arg(long, default_value_t = 65, value_parser = clap::value_parser!(u32).range(2..).map(|tokens| tokens as usize))]
    pub gen_len: usize,
    /// Counted repetitions, after one that is not.
    #[arg(long, default_value_t = 3)]
    pub reps: usize,
    /// Tokens in one step, at most.
    #[arg(long, default_value_t = EngineConfig::default().max_num_batched_tokens)]
    pub max_num_batched_tokens: usize,
    /// Measure this many requests of mixed lengths at once, as well.
    #[arg(long, value_name = "REQUESTS", default_value_t = 0)]
    pub mixed: usize,
    /// Measure this many times, alternately, with capture on and off, over the same weights, as well.
    #[arg(long, value_name = "PAIRS", default_value_t = 0)]
    pub capture_pairs: usize,
    /// Score a text of this many tokens, as well: its perplexity.
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(2..).map(|tokens| tokens as usize))]
    pub score: Option<usize>,
}

/// `doctor`.
#[derive(Debug, ClapArgs)]
pub struct DoctorArgs {
    #[command(flatten)]
    pub model: ModelArgs,
}

/// `inspect`.
#[derive(Debug, ClapArgs)]
pub struct InspectArgs {
    /// A checkpoint folder, hub id or GGUF file; the bundled toy model if absent.
    pub model: Option<String>,
    /// Branch, tag or commit of a hub id.
    #[arg(long)]
    pub revision: Option<String>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definitions_are_consistent() {
        Args::command().debug_assert();
    }
}
