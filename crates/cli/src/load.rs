//! From command-line arguments to a running engine.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use moetrail_engine::{Engine, EngineConfig};
use moetrail_kernels::gpu::Gpu;
use moetrail_kernels::{Form, pool};
use moetrail_models::{Checkpoint, Decoder, WeightChoice};
use moetrail_text::Tokenizer;

use crate::args::ModelArgs;
use crate::bundled;

/// Name that the bundled checkpoint is served under.
pub const BUNDLED_NAME: &str = "moetrail-toy";

/// A running engine and the checkpoint that it serves.
pub struct Loaded {
    pub engine: Engine,
    pub checkpoint: Checkpoint,
}

/// Picks threads and kernel form; both are fixed for the life of the process.
pub fn configure_kernels(args: &ModelArgs) -> Result<()> {
    if let Some(threads) = args.threads {
        if threads == 0 {
            bail!("--threads must be at least 1");
        }
        pool::configure(threads);
    }
    if args.pin_threads {
        pool::pin_workers();
    }
    if let Some(name) = &args.cpu_form {
        let Some(form) = Form::from_name(name) else {
            bail!("--cpu-form is {name:?}; {}", Form::ALL.map(|form| form.to_string()).join(", "))
        };
        if !Form::available().contains(&form) {
            bail!("--cpu-form {name}: this processor does not have it; it has {:?}", Form::available());
        }
        Form::set(form);
    }
    Ok(())
}

/// Opens the GPU that was asked for, `None` for the CPU.
pub fn device(args: &ModelArgs) -> Result<Option<Gpu>> {
    Ok(args.device.open().context("--device")?.map(|gpu| gpu.with_deterministic(args.deterministic)))
}

/// Opens the checkpoint named, or the bundled one.
pub fn open(args: &ModelArgs) -> Result<Checkpoint> {
    Ok(match &args.model {
        Some(model) if args.load_format == "dummy" => Checkpoint::open_dummy(Path::new(model), model)?,
        None if args.load_format == "dummy" => bail!("--load-format dummy needs a folder with a config.json"),
        model => open_stored(model.as_deref(), args.revision.as_deref())?,
    })
}

/// Opens the checkpoint of that name, or the bundled one.
pub fn open_stored(model: Option<&str>, revision: Option<&str>) -> Result<Checkpoint> {
    Ok(match model {
        Some(model) => Checkpoint::open(model, revision)?,
        None => Checkpoint::open_folder(&bundled::folder()?, BUNDLED_NAME)?,
    })
}

/// The tokenizer that was asked for, else the checkpoint's own.
fn tokenizer(args: &ModelArgs, checkpoint: &Checkpoint) -> Result<Option<Tokenizer>> {
    if let Some(folder) = &args.tokenizer {
        let found = Tokenizer::from_dir(folder)?;
        return found.map(Some).with_context(|| format!("--tokenizer: no tokenizer.json in {}", folder.display()));
    }
    match checkpoint.embedded_tokenizer() {
        Some(own) => Ok(Some(Tokenizer::new(own.tokenizer.clone(), &own.config, None, None))),
        // The folder of a GGUF file may hold anything.
        None if checkpoint.is_gguf() => Ok(None),
        None => Ok(Tokenizer::from_dir(checkpoint.folder())?),
    }
}

/// Loads the model and starts an engine over it.
pub fn start(args: &ModelArgs, config: EngineConfig) -> Result<Loaded> {
    configure_kernels(args)?;
    start_on(device(args)?, args, config)
}

/// As [`start`], on a device that is open, or the CPU.
pub fn start_on(gpu: Option<Gpu>, args: &ModelArgs, config: EngineConfig) -> Result<Loaded> {
    let model = load_on(gpu, args)?;
    let engine = model.start(args, !args.no_capture, config)?;
    Ok(Loaded { engine, checkpoint: model.checkpoint })
}

/// Weights and tokenizer in memory; every engine over them shares the weights.
pub struct LoadedModel {
    decoder: Decoder,
    tokenizer: Option<Arc<Tokenizer>>,
    checkpoint: Checkpoint,
}

/// Loads the model that was asked for.
pub fn load(args: &ModelArgs) -> Result<LoadedModel> {
    configure_kernels(args)?;
    load_on(device(args)?, args)
}

fn load_on(gpu: Option<Gpu>, args: &ModelArgs) -> Result<LoadedModel> {
    let checkpoint = open(args)?;
    let longest = checkpoint.config().max_model_len();
    // The rotary table need not be longer than any sequence; a value beyond the model's is refused by the engine.
    let checkpoint = checkpoint.with_max_positions(args.max_model_len.map_or(longest, |len| len.min(longest)));
    let tokenizer = tokenizer(args, &checkpoint)?.map(Arc::new);
    if tokenizer.is_none() {
        tracing::warn!("the checkpoint has no tokenizer: only token ids are served");
    }
    let began = Instant::now();
    let choice = WeightChoice { dtype: args.dtype, quantization: args.quantization };
    let decoder = checkpoint.load_on(gpu.as_ref(), choice, true)?;
    tracing::info!(
        model = checkpoint.name(),
        folder = %checkpoint.folder().display(),
        architecture = decoder.config().architecture,
        dtype = %decoder.dtype(),
        weights = %decoder.weight_formats(),
        packed_mib = decoder.weight_bytes() >> 20,
        seconds = began.elapsed().as_secs_f32(),
        device = decoder.gpu().map_or_else(|| "cpu".into(), |gpu| gpu.driver().name()),
        kernels = ?Form::current(),
        threads = pool::threads(),
        "loaded"
    );
    Ok(LoadedModel { decoder, tokenizer, checkpoint })
}

impl LoadedModel {
    /// Starts an engine over the weights.
    pub fn start(&self, args: &ModelArgs, capture: bool, mut config: EngineConfig) -> Result<Engine> {
        if config.served_model_names.is_empty() {
            config.served_model_names = vec![self.checkpoint.name().to_owned()];
        }
        config.capture = capture;
        config.max_model_len = args.max_model_len;
        config.gpu_memory_utilization = args.gpu_memory_utilization;
        config.seed = args.seed;
        let (decoder, tokenizer) = (self.decoder.clone(), self.tokenizer.clone());
        Engine::start(decoder, tokenizer, self.checkpoint.eos_token_ids(), config).context("cannot start")
    }
}
