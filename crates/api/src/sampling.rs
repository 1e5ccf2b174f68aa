//! Sampling settings as clients write them, and what they mean.

use std::collections::BTreeMap;
use std::fmt;

use moetrail_engine::SamplingParams;
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, SeqAccess, Visitor};

use crate::body::{Object, read};
use crate::error::ApiError;

/// Begins the names of settings that an endpoint has in `sampling_params`.
pub(crate) const NESTED: &str = "sampling_params.";

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Nested<T> {
    sampling_params: Option<Object<T>>,
}

/// Reads what one concern finds in `sampling_params`.
pub(crate) fn nested<T: DeserializeOwned + Default>(body: &[u8]) -> Result<T, ApiError> {
    Ok(read::<Nested<T>>(body)?.sampling_params.unwrap_or_default().0)
}

/// Sampling settings used where a request is silent, from the checkpoint's `generation_config.json`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DefaultSampling {
    /// Divides the logits; 0 is greedy.
    pub temperature: f32,
    /// Nucleus mass; 1 is off.
    pub top_p: f32,
    /// Candidates kept; 0 is off.
    pub top_k: usize,
    /// Least share of the best probability; 0 is off.
    pub min_p: f32,
    /// Over prompt and output tokens; 1 is off.
    pub repetition_penalty: f32,
}

impl Default for DefaultSampling {
    fn default() -> Self {
        let SamplingParams { temperature, top_p, top_k, min_p, repetition_penalty, .. } = SamplingParams::default();
        Self { temperature, top_p, top_k, min_p, repetition_penalty }
    }
}

/// The fields of vLLM's `SamplingParams` that all endpoints spell alike.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct SamplingFields {
    n: Option<i64>,
    pub(crate) max_tokens: Option<i64>,
    min_tokens: Option<i64>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<i64>,
    min_p: Option<f64>,
    seed: Option<i64>,
    repetition_penalty: Option<f64>,
    presence_penalty: Option<f64>,
    frequency_penalty: Option<f64>,
    logit_bias: Option<BTreeMap<String, f64>>,
    allowed_token_ids: Option<Vec<u32>>,
    stop: Option<OneOrMany>,
    include_stop_str_in_output: Option<bool>,
    stop_token_ids: Option<Vec<u32>>,
    ignore_eos: Option<bool>,
    prompt_logprobs: Option<i64>,
    pub(crate) detokenize: Option<bool>,
    skip_special_tokens: Option<bool>,
}

impl SamplingFields {
    /// Checks the ranges and fills in the defaults. `prefix` is `sampling_params.` where the fields are nested.
    ///
    /// `max_tokens` and `logprobs` are left at their defaults: what they mean differs from endpoint to endpoint.
    pub(crate) fn resolve(&self, prefix: &str, defaults: &DefaultSampling) -> Result<SamplingParams, ApiError> {
        let base = SamplingParams::default();
        let range = Range { prefix };
        Ok(SamplingParams {
            n: range.count("n", self.n, 1)?.unwrap_or(base.n),
            min_tokens: range.count("min_tokens", self.min_tokens, 0)?.unwrap_or(base.min_tokens),
            temperature: range
                .number("temperature", self.temperature, |x| x >= 0.0, "at least 0")?
                .unwrap_or(defaults.temperature),
            top_p: range
                .number("top_p", self.top_p, |x| x > 0.0 && x <= 1.0, "above 0 and at most 1")?
                .unwrap_or(defaults.top_p),
            top_k: range.count("top_k", self.top_k.map(|k| if k == -1 { 0 } else { k }), 0)?.unwrap_or(defaults.top_k),
            min_p: range
                .number("min_p", self.min_p, |x| (0.0..=1.0).contains(&x), "between 0 and 1")?
                .unwrap_or(defaults.min_p),
            // The generator takes any 64 bits; a negative seed is as good as another.
            seed: self.seed.map(i64::cast_unsigned),
            repetition_penalty: range
                .number("repetition_penalty", self.repetition_penalty, |x| x > 0.0, "above 0")?
                .unwrap_or(defaults.repetition_penalty),
            presence_penalty: range.penalty("presence_penalty", self.presence_penalty)?,
            frequency_penalty: range.penalty("frequency_penalty", self.frequency_penalty)?,
            logit_bias: self.logit_bias(prefix)?,
            allowed_token_ids: self.allowed_token_ids.clone(),
            stop: self.stops(prefix)?,
            include_stop_str_in_output: self.include_stop_str_in_output.unwrap_or(base.include_stop_str_in_output),
            stop_token_ids: self.stop_token_ids.clone().unwrap_or_default(),
            ignore_eos: self.ignore_eos.unwrap_or(base.ignore_eos),
            prompt_logprobs: range.count("prompt_logprobs", self.prompt_logprobs, 0)?,
            detokenize: self.detokenize.unwrap_or(base.detokenize),
            skip_special_tokens: self.skip_special_tokens.unwrap_or(base.skip_special_tokens),
            ..base
        })
    }

