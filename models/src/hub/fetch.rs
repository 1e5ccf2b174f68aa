//! Fetching the files that a model needs into the shared cache.

use std::collections::BTreeSet;
use std::path::PathBuf;

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use super::cache::CachedRepo;
use super::settings::HubSettings;
use crate::error::ModelError;
use crate::shards::{INDEX, SINGLE, read_index};

/// Fetched where the repository has them; the weights come on top.
const SMALL_FILES: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// Why nothing was fetched.
pub(super) enum Failure {
    /// The hub answered, and the answer does not serve.
    Refused(ModelError),
    /// The hub did not answer.
    Unreachable(ModelError),
}

/// Brings the files of a revision into the cache and gives the folder that holds them.
///
/// All files are of the one commit that the revision stood at when the fetch began.
pub(super) fn fetch(
    settings: &HubSettings,
    model: &str,
    revision: &str,
    cached: &CachedRepo,
) -> Result<PathBuf, Failure> {
    let fail = |what: &str, error: ApiError| failure(settings, model, revision, what, error);
    let builder = ApiBuilder::from_cache(Cache::new(settings.cache.clone()))
        .with_endpoint(settings.endpoint.clone())
        .with_token(settings.token.clone())
        .with_user_agent("moetrail", env!("CARGO_PKG_VERSION"))
        .with_retries(3);
    let api = builder.build().map_err(|error| fail("the client", error))?;
    let at = |revision: &str| {
        let repo = Repo::with_revision(model.to_owned(), RepoType::Model, revision.to_owned());
        api.repo(repo)
    };
    let info = at(revision).info().map_err(|error| fail("the model", error))?;
    let refused = |reason: String| Failure::Refused(hub_error(model, reason));
    let Some(snapshot) = cached.commit(&info.sha) else {
        return Err(refused(format!("the hub names a commit {:?}", info.sha)));
    };
    let repo = at(&info.sha);
    let get = |file: &str| match snapshot.folder().join(file).is_file() {
        true => Ok(()),
        false => download(&repo, file).map_err(|error| fail(file, error)),
    };
    let there: BTreeSet<&str> = info.siblings.iter().map(|file| file.rfilename.as_str()).collect();
    for file in SMALL_FILES.iter().filter(|file| there.contains(*file)) {
        get(file)?;
    }
    if there.contains(SINGLE) {
        get(SINGLE)?;
    } else if there.contains(INDEX) {
        get(INDEX)?;
        let placed = read_index(&snapshot.folder().join(INDEX)).map_err(Failure::Refused)?;
        let shards: BTreeSet<&str> = placed.iter().map(|(_, shard)| shard.as_str()).collect();
        for shard in shards {
            get(shard)?;
        }
    } else {
        return Err(refused(format!("expected {SINGLE} or {INDEX} in the repository, found neither")));
    }
    let folder = snapshot.complete().map_err(|missing| refused(format!("the repository has no {missing}")))?;
    if let Err(error) = cached.set_ref(revision, &info.sha) {
        tracing::warn!(model, revision, %error, "the cache could not note the revision; offline use will not find it");
    }
    Ok(folder)
}

fn download(repo: &ApiRepo, file: &str) -> Result<(), ApiError> {
    tracing::info!(file, "fetching from the hub");
    repo.download(file).map(drop)
}

fn failure(settings: &HubSettings, model: &str, revision: &str, what: &str, error: ApiError) -> Failure {
    let endpoint = &settings.endpoint;
    match status(&error) {
        Some(code @ (401 | 403)) => {
            let hint = match settings.token {
                Some(_) => "the token gives no access: accept the model's terms on its page, or use another token",
                None => "no such model, or it is gated: set HF_TOKEN",
            };
            Failure::Refused(hub_error(model, format!("{endpoint} answered {code} for {what}: {hint}")))
        }
        Some(404) => {
            let reason =
                format!("{endpoint} answered 404 for {what}: no such model, or no revision {revision:?} of it");
            Failure::Refused(hub_error(model, reason))
        }
        Some(code) if code < 500 => {
            Failure::Refused(hub_error(model, format!("{endpoint} answered {code} for {what}")))
        }
        _ => Failure::Unreachable(hub_error(model, format!("{endpoint} did not give {what}: {error}"))),
    }
}

/// The status of the hub's answer, where it gave one.
fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(code) => Some(code),
            _ => None,
        },
        ApiError::TooManyRetries(error) => status(error),
        _ => None,
    }
}

fn hub_error(model: &str, reason: String) -> ModelError {
    ModelError::Hub { model: model.to_owned(), reason }
}
