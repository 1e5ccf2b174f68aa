//! Where the bundled checkpoint lies.

use std::path::PathBuf;

use anyhow::{Result, bail};

/// The folder of the checkpoint that comes with the source: beside the executable (`models/bundled`, for a copied
/// installation), else where the binary was built.
pub fn folder() -> Result<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join("models/bundled")));
    let built = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/models/bundled"));
    let candidates: Vec<PathBuf> = beside.into_iter().chain([built]).collect();
    match candidates.iter().find(|folder| folder.join("config.json").is_file()) {
        Some(folder) => Ok(folder.clone()),
        None => bail!("the bundled checkpoint is not at {candidates:?}; name a checkpoint folder or hub id instead"),
    }
}