    /// Whether the client itself asks for log-probabilities of the prompt.
    pub(crate) fn asks_for_prompt_logprobs(&self) -> bool {
        self.prompt_logprobs.is_some()
    }

    fn stops(&self, prefix: &str) -> Result<Vec<String>, ApiError> {
        let stops = match &self.stop {
            None => Vec::new(),
            Some(OneOrMany::One(stop)) => vec![stop.clone()],
            Some(OneOrMany::Many(stops)) => stops.clone(),
        };
        if stops.iter().any(String::is_empty) {
            let message = format!("{prefix}stop has an empty string, which would stop everywhere");
            return Err(ApiError::invalid(format!("{prefix}stop"), message));
        }
        Ok(stops)
    }

    /// OpenAI bounds a bias to ±100; vLLM clamps what is beyond.
    fn logit_bias(&self, prefix: &str) -> Result<Vec<(u32, f32)>, ApiError> {
        self.logit_bias
            .iter()
            .flatten()
            .map(|(id, bias)| {
                let param = || format!("{prefix}logit_bias.{id}");
                let token = id
                    .parse()
                    .map_err(|_| ApiError::invalid(param(), format!("{}: {id:?} is no token id", param())))?;
                Ok((token, bias.clamp(-100.0, 100.0) as f32))
            })
            .collect()
    }
}

/// Range checks whose messages carry the name as the client spelled it.
pub(crate) struct Range<'a> {
    /// Put before the name.
    pub(crate) prefix: &'a str,
}

impl Range<'_> {
    /// An integer of at least `least`.
    pub(crate) fn count(&self, name: &str, value: Option<i64>, least: i64) -> Result<Option<usize>, ApiError> {
        let Some(value) = value else { return Ok(None) };
        match usize::try_from(value) {
            Ok(count) if value >= least => Ok(Some(count)),
            _ => Err(self.refuse(name, format!("must be at least {least}; it is {value}"))),
        }
    }

    fn number(
        &self,
        name: &str,
        value: Option<f64>,
        allowed: impl Fn(f64) -> bool,
        range: &str,
    ) -> Result<Option<f32>, ApiError> {
        let Some(value) = value else { return Ok(None) };
        let narrow = value as f32;
        // A value that is only finite in 64 bits is out of range too; one that rounds to 0 must be allowed as 0.
        if narrow.is_finite() && allowed(value) && allowed(f64::from(narrow)) {
            Ok(Some(narrow))
        } else {
            Err(self.refuse(name, format!("must be {range}; it is {value}")))
        }
    }

    fn penalty(&self, name: &str, value: Option<f64>) -> Result<f32, ApiError> {
        let allowed = |x: f64| (-2.0..=2.0).contains(&x);
        Ok(self.number(name, value, allowed, "between -2 and 2")?.unwrap_or(0.0))
    }

    fn refuse(&self, name: &str, rest: String) -> ApiError {
        let param = format!("{}{name}", self.prefix);
        let message = format!("{param} {rest}");
        ApiError::invalid(param, message)
    }
}

