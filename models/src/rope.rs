//! Rotary embedding: its configuration and its inverse frequencies, as transformers' `modeling_rope_utils` computes them.

use std::f64::consts::PI;

use moetrail_kernels::RopeTable;

use crate::error::{ModelError, Result};
use crate::fields::Fields;

const SUPPORTED: &str = "default, linear, llama3, yarn";

/// How the rotary frequencies follow from `rope_theta`.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// The base of the geometric series of wavelengths.
    pub theta: f64,
    /// The change to the frequencies that stretches the context.
    pub scaling: RopeScaling,
}

/// The change to the rotary frequencies that stretches the context.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        /// The stretch.
        factor: f64,
    },
    /// Llama 3.1's: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        /// The stretch.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are stretched in full.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Positions of the pre-training.
        original: usize,
    },
    /// YaRN: a ramp over the dimensions, and a factor on cos and sin.
    Yarn {
        /// The stretch.
        factor: f64,
        /// Positions of the pre-training.
        original: usize,
        /// Multiplied into cos and sin.
        attention_factor: f64,
        /// Rotations over `original` positions above which a dimension is kept.
        beta_fast: f64,
        /// Rotations below which a dimension is stretched in full.
        beta_slow: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
}

impl RopeConfig {
    /// Reads `rope_theta` with `rope_scaling`, or `rope_parameters`.
    pub(crate) fn read(fields: &Fields, default_theta: f64, max_positions: usize) -> Result<Self> {
        // The old key wins where both are there, and a base inside the object wins over one beside it.
        let object = match fields.object("rope_scaling")? {
            Some(object) => Some(object),
            None => fields.object("rope_parameters")?,
        };
        let beside = fields.positive_opt("rope_theta")?;
        let inside = match &object {
            Some(object) => object.positive_opt("rope_theta")?,
            None => None,
        };
        let theta = inside.or(beside).unwrap_or(default_theta);
        if theta <= 1.0 {
            return Err(fields.wrong("rope_theta", "a number above 1"));
        }
        refuse_partial(fields)?;
        let Some(object) = object else {
            return Ok(Self { theta, scaling: RopeScaling::Default });
        };
        refuse_partial(&object)?;
        // Phi-3 style configurations keep the pre-training length outside of the object; transformers prefers it there.
        let original = match fields.size_opt("original_max_position_embeddings", 1 << 30)? {
            Some(n) => n,
            None => object.size_opt("original_max_position_embeddings", 1 << 30)?.unwrap_or(max_positions),
        };
        let scaling = RopeScaling::read(&object, original, max_positions)?;
        Ok(Self { theta, scaling })
    }

