//! `/v1/chat/completions`: reading the request.

use moetrail_engine::EngineInfo;
use moetrail_text::ChatPrompt;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::accept::{Accepted, Common, RequestContext, room};
use crate::body::{Object, read};
use crate::chat_reply::ChatReply;
use crate::completions::openai_rows;
use crate::error::ApiError;
use crate::nvext::Nvext;
use crate::rows::{RowsFields, check_nvext_has_one};
use crate::sampling::{Range, SamplingFields};
use crate::stream_options::StreamFields;
use crate::unsupported::{UnsupportedOpenAi, UnsupportedSampling};

/// The fields that make a prompt of a conversation; `/tokenize` has them too.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Conversation {
    pub(crate) messages: Option<Vec<Value>>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    documents: Option<Vec<Value>>,
    add_generation_prompt: Option<bool>,
    continue_final_message: Option<bool>,
    add_special_tokens: Option<bool>,
    chat_template_kwargs: Option<Object<Map<String, Value>>>,
    reasoning_effort: Option<Value>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct ChatFields {
    logprobs: Option<bool>,
    top_logprobs: Option<i64>,
    max_completion_tokens: Option<i64>,
    echo: Option<bool>,
}

impl Conversation {
    /// Renders the conversation with the checkpoint's template and tokenizes it.
    pub(crate) fn tokenize(&self, info: &EngineInfo) -> Result<Vec<u32>, ApiError> {
        let messages = self.messages.as_ref().ok_or_else(|| ApiError::invalid("messages", "messages is missing"))?;
        self.check_tool_choice()?;
        let Some(tokenizer) = &info.tokenizer else {
            let message = "the checkpoint has no tokenizer; send token ids to /inference/v1/generate instead";
            return Err(ApiError::invalid("messages", message));
        };
        let continue_final_message = self.continue_final_message.unwrap_or(false);
        if continue_final_message && self.add_generation_prompt == Some(true) {
            let message = "continue_final_message and add_generation_prompt cannot both be true";
            return Err(ApiError::invalid("continue_final_message", message));
        }
        let mut kwargs = self.chat_template_kwargs.clone().unwrap_or_default().0;
        if let Some(effort) = &self.reasoning_effort {
            kwargs.entry("reasoning_effort").or_insert_with(|| effort.clone());
        }
        let text = tokenizer.chat_template()?.render(&ChatPrompt {
            messages,
            tools: self.tools.as_deref().filter(|tools| !tools.is_empty()),
            documents: self.documents.as_deref(),
            add_generation_prompt: self.add_generation_prompt.unwrap_or(!continue_final_message),
            continue_final_message,
            kwargs: Some(&kwargs),
        })?;
        // The template writes BOS itself, so that the tokenizer must not.
        let add_special_tokens = self.add_special_tokens.unwrap_or(false);
        tokenizer.encode(&text, add_special_tokens).map_err(|error| ApiError::invalid("messages", error.to_string()))
    }

    /// Tools are shown to the model; nothing forces it to call one.
    fn check_tool_choice(&self) -> Result<(), ApiError> {
        match &self.tool_choice {
            None => Ok(()),
            Some(Value::String(choice)) if choice == "none" || choice == "auto" => Ok(()),
            Some(other) => {
                let message = format!("tool_choice {other} is not supported by this server; use \"auto\" or \"none\"");
                Err(ApiError::invalid("tool_choice", message))
            }
        }
    }
}

pub(crate) fn accept(body: &[u8], context: &RequestContext<'_>) -> Result<Accepted, ApiError> {
    let info = context.info;
    let conversation: Conversation = read(body)?;
    let fields: ChatFields = read(body)?;
    let common = Common::read(body, context, "chatcmpl-")?;
    read::<UnsupportedOpenAi>(body)?.check("")?;
    read::<UnsupportedSampling>(body)?.check("")?;
    if fields.echo == Some(true) {
        return Err(ApiError::invalid("echo", "echo is not supported on chat; it is true"));
    }
    let streaming = read::<StreamFields>(body)?.resolve()?;
    let nvext = Nvext::read(body)?;
    let common = common.with_nvext(&nvext)?;
    let rows = read::<RowsFields>(body)?.resolve(openai_rows(&nvext, context, streaming))?;
    let settings: SamplingFields = read(body)?;
    let mut sampling = settings.resolve("", context.defaults)?;
    check_nvext_has_one(&rows, sampling.n, "n")?;
    sampling.logprobs = fields.logprobs()?;
    let range = Range { prefix: "" };
    let newer = range.count("max_completion_tokens", fields.max_completion_tokens, 0)?;
    let older = range.count("max_tokens", settings.max_tokens, 0)?;

    let prompt = conversation.tokenize(info)?;
    sampling.max_tokens = newer.or(older).unwrap_or_else(|| room(info, prompt.len()));
    let spell = |param: &str| match param {
        "prompt" => "messages".to_owned(),
        "max_tokens" if newer.is_some() => "max_completion_tokens".to_owned(),
        "logprobs" => "top_logprobs".to_owned(),
        param => param.to_owned(),
    };
    let request = common.request(prompt.into(), sampling, &rows, info, spell)?;
    let head = common.into_head(context, streaming, &rows, vec![request.prompt.clone()], &request.sampling);
    Ok(Accepted { requests: vec![request], stream: streaming.enabled, reply: Box::new(ChatReply::new(head)) })
}

impl ChatFields {
    /// Chat asks with a flag and, beside it, the number of alternatives.
    fn logprobs(&self) -> Result<Option<usize>, ApiError> {
        let top = Range { prefix: "" }.count("top_logprobs", self.top_logprobs, 0)?.unwrap_or(0);
        if self.logprobs.unwrap_or(false) {
            return Ok(Some(top));
        }
        if top > 0 {
            let message = format!("top_logprobs is {top}, but logprobs is not true");
            return Err(ApiError::invalid("top_logprobs", message));
        }
        Ok(None)
    }
}
