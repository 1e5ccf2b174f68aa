//! Where the hub is, where its cache lies and what may be asked of it.

use std::path::{Path, PathBuf};

/// The settings that Hugging Face's tools share, read from their environment variables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HubSettings {
    /// `HF_HUB_CACHE`, else `$HF_HOME/hub`.
    pub(super) cache: PathBuf,
    /// `HF_TOKEN`, else the token that a login left in `$HF_HOME/token`.
    pub(super) token: Option<String>,
    /// `HF_ENDPOINT`, else the public hub.
    pub(super) endpoint: String,
    /// `HF_HUB_OFFLINE`: the cache only.
    pub(super) offline: bool,
}

impl HubSettings {
    /// Reads the settings; `None` where no variable says where the cache could be.
    pub(super) fn from_env(var: &dyn Fn(&str) -> Option<String>) -> Option<Self> {
        let set = |key: &str| var(key).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
        let home = set("HF_HOME").map(PathBuf::from).or_else(|| {
            let user_cache = set("XDG_CACHE_HOME").map(PathBuf::from);
            let user_cache = user_cache.or_else(|| Some(Path::new(&set("HOME")?).join(".cache")));
            Some(user_cache?.join("huggingface"))
        });
        let cache = set("HF_HUB_CACHE").map(PathBuf::from).or_else(|| Some(home.as_ref()?.join("hub")))?;
        let login = || {
            let file = set("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| Some(home.as_ref()?.join("token")))?;
            let token = std::fs::read_to_string(file).ok()?;
            Some(token.trim().to_owned()).filter(|token| !token.is_empty())
        };
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        Some(Self {
            cache,
            token: set("HF_TOKEN").or_else(login),
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            offline: set("HF_HUB_OFFLINE")
                .is_some_and(|value| matches!(value.to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on")),
        })
    }
}
