//! What the shared cache holds of one model.

use std::path::{Path, PathBuf};

use crate::shards::{INDEX, SINGLE, read_index};

/// The cache's folder of one model.
#[derive(Debug)]
pub(super) struct CachedRepo {
    folder: PathBuf,
}

/// The files of one commit.
#[derive(Debug)]
pub(super) struct Snapshot {
    folder: PathBuf,
}

impl CachedRepo {
    pub(super) fn new(cache: &Path, model: &str) -> Self {
        Self { folder: cache.join(format!("models--{}", model.replace('/', "--"))) }
    }

    /// The snapshot that a branch or tag stood at when it was last fetched, or that of a commit.
    pub(super) fn snapshot(&self, revision: &str) -> Option<Snapshot> {
        let commit = match is_commit(revision) {
            true => revision.to_owned(),
            false => std::fs::read_to_string(self.folder.join("refs").join(revision)).ok()?,
        };
        self.commit(commit.trim()).filter(|snapshot| snapshot.folder.is_dir())
    }

    /// The snapshot of a commit, there or not yet.
    pub(super) fn commit(&self, commit: &str) -> Option<Snapshot> {
        is_commit(commit).then(|| Snapshot { folder: self.folder.join("snapshots").join(commit) })
    }

    /// Notes the commit that a branch or tag stands at.
    #[cfg(feature = "hub")]
    pub(super) fn set_ref(&self, revision: &str, commit: &str) -> std::io::Result<()> {
        // The client notes a commit as a branch of its own name, which other tools do not expect.
        std::fs::remove_file(self.folder.join("refs").join(commit)).ok();
        if is_commit(revision) {
            return Ok(());
        }
        let file = self.folder.join("refs").join(revision);
        if let Some(parent) = file.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::write(file, commit)
    }
}

impl Snapshot {
    /// The folder, or the name of a file that it lacks.
    pub(super) fn complete(&self) -> Result<PathBuf, String> {
        let has = |file: &str| self.folder.join(file).is_file();
        if !has("config.json") {
            return Err("config.json".to_owned());
        }
        if !has(SINGLE) {
            let index = self.folder.join(INDEX);
            if !has(INDEX) {
                return Err(format!("{SINGLE} or {INDEX}"));
            }
            let placed = read_index(&index).map_err(|error| format!("a readable {INDEX} ({error})"))?;
            if let Some((_, shard)) = placed.iter().find(|(_, shard)| !has(shard)) {
                return Err(shard.clone());
            }
        }
        Ok(self.folder.clone())
    }

    #[cfg(feature = "hub")]
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }
}

/// Whether a revision is a full commit hash.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}
