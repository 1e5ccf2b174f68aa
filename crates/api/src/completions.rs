//! `/v1/completions`: reading the request.

use std::sync::Arc;

use moetrail_engine::EngineInfo;
use moetrail_routes::format::Format;
use serde::Deserialize;

use crate::accept::{Accepted, Common, RequestContext, room};
use crate::body::read;
use crate::completion_reply::CompletionReply;
use crate::error::ApiError;
use crate::nvext::Nvext;
use crate::prompt::{PromptField, Prompts};
use crate::rows::{RowsDefaults, RowsFields, RowsFormat, check_nvext_has_one};
use crate::sampling::{Range, SamplingFields};
use crate::stream_options::{StreamFields, Streaming};
use crate::unsupported::{UnsupportedOpenAi, UnsupportedSampling};

/// OpenAI's default of `max_tokens` on this endpoint.
const DEFAULT_MAX_TOKENS: usize = 16;

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct CompletionFields {
    prompt: Option<PromptField>,
    echo: Option<bool>,
    logprobs: Option<i64>,
    add_special_tokens: Option<bool>,
}

/// A prompt, and its text where an echo needs it.
struct Prompt {
    ids: Arc<[u32]>,
    text: String,
}

pub(crate) fn accept(body: &[u8], context: &RequestContext<'_>) -> Result<Accepted, ApiError> {
    let info = context.info;
    let fields: CompletionFields = read(body)?;
    let common = Common::read(body, context, "cmpl-")?;
    read::<UnsupportedOpenAi>(body)?.check("")?;
    read::<UnsupportedSampling>(body)?.check("")?;
    let streaming = read::<StreamFields>(body)?.resolve()?;
    let nvext = Nvext::read(body)?;
    let common = common.with_nvext(&nvext)?;
    let rows = read::<RowsFields>(body)?.resolve(openai_rows(&nvext, context, streaming))?;
    let settings: SamplingFields = read(body)?;
    let mut sampling = settings.resolve("", context.defaults)?;
    let range = Range { prefix: "" };
    sampling.logprobs = range.count("logprobs", fields.logprobs, 0)?;
    let max_tokens = range.count("max_tokens", settings.max_tokens, 0)?;

    let echo = fields.echo.unwrap_or(false);
    if echo && sampling.prompt_logprobs.is_none() {
        sampling.prompt_logprobs = sampling.logprobs;
    }
    let add_special_tokens = fields.add_special_tokens.unwrap_or(true);
    let given = fields.prompt.ok_or_else(|| ApiError::invalid("prompt", "prompt is missing"))?;
    let prompts = tokenize(given, add_special_tokens, sampling.skip_special_tokens, info)?;
    let several = prompts.len() > 1;
    check_nvext_has_one(&rows, prompts.len() * sampling.n, if several { "prompt" } else { "n" })?;
    let requests = prompts
        .iter()
        .enumerate()
        .map(|(index, prompt)| {
            let mut sampling = sampling.clone();
            // Only a length that the client names can be too long.
            sampling.max_tokens = max_tokens.unwrap_or(DEFAULT_MAX_TOKENS.min(room(info, prompt.ids.len())));
            let spell = |param: &str| match param {
                "prompt" if several => format!("prompt[{index}]"),
                param => param.to_owned(),
            };
            common.request(prompt.ids.clone(), sampling, &rows, info, spell)
        })
        .collect::<Result<_, _>>()?;

    let ids = prompts.iter().map(|prompt| prompt.ids.clone()).collect();
    let head = common.into_head(context, streaming, &rows, ids, &sampling);
    let echoed = echo.then(|| prompts.into_iter().map(|prompt| prompt.text).collect());
    // vLLM fills prompt_logprobs for an echo, and shows them only where they were asked for by that name.
    let show_prompt_logprobs = settings.asks_for_prompt_logprobs();
    let reply = Box::new(CompletionReply::new(head, echoed, show_prompt_logprobs));
    Ok(Accepted { requests, stream: streaming.enabled, reply })
}

/// What both of OpenAI's endpoints make of the absence of fields.
pub(crate) fn openai_rows(nvext: &Nvext, context: &RequestContext<'_>, streaming: Streaming) -> RowsDefaults {
    let by_default = context.rows_format.unwrap_or(RowsFormat::InChoice(Format::Npy));
    RowsDefaults {
        other_start: nvext.start,
        format: if nvext.wants_rows { RowsFormat::Nvext } else { by_default },
        wanted: nvext.wants_rows,
        streamed: streaming.enabled,
    }
}

fn tokenize(
    given: PromptField,
    add_special_tokens: bool,
    skip_special_tokens: bool,
    info: &EngineInfo,
) -> Result<Vec<Prompt>, ApiError> {
    match given.into_prompts() {
        Prompts::Texts(texts) => texts
            .into_iter()
            .map(|text| {
                let Some(tokenizer) = &info.tokenizer else {
                    let message = "the checkpoint has no tokenizer; give the prompt as token ids";
                    return Err(ApiError::invalid("prompt", message));
                };
                Ok(Prompt { ids: tokenizer.encode(&text, add_special_tokens)?.into(), text })
            })
            .collect(),
        Prompts::Ids(lists) => Ok(lists
            .into_iter()
            .map(|ids| {
                let text = info.tokenizer.as_ref().map(|tokenizer| tokenizer.decode(&ids, skip_special_tokens));
                Prompt { ids: ids.into(), text: text.unwrap_or_default() }
            })
            .collect()),
    }
}