    /// The inverse frequencies, `[head_dim / 2]`, in f32 steps like torch's.
    pub fn inv_freq(&self, head_dim: usize) -> Vec<f32> {
        let half = head_dim / 2;
        let frequencies = |i: usize| {
            let exponent = (2 * i) as f32 / head_dim as f32;
            (self.theta as f32 as f64).powf(f64::from(exponent)) as f32
        };
        match self.scaling {
            RopeScaling::Default => (0..half).map(|i| 1.0 / frequencies(i)).collect(),
            RopeScaling::Linear { factor } => (0..half).map(|i| 1.0 / frequencies(i) / factor as f32).collect(),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                let original = original as f64;
                let longest_kept = (original / high_freq_factor) as f32;
                let shortest_stretched = (original / low_freq_factor) as f32;
                let slope = (high_freq_factor - low_freq_factor) as f32;
                let stretch = |i: usize| {
                    let inv = 1.0 / frequencies(i);
                    let wavelength = (2.0 * PI) as f32 / inv;
                    if wavelength < longest_kept {
                        inv
                    } else if wavelength > shortest_stretched {
                        inv / factor as f32
                    } else {
                        let smooth = (original as f32 / wavelength - low_freq_factor as f32) / slope;
                        (1.0 - smooth) * inv / factor as f32 + smooth * inv
                    }
                };
                (0..half).map(stretch).collect()
            }
            RopeScaling::Yarn { factor, original, beta_fast, beta_slow, truncate, .. } => {
                let dim = head_dim as f64;
                let correction =
                    |rotations: f64| dim * (original as f64 / (rotations * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
                let (mut low, mut high) = (correction(beta_fast), correction(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let low = low.max(0.0);
                let mut high = high.min(dim - 1.0);
                if low == high {
                    high += 0.001;
                }
                let blend = |i: usize| {
                    let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                    let keep = 1.0 - ramp;
                    let frequency = frequencies(i);
                    1.0 / (factor as f32 * frequency) * (1.0 - keep) + 1.0 / frequency * keep
                };
                (0..half).map(blend).collect()
            }
        }
    }

    /// The factor multiplied into cos and sin.
    pub fn attention_scaling(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor as f32,
            _ => 1.0,
        }
    }

    /// The positions that the model can serve: a stretch may reach beyond `max_position_embeddings`.
    pub(crate) fn reach(&self, max_position_embeddings: usize) -> usize {
        let stretched = match self.scaling {
            RopeScaling::Yarn { factor, original, .. } => factor * original as f64,
            RopeScaling::Linear { factor } => factor * max_position_embeddings as f64,
            RopeScaling::Default | RopeScaling::Llama3 { .. } => 0.0,
        };
        max_position_embeddings.max(stretched as usize)
    }

    /// The table of cos and sin for positions below `max_positions`.
    pub(crate) fn table(&self, head_dim: usize, max_positions: usize) -> RopeTable {
        RopeTable::new(self.inv_freq(head_dim), self.attention_scaling(), max_positions)
    }
}

impl RopeScaling {
    fn read(object: &Fields, original: usize, max_positions: usize) -> Result<Self> {
        let kind = match object.text_opt("rope_type")? {
            Some(kind) => kind,
            None => object.text_opt("type")?.unwrap_or("default"),
        };
        let needed = |key: &str| {
            let value = object.positive_opt(key)?;
            value.ok_or_else(|| object.wrong(key, "a number above 0"))
        };
        match kind {
            "default" => Ok(Self::Default),
            "linear" => Ok(Self::Linear { factor: needed("factor")? }),
            "llama3" => {
                let (low, high) = (needed("low_freq_factor")?, needed("high_freq_factor")?);
                if high <= low {
                    return Err(object.wrong("high_freq_factor", format!("a number above low_freq_factor ({low})")));
                }
                Ok(Self::Llama3 { factor: needed("factor")?, low_freq_factor: low, high_freq_factor: high, original })
            }
            "yarn" => {
                let factor = object.positive_opt("factor")?.unwrap_or(max_positions as f64 / original as f64);
                Ok(Self::Yarn {
                    factor,
                    original,
                    attention_factor: yarn_attention_factor(object, factor)?,
                    beta_fast: object.positive_opt("beta_fast")?.unwrap_or(32.0),
                    beta_slow: object.positive_opt("beta_slow")?.unwrap_or(1.0),
                    truncate: object.bool_or("truncate", true)?,
                })
            }
            other => Err(ModelError::UnsupportedRope {
                path: object.path().to_owned(),
                found: other.to_owned(),
                supported: SUPPORTED.to_owned(),
            }),
        }
    }
}

fn yarn_attention_factor(object: &Fields, factor: f64) -> Result<f64> {
    if let Some(given) = object.number_opt("attention_factor")? {
        return Ok(given);
    }
    let mscale = |weight: f64| {
        if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
    };
    let weight = object.number_opt("mscale")?.unwrap_or(0.0);
    let weight_all = object.number_opt("mscale_all_dim")?.unwrap_or(0.0);
    Ok(if weight != 0.0 && weight_all != 0.0 { mscale(weight) / mscale(weight_all) } else { mscale(1.0) })
}

/// None of the families rotates a part of the head only.
fn refuse_partial(fields: &Fields) -> Result<()> {
    match fields.number_opt("partial_rotary_factor")? {
        Some(x) if x != 1.0 => Err(fields.wrong("partial_rotary_factor", "1.0 or nothing")),
        _ => Ok(()),
    }
}
