//! From a loaded model to a running engine.

use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use moetrail_capture::{CaptureRing, RingLayout};
use moetrail_kernels::pool;
use moetrail_models::{Decoder, ModelError};
use moetrail_sched::{Scheduler, SchedulerConfig};
use moetrail_text::Tokenizer;
use rustc_hash::FxHashMap;

use crate::capture::Capture;
use crate::config::{EngineConfig, ReprefillRouting};
use crate::engine::{EngineThread, StepSettings};
use crate::handle::{EngineHandle, Shared};
use crate::info::EngineInfo;
use crate::lifecycle::Pause;
use crate::memory::default_num_blocks;
use crate::replay::RoutingShape;
use crate::self_check::{SelfCheckError, self_check};
use crate::stats::EngineStats;
use crate::swap::SwapSpace;

/// Bytes of rows that are on their way from a device at once, at most: some 80 000 rows of 48 layers with 8 experts each.
pub(crate) const ROW_STAGING: usize = 32 << 20;

/// Why an engine did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// A setting is out of range.
    #[error("{flag} {message}")]
    Config {
        /// The command-line flag.
        flag: &'static str,
        /// What is wrong with its value.
        message: String,
    },
    /// The model has no experts, so there is nothing to capture.
    #[error("the model is dense: it routes nothing, so there is nothing to capture; serve it with --no-capture")]
    Dense,
    /// Capture does not work with this model.
    #[error(transparent)]
    SelfCheck(#[from] SelfCheckError),
    /// The device has no room for KV cache or ring.
    #[error("KV cache and ring: {0}")]
    Device(#[from] ModelError),
    /// The thread could not be started.
    #[error("the engine thread did not start: {0}")]
    Thread(#[from] std::io::Error),
}

/// A running engine. Dropping it without [`shutdown`](Self::shutdown) leaves the thread to end with its last handle.
pub struct Engine {
    handle: EngineHandle,
    thread: JoinHandle<()>,
}

impl Engine {
    /// Checks the settings, allocates KV pool and ring, checks capture, and starts the engine thread.
    ///
    /// # Errors
    /// [`StartError`], before any thread exists.
    pub fn start(
        decoder: Decoder,
        tokenizer: Option<Arc<Tokenizer>>,
        eos_token_ids: Vec<u32>,
        config: EngineConfig,
    ) -> Result<Self, StartError> {
        let model = decoder.config();
        let max_model_len = check_limits(&config, model.max_model_len())?;
        let layout = config
            .capture
            .then(|| {
                let layers = model.moe_layers.clone();
                RingLayout::new(model.num_hidden_layers, layers, model.num_experts_per_tok, model.num_experts)
            })
            .map(|layout| if layout.num_moe_layers() == 0 { Err(StartError::Dense) } else { Ok(layout) })
            .transpose()?;
        for (flag, set) in [
            ("--enable-return-routed-experts", config.return_routed_experts),
            ("--verify-reprefill", config.verify_reprefill),
            ("--expert-load-metrics", config.expert_load_metrics),
            ("--reprefill-routing replay", config.reprefill_routing == ReprefillRouting::Replay),
        ] {
            if set && layout.is_none() {
                return Err(StartError::Config { flag, message: "needs capture, which --no-capture turns off".into() });
            }
        }
        if let Some(layout) = &layout {
            for layer in self_check(&decoder, layout)? {
                tracing::warn!(layer, "the self-check's tokens are all routed alike in this layer");
            }
        }

        let bytes_per_block = decoder.kv_bytes_per_block(config.block_size);
        let ring_bytes_per_block = layout.as_ref().map_or(0, |layout| config.block_size * layout.row_bytes());
        let num_blocks = match config.num_blocks {
            Some(num_blocks) => num_blocks,
            None => default_num_blocks(&decoder, &config, max_model_len, bytes_per_block + ring_bytes_per_block)?,
        };
        // Slots are numbered by u32.
        let num_host_blocks =
            (config.swap_space / (bytes_per_block + ring_bytes_per_block)).min(u32::MAX as usize / config.block_size);
        let kv = decoder.new_kv(num_blocks, config.block_size)?;
        let ring = layout.clone().map(|layout| match decoder.gpu() {
            None => Ok(CaptureRing::new(layout, num_blocks, config.block_size)),
            Some(gpu) => CaptureRing::on_device(gpu, layout, num_blocks, config.block_size, ROW_STAGING),
        });
        let ring = ring.transpose().map_err(ModelError::from)?;
        tracing::info!(
            num_blocks,
            block_size = config.block_size,
            tokens = num_blocks * config.block_size,
            kv_mib = (num_blocks * bytes_per_block) >> 20,
            swap_blocks = num_host_blocks,
            ring_kib = ring.as_ref().map_or(0, CaptureRing::bytes) >> 10,
            "KV pool and ring of routed experts"
        );

        let mut names = config.served_model_names.clone();
        let model_name = if names.is_empty() { model.model_type.clone() } else { names.remove(0) };
        let stats = Arc::new(EngineStats::new(&model_name));
        let info = Arc::new(EngineInfo {
            model_name,
            model_aliases: names,
            max_model_len,
            max_num_seqs: config.max_num_seqs,
            max_live_requests: config.max_num_seqs.saturating_add(config.max_queued_requests),
            max_logprobs: config.max_logprobs,
            vocab_size: model.vocab_size,
            eos_token_ids,
            routing: (!model.moe_layers.is_empty()).then(|| RoutingShape {
                num_layers: model.num_hidden_layers,
                moe_layers: model.moe_layers.clone(),
                top_k: model.num_experts_per_tok,
                num_experts: model.num_experts,
            }),
            row_layout: layout.map(|layout| layout.wire()),
            return_routed_experts: config.return_routed_experts,
            num_blocks,
            block_size: config.block_size,
            tokenizer,
            created: unix_time(),
        });
        let scheduler = Scheduler::new(SchedulerConfig {
            block_size: config.block_size,
            num_blocks,
            num_host_blocks,
            private_recompute: config.reprefill_routing == ReprefillRouting::Replay,
            max_num_seqs: config.max_num_seqs,
            max_num_batched_tokens: config.max_num_batched_tokens,
            enable_prefix_caching: config.enable_prefix_caching,
        });

        let swap = SwapSpace::new(&kv, num_host_blocks).map_err(|error| no_swap_space(&config, &error))?;
        let capture = Capture::new(ring, num_host_blocks, stats.clone());
        let mut capture = capture.map_err(|error| no_swap_space(&config, &error))?;
        if config.expert_load_metrics {
            capture.count_load(decoder.config().num_experts);
        }
        #[cfg(test)]
        capture.plant(config.fault);
        let (commands, receiver) = mpsc::channel();
        let shared = Arc::new(Shared::new(&decoder));
        let engine = EngineThread {
            decoder,
            kv,
            capture,
            swap,
            scheduler,
            flight: None,
            batches: Vec::new(),
            live: FxHashMap::default(),
            choices: FxHashMap::default(),
            closing: Vec::new(),
            settings: StepSettings {
                reprefill_routing: config.reprefill_routing,
                verify_reprefill: config.verify_reprefill,
            },
            info: info.clone(),
            stats: stats.clone(),
            seed: config.seed.unwrap_or_else(entropy),
            receiver,
            shared: shared.clone(),
            draining: false,
            pause: Pause::Running,
            num_updates: 0,
        };
        let run = move || {
            pool::pin_caller();
            engine.run();
        };
        let thread = std::thread::Builder::new().name("engine".into()).spawn(run)?;
        Ok(Self { handle: EngineHandle { commands, shared, info, stats }, thread })
    }

    /// A handle to submit requests with.
    pub fn handle(&self) -> EngineHandle {
        self.handle.clone()
    }

    /// Takes no new request, waits for the running ones, and ends the thread.
    pub fn shutdown(self) {
        self.handle.shutdown();
        if self.thread.join().is_err() {
            tracing::error!("the engine thread ended by a panic");
        }
    }
}

fn check_limits(config: &EngineConfig, model_limit: usize) -> Result<usize, StartError> {
    let refuse = |flag, message: String| Err(StartError::Config { flag, message });
    for (flag, value) in [
        ("--max-num-seqs", config.max_num_seqs),
        ("--max-num-batched-tokens", config.max_num_batched_tokens),
        ("--block-size", config.block_size),
    ] {
        if value == 0 {
            return refuse(flag, "must be at least 1".into());
        }
    }
    let max_model_len = config.max_model_len.unwrap_or(model_limit);
    if max_model_len == 0 || max_model_len > model_limit {
        return refuse("--max-model-len", format!("is {max_model_len}; the model takes 1 to {model_limit} tokens"));
    }
    let blocks = config.num_blocks.unwrap_or(1);
    let slots = blocks.checked_mul(config.block_size);
    if !(config.gpu_memory_utilization > 0.0 && config.gpu_memory_utilization <= 1.0) {
        let found = config.gpu_memory_utilization;
        return refuse("--gpu-memory-utilization", format!("is {found}; a share above 0, at most 1, is possible"));
    }
    if blocks == 0 || slots.is_none_or(|slots| slots > u32::MAX as usize) {
        return refuse(
            "--num-gpu-blocks-override",
            format!("is {blocks} blocks of {} slots; 1 to {} slots are possible", config.block_size, u32::MAX),
        );
    }
    Ok(max_model_len)
}

/// A device copies to and from pinned memory, all of which is taken at once.
fn no_swap_space(config: &EngineConfig, error: &dyn std::fmt::Display) -> StartError {
    let mib = config.swap_space >> 20;
    let message = format!("is {mib} MiB, which this machine does not give as pinned memory; lower it ({error})");
    StartError::Config { flag: "--swap-space", message }
}

fn unix_time() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}

/// A seed that differs from run to run: the standard library draws its hash keys from the system.
fn entropy() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}
