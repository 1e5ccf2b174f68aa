//! One file of tensors, mapped into memory. The only `unsafe` of this crate is here.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::{Mmap, MmapMut};
use safetensors::tensor::{Metadata, SafeTensorError, SafeTensors};

use crate::dtype::StoredType;
use crate::error::{ModelError, Result};

/// Bytes of the length field that a safetensors file begins with.
const LENGTH_FIELD: usize = 8;

/// A mapped file, and where its tensors lie in it.
#[derive(Debug)]
pub(crate) struct Shard {
    path: PathBuf,
    map: Mmap,
    tensors: BTreeMap<String, Place>,
    /// Whether pages come back from a file.
    backed: bool,
}

/// Dtype, shape and bytes of a tensor in its file.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) dtype: StoredType,
    pub(crate) shape: Vec<usize>,
    /// Inside the file.
    pub(crate) bytes: Range<usize>,
    /// Heads, where the rows of a head alternate between its halves: 0, d/2, 1, d/2 + 1 and so on.
    pub(crate) interleaved_heads: Option<usize>,
}

impl Shard {
    /// Maps a safetensors file and checks its header against its length.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        Self::map(path, |bytes| {
            let (header, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| header_error(path, bytes, e))?;
            let start = LENGTH_FIELD + header;
            let place = |name: String| {
                let info = metadata.info(&name)?;
                let (first, end) = info.data_offsets;
                let place = Place {
                    dtype: info.dtype.into(),
                    shape: info.shape.clone(),
                    bytes: start + first..start + end,
                    interleaved_heads: None,
                };
                Some((name, place))
            };
            Ok(metadata.offset_keys().into_iter().filter_map(place).collect())
        })
    }

    /// Maps a file whose tensors `directory` finds.
    pub(crate) fn map(path: &Path, directory: impl FnOnce(&[u8]) -> Result<BTreeMap<String, Place>>) -> Result<Self> {
        let io = |source| ModelError::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        // SAFETY: the mapping is private and read-only. Should another process cut the file while it is mapped, a read
        // past its new end ends the process by SIGBUS; no value of ours can change type or lifetime through that.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let tensors = directory(&map)?;
        Ok(Self { path: path.to_owned(), map, tensors, backed: true })
    }

    /// Memory without a file, which `fill` writes.
    pub(crate) fn in_memory(path: &Path, len: usize, fill: impl FnOnce(&mut [u8])) -> Result<Self> {
        let io = |source| ModelError::Io { path: path.to_owned(), source };
        let mut map = MmapMut::map_anon(len.max(1)).map_err(io)?;
        fill(&mut map);
        let map = map.make_read_only().map_err(io)?;
        Ok(Self { path: path.to_owned(), map, tensors: BTreeMap::new(), backed: false })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The names of the file's tensors.
    pub(crate) fn names(&self) -> impl Iterator<Item = &String> {
        self.tensors.keys()
    }

    /// Dtype, shape and place of a tensor.
    pub(crate) fn place(&self, name: &str) -> Option<&Place> {
        self.tensors.get(name)
    }

    /// The bytes of a tensor; little-endian, row after row, perhaps unaligned.
    pub(crate) fn bytes(&self, place: &Place) -> &[u8] {
        &self.map[place.bytes.clone()]
    }

    /// Lets the system take back the pages under a range of a tensor's bytes; they come back from the file if read again.
    pub(crate) fn release(&self, place: &Place, range: Range<usize>) {
        self.release_bytes(place.bytes.start + range.start, range.len());
    }

    /// Lets the system take back the pages of the whole file.
    pub(crate) fn release_all(&self) {
        self.release_bytes(0, self.map.len());
    }

    #[cfg(unix)]
    fn release_bytes(&self, offset: usize, len: usize) {
        if !self.backed {
            return;
        }
        let advice = memmap2::UncheckedAdvice::DontNeed;
        // SAFETY: the mapping is read-only and backed by the file, so a dropped page reads back with the same bytes.
        if let Err(error) = unsafe { self.map.unchecked_advise_range(advice, offset, len) } {
            tracing::debug!(path = %self.path.display(), %error, "madvise refused");
        }
    }

    #[cfg(not(unix))]
    fn release_bytes(&self, _: usize, _: usize) {}
}

/// Says what is wrong in terms of lengths where the header itself can be read.
fn header_error(path: &Path, bytes: &[u8], error: SafeTensorError) -> ModelError {
    let length = |expected: u64| ModelError::ShardLength { path: path.to_owned(), expected, found: bytes.len() as u64 };
    let header = bytes.first_chunk::<LENGTH_FIELD>().map(|n| u64::from_le_bytes(*n));
    match (&error, header) {
        (SafeTensorError::InvalidHeaderLength, Some(header)) => length((LENGTH_FIELD as u64).saturating_add(header)),
        (SafeTensorError::MetadataIncompleteBuffer, Some(header)) => {
            let end = LENGTH_FIELD + header as usize;
            match serde_json::from_slice::<Metadata>(&bytes[LENGTH_FIELD..end]) {
                Ok(metadata) => length((end + metadata.data_len()) as u64),
                Err(_) => bad_header(path, error.to_string()),
            }
        }
        (SafeTensorError::HeaderTooSmall, _) => {
            bad_header(path, format!("expected at least {LENGTH_FIELD} bytes, found {}", bytes.len()))
        }
        _ => bad_header(path, error.to_string()),
    }
}

fn bad_header(path: &Path, reason: String) -> ModelError {
    ModelError::Header { path: path.to_owned(), reason }
}