/// A string, or a list of strings.
#[derive(Debug, Clone)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl<'de> Deserialize<'de> for OneOrMany {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = OneOrMany;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }

            fn visit_str<E>(self, text: &str) -> Result<OneOrMany, E> {
                Ok(OneOrMany::One(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<OneOrMany, A::Error> {
                let mut texts = Vec::new();
                while let Some(text) = items.next_element()? {
                    texts.push(text);
                }
                Ok(OneOrMany::Many(texts))
            }
        }

        deserializer.deserialize_any(Either)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::read;

    fn resolve(body: &str) -> Result<SamplingParams, ApiError> {
        read::<SamplingFields>(body.as_bytes())?.resolve("sampling_params.", &DefaultSampling::default())
    }

    #[test]
    fn silence_gives_the_defaults() {
        assert_eq!(resolve("{}").expect("valid"), SamplingParams::default());
        let defaults = DefaultSampling { temperature: 0.6, top_k: 20, ..DefaultSampling::default() };
        let fields: SamplingFields = read(br#"{"top_k": 0}"#).expect("valid");
        let params = fields.resolve("", &defaults).expect("valid");
        assert_eq!((params.temperature, params.top_k), (0.6, 0));
    }

    #[test]
    fn values_are_taken_over() {
        let params = resolve(
            r#"{"n":2,"temperature":0,"top_p":0.5,"top_k":-1,"min_p":0.1,"seed":-1,"stop":"x","stop_token_ids":[3],
                "logit_bias":{"5":-200,"6":1},"min_tokens":1,"prompt_logprobs":0,"presence_penalty":-2}"#,
        )
        .expect("valid");
        assert_eq!((params.n, params.temperature, params.top_p, params.top_k), (2, 0.0, 0.5, 0));
        assert_eq!((params.seed, params.stop, params.stop_token_ids), (Some(u64::MAX), vec!["x".into()], vec![3]));
        assert_eq!(params.logit_bias, [(5, -100.0), (6, 1.0)]);
        assert_eq!((params.prompt_logprobs, params.presence_penalty), (Some(0), -2.0));
    }

    #[test]
    fn values_out_of_range_are_named() {
        for (field, value, part) in [
            ("n", "0", "it is 0"),
            ("temperature", "-0.1", "it is -0.1"),
            ("temperature", "1e300", "at least 0"),
            ("top_p", "0", "it is 0"),
            ("top_p", "1.5", "it is 1.5"),
            ("top_p", "1e-60", "above 0"),
            ("top_k", "-2", "it is -2"),
            ("min_p", "2", "it is 2"),
            ("presence_penalty", "2.1", "it is 2.1"),
            ("frequency_penalty", "-3", "it is -3"),
            ("repetition_penalty", "0", "it is 0"),
            ("min_tokens", "-1", "it is -1"),
            ("prompt_logprobs", "-1", "it is -1"),
            ("stop", "[\"a\",\"\"]", "empty string"),
        ] {
            let error = resolve(&format!("{{\"{field}\":{value}}}")).expect_err(field);
            assert_eq!(error.param, Some(format!("sampling_params.{field}")));
            assert!(error.message.contains(part), "{error}");
        }
        let error = resolve(r#"{"logit_bias":{"x":1}}"#).expect_err("no id");
        assert_eq!(error.param.as_deref(), Some("sampling_params.logit_bias.x"));
    }

    #[test]
    fn values_of_the_wrong_type_are_named() {
        for (field, value, part) in [
            ("n", "1.5", "floating point `1.5`"),
            ("seed", "true", "boolean `true`"),
            ("temperature", "\"hot\"", "\"hot\""),
            ("stop", "3", "a string or a list of strings"),
            ("ignore_eos", "1", "integer `1`"),
        ] {
            let error = resolve(&format!("{{\"{field}\":{value}}}")).expect_err(field);
            assert_eq!((error.param.as_deref(), error.status), (Some(field), 400));
            assert!(error.message.contains(part), "{error}");
        }
        assert!(resolve(r#"{"temperature":NaN}"#).expect_err("no JSON").message.contains("not valid JSON"));
        assert!(resolve(r#"{"temperature":1e999}"#).expect_err("no number").message.contains("out of range"));
    }
}
