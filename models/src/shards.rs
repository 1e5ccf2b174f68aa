//! The files of a checkpoint, with one directory of their tensors.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::config::ModelConfig;
use crate::dtype::StoredType;
use crate::dummy::Dummy;
use crate::error::{ModelError, Result};
use crate::fields::Fields;
use crate::shard::{Place, Shard};

pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// All tensors of a checkpoint by name.
#[derive(Debug)]
pub(crate) struct Shards {
    folder: PathBuf,
    files: Vec<Shard>,
    /// Tensor name to its file.
    tensors: BTreeMap<String, usize>,
    /// In place of files.
    dummy: Option<Dummy>,
}

/// A tensor as it lies in its file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StoredTensor<'a> {
    shard: &'a Shard,
    place: &'a Place,
}

impl Shards {
    /// Maps `model.safetensors`, or the shards that `model.safetensors.index.json` names.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let single = folder.join(SINGLE);
        let index = folder.join(INDEX);
        if single.is_file() {
            Self::from_single(folder, &single)
        } else if index.is_file() {
            Self::from_index(folder, &index)
        } else {
            Err(ModelError::NotFound {
                model: folder.display().to_string(),
                reason: format!(
                    "expected {SINGLE} or {INDEX} in the folder, found neither (other weight formats do not load)"
                ),
            })
        }
    }

    fn from_single(folder: &Path, path: &Path) -> Result<Self> {
        Ok(Self::from_files(folder, vec![Shard::open(path)?]))
    }

    /// The tensors of some files.
    pub(crate) fn from_files(folder: &Path, files: Vec<Shard>) -> Self {
        let names =
            |(number, file): (usize, &'_ Shard)| file.names().map(|name| (name.clone(), number)).collect::<Vec<_>>();
        let tensors = files.iter().enumerate().flat_map(names).collect();
        Self { folder: folder.to_owned(), files, tensors, dummy: None }
    }

    /// Random tensors, whatever their names.
    pub(crate) fn dummy(folder: &Path, config: &ModelConfig) -> Result<Self> {
        let dummy = Some(Dummy::new(folder, config)?);
        Ok(Self { folder: folder.to_owned(), files: Vec::new(), tensors: BTreeMap::new(), dummy })
    }

    fn from_index(folder: &Path, index: &Path) -> Result<Self> {
        let placed = read_index(index)?;
        let mut files: Vec<Shard> = Vec::new();
        let mut numbers: BTreeMap<&str, usize> = BTreeMap::new();
        let mut tensors = BTreeMap::new();
        for (name, file) in &placed {
            let number = match numbers.get(file.as_str()) {
                Some(&number) => number,
                None => {
                    let path = folder.join(file);
                    if !path.is_file() {
                        return Err(ModelError::MissingShard {
                            index: index.to_owned(),
                            shard: file.clone(),
                            tensor: name.clone(),
                        });
                    }
                    files.push(Shard::open(&path)?);
                    numbers.insert(file, files.len() - 1);
                    files.len() - 1
                }
            };
            if files[number].place(name).is_none() {
                return Err(ModelError::IndexMismatch {
                    index: index.to_owned(),
                    shard: file.clone(),
                    tensor: name.clone(),
                });
            }
            tensors.insert(name.clone(), number);
        }
        Ok(Self { folder: folder.to_owned(), files, tensors, dummy: None })
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Gives the pages of all files back to the system.
    pub(crate) fn release(&self) {
        self.files.iter().for_each(Shard::release_all);
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    pub(crate) fn get(&self, name: &str) -> Option<StoredTensor<'_>> {
        let shard = &self.files[*self.tensors.get(name)?];
        let place = shard.place(name)?;
        Some(StoredTensor { shard, place })
    }

    /// The tensor of that name, or a random one of that shape.
    pub(crate) fn get_or_dummy(&self, name: &str, shape: &[usize]) -> Option<StoredTensor<'_>> {
        match &self.dummy {
            Some(dummy) => dummy.get(shape),
            None => self.get(name),
        }
    }

    /// All names, sorted.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Bytes of all tensors.
    pub(crate) fn bytes(&self) -> u64 {
        let size = |name: &str| self.get(name).map_or(0, |tensor| tensor.bytes().len() as u64);
        self.names().map(size).sum()
    }
}

impl<'a> StoredTensor<'a> {
    pub(crate) fn new(shard: &'a Shard, place: &'a Place) -> Self {
        Self { shard, place }
    }

    pub(crate) fn path(&self) -> &'a Path {
        self.shard.path()
    }

    pub(crate) fn shape(&self) -> &'a [usize] {
        &self.place.shape
    }

    pub(crate) fn dtype(&self) -> StoredType {
        self.place.dtype
    }

    /// Heads whose rows alternate between the halves of a head.
    pub(crate) fn interleaved_heads(&self) -> Option<usize> {
        self.place.interleaved_heads
    }

    /// Little-endian, row after row, perhaps unaligned.
    pub(crate) fn bytes(&self) -> &'a [u8] {
        self.shard.bytes(self.place)
    }

    /// Gives the pages under a range of the bytes back to the system.
    pub(crate) fn release(&self, range: Range<usize>) {
        self.shard.release(self.place, range);
    }
}

/// Tensor name and file name of every entry of the index, sorted by tensor.
pub(crate) fn read_index(index: &Path) -> Result<Vec<(String, String)>> {
    let fields = Fields::read(index)?;
    let map = fields.get("weight_map").and_then(|map| map.as_object());
    let map = map.ok_or_else(|| fields.wrong("weight_map", "an object of tensor name to file name"))?;
    let mut placed = Vec::with_capacity(map.len());
    for (name, file) in map {
        let file = file.as_str().filter(|file| is_plain_name(file));
        let file = file.ok_or_else(|| {
            let found = map.get(name).map(ToString::to_string).unwrap_or_default();
            ModelError::Config {
                path: index.to_owned(),
                key: format!("weight_map.{name}"),
                expected: "the name of a file in the folder".into(),
                found,
            }
        })?;
        placed.push((name.clone(), file.to_owned()));
    }
    placed.sort();
    Ok(placed)
}

/// An index may not reach outside of its folder.
fn is_plain_name(file: &str) -> bool {
    Path::new(file).file_name().is_some_and(|name| name == file)
}
