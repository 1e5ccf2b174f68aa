//! `/inference/v1/generate`: tokens in, tokens out.

use moetrail_routes::format::Format;
use serde::Deserialize;

use crate::accept::{Accepted, Common, RequestContext, room};
use crate::body::{Object, read};
use crate::error::ApiError;
use crate::generate_reply::{GenerateReply, OutputMode};
use crate::rows::{NESTED_START, NestedStart, RowsDefaults, RowsFields, RowsFormat, check_nvext_has_one};
use crate::sampling::{DefaultSampling, NESTED, Range, SamplingFields, nested};
use crate::stream_options::StreamFields;
use crate::unsupported::{UnsupportedGenerate, UnsupportedSampling};

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct GenerateFields {
    token_ids: Option<Vec<u32>>,
    output_mode: Option<String>,
    sampling_params: Option<Object<SamplingFields>>,
}

/// The settings that only this dialect has in `sampling_params`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct NestedLogprobs {
    logprobs: Option<i64>,
}

pub(crate) fn accept(body: &[u8], context: &RequestContext<'_>) -> Result<Accepted, ApiError> {
    let info = context.info;
    let fields: GenerateFields = read(body)?;
    let common = Common::read(body, context, "generate-tokens-")?;
    read::<UnsupportedGenerate>(body)?.check("")?;
    nested::<UnsupportedSampling>(body)?.check(NESTED)?;
    let streaming = read::<StreamFields>(body)?.resolve()?;
    let mode = fields.output_mode.as_deref().map_or(Ok(OutputMode::Tokens), OutputMode::parse)?;
    if mode == OutputMode::Text && info.tokenizer.is_none() {
        let message = "output_mode \"text\" needs a tokenizer, and the checkpoint has none";
        return Err(ApiError::invalid("output_mode", message));
    }
    let nested_start = nested::<NestedStart>(body)?.routed_experts_prompt_start;
    let rows = read::<RowsFields>(body)?.resolve(RowsDefaults {
        other_start: nested_start.map(|start| (start, NESTED_START)),
        format: context.rows_format.unwrap_or(RowsFormat::InChoice(Format::Object)),
        wanted: false,
        streamed: streaming.enabled,
    })?;

    let settings = fields.sampling_params.unwrap_or_default().0;
    // As in vLLM, the checkpoint's sampling defaults do not reach this endpoint: who trains on the tokens needs
    // them drawn from the distribution that the request describes, and from no other.
    let mut sampling = settings.resolve(NESTED, &DefaultSampling::default())?;
    let range = Range { prefix: NESTED };
    sampling.logprobs = range.count("logprobs", nested::<NestedLogprobs>(body)?.logprobs, 0)?;
    sampling.detokenize = mode == OutputMode::Text && settings.detokenize.unwrap_or(true);
    check_nvext_has_one(&rows, sampling.n, "sampling_params.n")?;
    let prompt = fields.token_ids.ok_or_else(|| ApiError::invalid("token_ids", "token_ids is missing"))?;
    let max_tokens = range.count("max_tokens", settings.max_tokens, 0)?;
    sampling.max_tokens = max_tokens.unwrap_or_else(|| room(info, prompt.len()));

    let spell = |param: &str| match param {
        "prompt" => "token_ids".to_owned(),
        "routed_experts_replay" => param.to_owned(),
        param => format!("{NESTED}{param}"),
    };
    let request = common.request(prompt.into(), sampling, &rows, info, spell)?;
    let mut head = common.into_head(context, streaming, &rows, vec![request.prompt.clone()], &request.sampling);
    head.tokens_as_ids = true;
    let reply = Box::new(GenerateReply::new(head, mode));
    Ok(Accepted { requests: vec![request], stream: streaming.enabled, reply })
}
