//! The families that load, and how a configuration picks one.

use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::families::{mixtral, olmoe, qwen3_moe};
use crate::fields::Fields;
use crate::names::LayerNames;
use crate::shards::Shards;

/// What one family does in its own way: its configuration keys and its tensor names.
pub(crate) struct Family {
    /// The class that transformers would load.
    pub(crate) architecture: &'static str,
    /// Transformers' name of the family.
    pub(crate) model_type: &'static str,
    /// Reads the configuration.
    pub(crate) config: fn(&Fields) -> Result<ModelConfig>,
    /// Names the tensors of a layer, given the prefix of the decoder's names and its index.
    pub(crate) layer: fn(&ModelConfig, &Shards, &str, usize) -> LayerNames,
}

static FAMILIES: [&Family; 3] = [&qwen3_moe::FAMILY, &olmoe::FAMILY, &mixtral::FAMILY];

/// Every architecture that loads.
pub fn supported_architectures() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|family| family.architecture)
}

/// The family that `architectures` names, or `model_type` where a bare decoder was saved.
pub(crate) fn family_of(fields: &Fields) -> Result<&'static Family> {
    let architectures = fields.texts("architectures")?;
    let model_type = fields.text_opt("model_type")?.unwrap_or("");
    let by_name = |name: &String| FAMILIES.iter().find(|family| family.architecture == name);
    let found = architectures.iter().find_map(by_name).or_else(|| {
        let bare = architectures.iter().all(|name| name.ends_with("Model"));
        FAMILIES.iter().find(|family| bare && family.model_type == model_type)
    });
    found.copied().ok_or_else(|| ModelError::UnknownArchitecture {
        path: fields.path().to_owned(),
        found: match architectures.is_empty() {
            true => format!("with model_type {model_type:?}"),
            false => architectures.join(", "),
        },
        supported: supported_architectures().collect::<Vec<_>>().join(", "),
    })
}
