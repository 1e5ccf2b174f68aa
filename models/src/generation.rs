//! What `generation_config.json` says: the ids that end a text, and the default sampling.

use std::path::Path;

use crate::error::Result;
use crate::fields::Fields;

/// Sampling defaults of a checkpoint; `None` where the file is silent.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// Token ids that end a text.
    pub eos_token_ids: Vec<u32>,
    /// Whether the authors sample at all; `Some(false)` asks for the most likely token.
    pub do_sample: Option<bool>,
    /// Divides the logits.
    pub temperature: Option<f64>,
    /// The mass of the most likely tokens that is kept.
    pub top_p: Option<f64>,
    /// The number of the most likely tokens that is kept; 0 keeps all.
    pub top_k: Option<usize>,
    /// Tokens less likely than this share of the likeliest are dropped.
    pub min_p: Option<f64>,
    /// Divides the positive logits, and multiplies the negative ones, of tokens seen before.
    pub repetition_penalty: Option<f64>,
}

impl GenerationConfig {
    /// Reads the file, or gives the empty defaults where there is none.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        if !path.is_file() {
            return Ok(Self::default());
        }
        let fields = Fields::read(path)?;
        let do_sample = match fields.get("do_sample") {
            Some(_) => Some(fields.bool_or("do_sample", false)?),
            None => None,
        };
        let top_k = match fields.get("top_k") {
            Some(_) => Some(fields.count_of(&["top_k"], 1 << 30)?),
            None => None,
        };
        Ok(Self {
            eos_token_ids: fields.ids("eos_token_id", 1 << 32)?,
            do_sample,
            temperature: fields.number_opt("temperature")?,
            top_p: fields.number_opt("top_p")?,
            top_k,
            min_p: fields.number_opt("min_p")?,
            repetition_penalty: fields.number_opt("repetition_penalty")?,
        })
    }
}
