//! GGUF files: one model in one file, or in several that are numbered.
//!
//! The metadata are read as the `config.json` they were made from, and the tensors under the names they had in the
//! checkpoint, so that everything behind this module knows one kind of checkpoint.

mod config;
mod names;
mod tokenizer;

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::Content;

use crate::error::{ModelError, Result};
use crate::fields::Fields;
use crate::shard::{Place, Shard};
use crate::shards::Shards;
use names::NameMap;
pub use tokenizer::GgufTokenizer;

/// An opened file.
pub(crate) struct Gguf {
    pub(crate) config: Fields,
    pub(crate) shards: Shards,
    pub(crate) tokenizer: Option<GgufTokenizer>,
}

/// Opens a GGUF file and those that belong to it.
pub(crate) fn open(path: &Path) -> Result<Gguf> {
    // What is told of the model stands in the first file alone.
    let mut first = None;
    let mut files = Vec::new();
    for part in parts(path)? {
        files.push(Shard::map(&part, |bytes| {
            let content = Content::read(&mut Cursor::new(bytes)).map_err(|error| refused(&part, error))?;
            let directory = directory(&part, bytes, &content, first.as_ref().unwrap_or(&content))?;
            first.get_or_insert(content);
            Ok(directory)
        })?);
    }
    let content = first.ok_or_else(|| refused(path, "no file of that name"))?;
    let tokenizer = tokenizer::read(path, &content);
    let shards = Shards::from_files(path.parent().unwrap_or(Path::new("")), files);
    Ok(Gguf { config: config::read(path, &content, &shards)?, shards, tokenizer })
}

/// The files of a model of which `path` is one: `name-00001-of-00003.gguf` and so on, as `gguf-split` writes them.
fn parts(path: &Path) -> Result<Vec<PathBuf>> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let numbered = || {
        let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let five = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
        (five(count) && five(number)).then_some((stem, count))
    };
    let Some((stem, count)) = numbered() else { return Ok(vec![path.to_owned()]) };
    let number = |index: usize| path.with_file_name(format!("{stem}-{index:05}-of-{count}.gguf"));
    let all: Vec<PathBuf> = (1..=count.parse().unwrap_or(1)).map(number).collect();
    match all.iter().find(|part| !part.is_file()) {
        Some(missing) => Err(refused(missing, "the model is in several files, and this one is not there")),
        None => Ok(all),
    }
}

/// Where a file's tensors lie, under their names in a checkpoint; names that are not known stay as they are.
fn directory(path: &Path, bytes: &[u8], content: &Content, first: &Content) -> Result<BTreeMap<String, Place>> {
    let names = NameMap::new(path, first)?;
    let mut tensors = BTreeMap::new();
    for (name, info) in &content.tensor_infos {
        let shape = info.shape.dims().to_vec();
        let (weights, size) = (info.ggml_dtype.block_size(), info.ggml_dtype.type_size());
        let end = || {
            let elements = shape.iter().try_fold(1usize, |all, &len| all.checked_mul(len))?;
            let whole = shape.last().is_some_and(|width| width.is_multiple_of(weights));
            let len = (elements / weights).checked_mul(size).filter(|_| whole)?;
            let start = usize::try_from(content.tensor_data_offset.checked_add(info.offset)?).ok()?;
            Some((start, start.checked_add(len)?))
        };
        let found = end().filter(|&(_, end)| end <= bytes.len());
        let (start, end) = found.ok_or_else(|| {
            let reason =
                format!("tensor {name:?} of shape {shape:?} ({:?}) does not lie inside the file", info.ggml_dtype);
            refused(path, reason)
        })?;
        let place = Place {
            dtype: info.ggml_dtype.into(),
            interleaved_heads: names.interleaved_heads(name),
            shape,
            bytes: start..end,
        };
        tensors.insert(names.checkpoint_name(name), place);
    }
    Ok(tensors)
}

fn refused(path: &Path, reason: impl ToString) -> ModelError {
    ModelError::Gguf { path: path.to_owned(), reason: reason.to_string() }
}
