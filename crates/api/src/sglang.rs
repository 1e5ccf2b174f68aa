//! SGLang's `/generate`: reading the request.

use std::sync::Arc;

use moetrail_engine::EngineInfo;
use moetrail_routes::format::Format;
use serde::Deserialize;

use crate::accept::{Accepted, Common, RequestContext, room};
use crate::body::read;
use crate::error::ApiError;
use crate::prompt::{PromptField, Prompts};
use crate::rows::{RowsDefaults, RowsFields, RowsFormat};
use crate::sampling::{DefaultSampling, NESTED, Range, SamplingFields, nested};
use crate::sglang_reply::{Scores, SglangReply};
use crate::stream_options::StreamFields;
use crate::unsupported::{UnsupportedSampling, UnsupportedSglang, UnsupportedSglangSampling};

/// SGLang's default of `max_new_tokens`.
const DEFAULT_MAX_NEW_TOKENS: usize = 128;

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct SglangFields {
    text: Option<PromptField>,
    input_ids: Option<PromptField>,
    rid: Option<String>,
    return_logprob: Option<bool>,
    logprob_start_len: Option<i64>,
    top_logprobs_num: Option<i64>,
    return_text_in_logprobs: Option<bool>,
    routed_experts_start_len: Option<i64>,
}

/// The settings that SGLang spells its own way.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct OwnNames {
    max_new_tokens: Option<i64>,
    min_new_tokens: Option<i64>,
    sampling_seed: Option<i64>,
    no_stop_trim: Option<bool>,
}

pub(crate) fn accept(body: &[u8], context: &RequestContext<'_>) -> Result<Accepted, ApiError> {
    let info = context.info;
    let fields: SglangFields = read(body)?;
    let common = Common::read(body, context, "")?.named(fields.rid.as_deref());
    read::<UnsupportedSglang>(body)?.check("")?;
    nested::<UnsupportedSampling>(body)?.check(NESTED)?;
    nested::<UnsupportedSglangSampling>(body)?.check(NESTED)?;
    let streaming = read::<StreamFields>(body)?.resolve()?;
    let rows = read::<RowsFields>(body)?.resolve(RowsDefaults {
        other_start: fields.routed_experts_start_len.map(|start| (start, "routed_experts_start_len")),
        format: context.rows_format.unwrap_or(RowsFormat::InChoice(Format::Sglang)),
        wanted: false,
        streamed: streaming.enabled,
    })?;
    let own: OwnNames = nested(body)?;
    // As in SGLang, the checkpoint's sampling defaults do not reach this endpoint.
    let mut sampling = nested::<SamplingFields>(body)?.resolve(NESTED, &DefaultSampling::default())?;
    let range = Range { prefix: NESTED };
    sampling.min_tokens = range.count("min_new_tokens", own.min_new_tokens, 0)?.unwrap_or(sampling.min_tokens);
    sampling.seed = own.sampling_seed.map(i64::cast_unsigned).or(sampling.seed);
    sampling.include_stop_str_in_output |= own.no_stop_trim.unwrap_or(false);
    sampling.detokenize = info.tokenizer.is_some();
    let max_tokens = range.count("max_new_tokens", own.max_new_tokens, 0)?;
    let top = Range { prefix: "" }.count("top_logprobs_num", fields.top_logprobs_num, 0)?.unwrap_or(0);
    let with_logprobs = fields.return_logprob.unwrap_or(false);
    sampling.logprobs = with_logprobs.then_some(top);

    let given = given(fields.text, fields.input_ids)?;
    let several = given.is_list();
    let prompts = tokenize(given, info)?;
    let requests = prompts
        .iter()
        .enumerate()
        .map(|(index, prompt)| {
            let mut sampling = sampling.clone();
            sampling.max_tokens = max_tokens.unwrap_or(DEFAULT_MAX_NEW_TOKENS.min(room(info, prompt.len())));
            // Scores of the prompt begin where they are asked for; by default none are.
            let scored = with_logprobs && fields.logprob_start_len.is_some_and(|start| start >= 0);
            sampling.prompt_logprobs = scored.then_some(top);
            let spell = |param: &str| match param {
                "prompt" if several => format!("input_ids[{index}]"),
                "prompt" => "input_ids".to_owned(),
                "routed_experts_replay" => param.to_owned(),
                "logprobs" | "prompt_logprobs" => "top_logprobs_num".to_owned(),
                "max_tokens" => format!("{NESTED}max_new_tokens"),
                "min_tokens" => format!("{NESTED}min_new_tokens"),
                param => format!("{NESTED}{param}"),
            };
            common.request(prompt.clone(), sampling, &rows, info, spell)
        })
        .collect::<Result<_, _>>()?;
    let scores = Scores {
        prompt_start: fields.logprob_start_len.and_then(|start| usize::try_from(start).ok()),
        with_text: fields.return_text_in_logprobs.unwrap_or(false),
        top: top > 0,
    };
    let head = common.into_head(context, streaming, &rows, prompts, &sampling);
    let reply = Box::new(SglangReply::new(head, several, scores, context.weight_version));
    Ok(Accepted { requests, stream: streaming.enabled, reply })
}

/// The ids of a prompt.
type PromptIds = Arc<[u32]>;

/// The ids of the prompts.
fn tokenize(field: PromptField, info: &EngineInfo) -> Result<Vec<PromptIds>, ApiError> {
    match field.into_prompts() {
        Prompts::Ids(lists) => Ok(lists.into_iter().map(Into::into).collect()),
        Prompts::Texts(texts) => {
            let Some(tokenizer) = &info.tokenizer else {
                return Err(ApiError::invalid("text", "the checkpoint has no tokenizer; send input_ids"));
            };
            let encode = |text: &String| tokenizer.encode(text, true).map(Into::into);
            texts.iter().map(encode).collect::<Result<_, _>>().map_err(|e| ApiError::invalid("text", e.to_string()))
        }
    }
}

/// The one of the two fields that is given, if it holds what it should.
fn given(text: Option<PromptField>, input_ids: Option<PromptField>) -> Result<PromptField, ApiError> {
    match (text, input_ids) {
        (Some(_), Some(_)) => Err(ApiError::invalid("input_ids", "text and input_ids are both given")),
        (None, None) => Err(ApiError::invalid("input_ids", "neither text nor input_ids is given")),
        (Some(text @ (PromptField::Text(_) | PromptField::Texts(_))), None) => Ok(text),
        (None, Some(ids @ (PromptField::Ids(_) | PromptField::Lists(_)))) => Ok(ids),
        (Some(_), None) => Err(ApiError::invalid("text", "text is a string or a list of strings")),
        (None, Some(_)) => Err(ApiError::invalid("input_ids", "input_ids is a list of token ids or of such lists")),
    }
}
