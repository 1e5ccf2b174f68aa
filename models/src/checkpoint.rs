//! A checkpoint's folder: what it says of itself, and the way to a loaded model.

use std::path::{Path, PathBuf};

use moetrail_kernels::WeightDtype;
use moetrail_kernels::gpu::Gpu;

use crate::backend::{Cpu, GpuBackend};
use crate::config::ModelConfig;
use crate::decoder::Decoder;
use crate::dtype::{StoredType, WeightChoice};
use crate::error::{ModelError, Result};
use crate::fields::Fields;
use crate::generation::GenerationConfig;
use crate::gguf::{self, GgufTokenizer};
use crate::loader::Loader;
use crate::registry::Family;
use crate::shards::Shards;

/// The rotary table is at most this long unless more is asked for: 128 MiB at a head width of 128.
const DEFAULT_POSITIONS: usize = 1 << 18;

/// An opened checkpoint: configuration read and checked, tensors indexed, nothing packed yet.
pub struct Checkpoint {
    name: String,
    folder: PathBuf,
    config: ModelConfig,
    family: &'static Family,
    generation: GenerationConfig,
    shards: Shards,
    /// Of a GGUF file: what it has for a tokenizer.
    gguf: Option<Option<GgufTokenizer>>,
    max_positions: usize,
}

impl Checkpoint {
    /// Opens a folder, a GGUF file, or a hub id such as `org/name`, which is fetched unless it is in the hub's cache.
    ///
    /// `revision` is a branch, tag or commit of the hub; a folder and a file have none.
    pub fn open(model: &str, revision: Option<&str>) -> Result<Self> {
        let path = Path::new(model);
        if let Some(revision) = revision.filter(|_| path.exists()) {
            tracing::warn!(model, revision, "a local folder or file has no revisions: ignored");
        }
        if path.is_dir() {
            return Self::open_folder(path, model);
        }
        if path.is_file() {
            return Self::open_gguf(path, model);
        }
        let folder = crate::hub::resolve(model, revision)?;
        Self::open_folder(&folder, model)
    }

    /// Opens a folder under a name of the caller's choice.
    pub fn open_folder(folder: &Path, name: &str) -> Result<Self> {
        let file = folder.join("config.json");
        if !file.is_file() {
            return Err(ModelError::NotFound {
                model: name.to_owned(),
                reason: format!("expected a config.json in {}, found none", folder.display()),
            });
        }
        let (config, family) = ModelConfig::from_fields(&Fields::read(&file)?)?;
        Ok(Self {
            name: name.to_owned(),
            folder: folder.to_owned(),
            max_positions: config.max_model_len().min(DEFAULT_POSITIONS),
            config,
            family,
            generation: GenerationConfig::read(&folder.join("generation_config.json"))?,
            shards: Shards::open(folder)?,
            gguf: None,
        })
    }

    /// A folder's configuration with random weights: nothing but its `config.json` is read.
    pub fn open_dummy(folder: &Path, name: &str) -> Result<Self> {
        let (config, family) = ModelConfig::from_fields(&Fields::read(&folder.join("config.json"))?)?;
        Ok(Self {
            name: name.to_owned(),
            folder: folder.to_owned(),
            max_positions: config.max_model_len().min(DEFAULT_POSITIONS),
            shards: Shards::dummy(folder, &config)?,
            config,
            family,
            generation: GenerationConfig::default(),
            gguf: None,
        })
    }

    /// Opens a GGUF file, or the first of several that hold one model, under a name of the caller's choice.
    pub fn open_gguf(path: &Path, name: &str) -> Result<Self> {
        let file = gguf::open(path)?;
        let (config, family) = ModelConfig::from_fields(&file.config)?;
        Ok(Self {
            name: name.to_owned(),
            folder: file.shards.folder().to_owned(),
            max_positions: config.max_model_len().min(DEFAULT_POSITIONS),
            config,
            family,
            generation: GenerationConfig::default(),
            shards: file.shards,
            gguf: Some(file.tokenizer),
        })
    }

    /// Sets the number of positions that the loaded model will serve, at most [`ModelConfig::max_model_len`].
    pub fn with_max_positions(mut self, max_positions: usize) -> Self {
        self.max_positions = max_positions.clamp(1, self.config.max_model_len());
        self
    }

    pub(crate) fn shards(&self) -> &Shards {
        &self.shards
    }

    /// What was asked for: a folder or a hub id.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The folder that holds the files.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The tokenizer inside a GGUF file; folders keep theirs in files of their own.
    pub fn embedded_tokenizer(&self) -> Option<&GgufTokenizer> {
        self.gguf.as_ref()?.as_ref()
    }

    /// Whether this is a GGUF file.
    pub fn is_gguf(&self) -> bool {
        self.gguf.is_some()
    }

    /// The architecture.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The authors' sampling defaults.
    pub fn generation(&self) -> &GenerationConfig {
        &self.generation
    }

    /// Every id that ends a text: those of `generation_config.json`, then those of `config.json`.
    pub fn eos_token_ids(&self) -> Vec<u32> {
        let mut ids = self.generation.eos_token_ids.clone();
        for &id in &self.config.eos_token_ids {
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        ids
    }

    /// The checkpoint's own dtype: `config.json`'s, else that of its first tensor of a float dtype; bfloat16 where the
    /// tensors are quantised.
    pub fn own_dtype(&self) -> WeightDtype {
        if self.is_quantised() {
            return WeightDtype::BF16;
        }
        self.config.dtype.or_else(|| self.types().find_map(StoredType::float)).unwrap_or(WeightDtype::F32)
    }

    fn is_quantised(&self) -> bool {
        self.types().any(|dtype| matches!(dtype, StoredType::Blocks(_)))
    }

    fn types(&self) -> impl Iterator<Item = StoredType> {
        self.shards.names().filter_map(|name| Some(self.shards.get(name)?.dtype()))
    }

    /// Packs the weights for the CPU; `progress` shows a bar on a terminal.
    pub fn load(&self, choice: impl Into<WeightChoice>, progress: bool) -> Result<Decoder> {
        self.load_on(None, choice, progress)
    }

    /// Packs the weights for a GPU, or the CPU; `progress` shows a bar on a terminal.
    pub fn load_on(&self, gpu: Option<&Gpu>, choice: impl Into<WeightChoice>, progress: bool) -> Result<Decoder> {
        let choice = choice.into();
        let (dtype, format) = choice.resolve(self.own_dtype()).map_err(ModelError::WeightChoice)?;
        if choice.quantization.is_some() && self.is_quantised() {
            return Err(ModelError::WeightChoice("quantization: the file's weights are quantised already".into()));
        }
        let (config, family, max_positions) = (self.config.clone(), self.family, self.max_positions);
        let Some(gpu) = gpu else {
            let loader = Loader::new(Cpu, &self.shards, dtype, format, progress);
            return Decoder::load(loader, config, family, max_positions);
        };
        if choice.quantization.is_some() {
            return Err(ModelError::WeightChoice("quantization: int8 is computed on the CPU; use --device cpu".into()));
        }
        let loader = Loader::new(GpuBackend::new(gpu, dtype), &self.shards, dtype, format, progress);
        Decoder::load_on(gpu, loader, config, family, max_positions)
    }
}
