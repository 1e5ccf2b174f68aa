//! Hub ids: from `org/name` to a folder, through the cache that all Hugging Face tools share.
//!
//! ```text
//! $HF_HUB_CACHE/models--org--name/refs/main                 the commit that a branch or tag stood at
//! $HF_HUB_CACHE/models--org--name/snapshots/<commit>/...    links to the files of that commit
//! $HF_HUB_CACHE/models--org--name/blobs/<etag>              the files
//! ```

mod cache;
#[cfg(feature = "hub")]
mod fetch;
mod settings;
#[cfg(feature = "hub")]
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use crate::error::{ModelError, Result};
use cache::CachedRepo;
use settings::HubSettings;

/// The folder of a hub model's files, fetched where the cache lacks them and the settings allow it.
pub(crate) fn resolve(model: &str, revision: Option<&str>) -> Result<PathBuf> {
    let settings = HubSettings::from_env(&|key| std::env::var(key).ok()).ok_or_else(|| ModelError::Hub {
        model: model.to_owned(),
        reason: "no cache folder: set HF_HOME, HF_HUB_CACHE or HOME".to_owned(),
    })?;
    resolve_with(&settings, model, revision.unwrap_or("main"))
}

fn resolve_with(settings: &HubSettings, model: &str, revision: &str) -> Result<PathBuf> {
    if !is_hub_id(model) {
        return Err(ModelError::NotFound {
            model: model.to_owned(),
            reason: "no such folder, and not a hub id of the form org/name".to_owned(),
        });
    }
    if !is_revision(revision) {
        return Err(ModelError::Hub {
            model: model.to_owned(),
            reason: format!("{revision:?} is not a branch, tag or commit"),
        });
    }
    let cached = CachedRepo::new(&settings.cache, model);
    if settings.offline {
        return match cached.snapshot(revision) {
            Some(snapshot) => snapshot.complete().map_err(|missing| offline(settings, model, revision, &missing)),
            None => Err(offline(settings, model, revision, "this revision")),
        };
    }
    fetch_or_cached(settings, model, revision, &cached)
}

#[cfg(feature = "hub")]
fn fetch_or_cached(settings: &HubSettings, model: &str, revision: &str, cached: &CachedRepo) -> Result<PathBuf> {
    let complete = || cached.snapshot(revision)?.complete().ok();
    // A commit never changes, so that a complete snapshot of one needs no question to the hub.
    if let Some(folder) = complete().filter(|_| cache::is_commit(revision)) {
        return Ok(folder);
    }
    match fetch::fetch(settings, model, revision, cached) {
        Ok(folder) => Ok(folder),
        Err(fetch::Failure::Refused(error)) => Err(error),
        Err(fetch::Failure::Unreachable(error)) => match complete() {
            Some(folder) => {
                tracing::warn!(model, revision, %error, "the hub is out of reach: using the cached files");
                Ok(folder)
            }
            None => Err(error),
        },
    }
}

#[cfg(not(feature = "hub"))]
fn fetch_or_cached(settings: &HubSettings, model: &str, revision: &str, cached: &CachedRepo) -> Result<PathBuf> {
    let found = cached.snapshot(revision).and_then(|snapshot| snapshot.complete().ok());
    found.ok_or_else(|| ModelError::Hub {
        model: model.to_owned(),
        reason: format!(
            "not in the cache at {}, and this build cannot fetch (feature `hub`)",
            settings.cache.display()
        ),
    })
}

fn offline(settings: &HubSettings, model: &str, revision: &str, missing: &str) -> ModelError {
    ModelError::Hub {
        model: model.to_owned(),
        reason: format!(
            "HF_HUB_OFFLINE is set and the cache at {} lacks {missing} (revision {revision:?}); unset it or fetch the model first",
            settings.cache.display()
        ),
    }
}

/// `org/name`, both of letters, digits, `.`, `_` and `-`.
fn is_hub_id(model: &str) -> bool {
    let part = |part: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        !part.is_empty()
            && part.len() <= 96
            && !part.starts_with('.')
            && !part.contains("..")
            && part.chars().all(plain)
    };
    model.split_once('/').is_some_and(|(org, name)| part(org) && part(name))
}

/// Revisions become a path below `refs`, so that they may not lead out of it.
fn is_revision(revision: &str) -> bool {
    let part = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\\');
    !revision.contains('\0') && revision.split('/').all(part)
}
