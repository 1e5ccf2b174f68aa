//! What can go wrong between a model's name and its forward pass.

use std::path::PathBuf;

use moetrail_kernels::KernelError;
use moetrail_kernels::gpu::GpuError;

/// An error of the loader or of the decoder; every variant names the file, the key or the tensor at fault.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The model is neither a folder with a `config.json` nor a hub id.
    #[error("model {model:?}: {reason}")]
    NotFound {
        /// What was asked for.
        model: String,
        /// Why it was not found.
        reason: String,
    },
    /// A file could not be opened, mapped or read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file that should be JSON is not.
    #[error("{}: not valid JSON: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The parser's reason, with line and column.
        source: serde_json::Error,
    },
    /// A configuration key is missing or has a value that cannot be served.
    #[error("{}: {key:?}: expected {expected}, found {found}", path.display())]
    Config {
        /// The configuration file.
        path: PathBuf,
        /// The key, dotted where nested.
        key: String,
        /// What would have been accepted.
        expected: String,
        /// What is there.
        found: String,
    },
    /// The checkpoint's architecture has no family here.
    #[error("{}: architecture {found} is not supported (supported: {supported})", path.display())]
    UnknownArchitecture {
        /// The configuration file.
        path: PathBuf,
        /// The architecture it names.
        found: String,
        /// Every architecture that loads.
        supported: String,
    },
    /// The rotary scaling is of a type that is not implemented.
    #[error("{}: rope type {found:?} is not supported (supported: {supported})", path.display())]
    UnsupportedRope {
        /// The configuration file.
        path: PathBuf,
        /// The type it names.
        found: String,
        /// Every type that loads.
        supported: String,
    },
    /// A safetensors header is damaged.
    #[error("{}: bad safetensors header: {reason}", path.display())]
    Header {
        /// The shard.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A GGUF file is damaged, or says something that cannot be served.
    #[error("{}: {reason}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The dtype and the quantisation asked for do not go together.
    #[error("{0}")]
    WeightChoice(String),
    /// A shard is shorter or longer than its header says.
    #[error(
        "{}: {} by {} bytes: the header says {expected} bytes, the file has {found}; fetch it again",
        path.display(), if found < expected { "truncated" } else { "too long" }, expected.abs_diff(*found)
    )]
    ShardLength {
        /// The shard.
        path: PathBuf,
        /// Bytes that the header accounts for.
        expected: u64,
        /// Bytes in the file.
        found: u64,
    },
    /// The index names a shard that is not in the folder.
    #[error("{}: names shard {shard:?} (for tensor {tensor:?}), which is not in the folder", index.display())]
    MissingShard {
        /// The index file.
        index: PathBuf,
        /// The shard's file name.
        shard: String,
        /// One tensor that it should hold.
        tensor: String,
    },
    /// The index places a tensor in a shard that does not hold it.
    #[error("{}: places tensor {tensor:?} in {shard:?}, whose header does not have it", index.display())]
    IndexMismatch {
        /// The index file.
        index: PathBuf,
        /// The shard's file name.
        shard: String,
        /// The tensor.
        tensor: String,
    },
    /// No shard holds a tensor that the configuration calls for.
    #[error("{}: tensor {tensor:?} is missing: expected shape {expected:?}, found nothing of that name", folder.display())]
    MissingTensor {
        /// The checkpoint's folder.
        folder: PathBuf,
        /// The tensor, or the alternatives.
        tensor: String,
        /// The shape that it should have.
        expected: Vec<usize>,
    },
    /// A tensor's shape is not the one that the configuration calls for.
    #[error("{}: tensor {tensor:?}: expected shape {expected}, found {found:?}", path.display())]
    Shape {
        /// The shard.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shape, or shapes, that the configuration calls for.
        expected: String,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A tensor's dtype cannot be packed.
    #[error("{}: tensor {tensor:?}: expected dtype F32, F16 or BF16, found {found}", path.display())]
    Dtype {
        /// The shard.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The dtype in the file.
        found: String,
    },
    /// A kernel refused a tensor.
    #[error("{}: tensor {tensor:?}: {source}", path.display())]
    Pack {
        /// The shard.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The kernel's reason.
        source: Box<KernelError>,
    },
    /// The hub refused, was out of reach, or has no such file.
    #[error("hub model {model:?}: {reason}")]
    Hub {
        /// The hub id.
        model: String,
        /// What happened, and what to do about it.
        reason: String,
    },
    /// A step's input does not fit the model or the cache.
    #[error("step input: {what}: expected {expected}, found {found}")]
    Input {
        /// The field.
        what: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What was given.
        found: String,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// A kernel failed in a forward pass.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The device failed.
    #[error(transparent)]
    Gpu(#[from] GpuError),
}

/// The result of everything in this crate.
pub type Result<T> = std::result::Result<T, ModelError>;
