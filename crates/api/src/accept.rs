//! From a body to engine requests, and back from events to an answer.

use std::sync::Arc;

use moetrail_engine::{EngineInfo, Event, GenerateRequest, ReplayRows, SamplingParams, SubmitError};
use serde::Deserialize;
use serde_json::Value;

use crate::body::read;
use crate::error::ApiError;
use crate::head::Head;
use crate::nvext::Nvext;
use crate::output::RequestOutput;
use crate::replay::replay;
use crate::rows::{RowsAsk, RowsFormat};
use crate::rows_reply::RowsWriter;
use crate::sampling::DefaultSampling;
use crate::stream_options::Streaming;
use crate::{chat, completions, generate, sglang};

/// The shape of a generation request and of its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`.
    Chat,
    /// `/inference/v1/generate`.
    Generate,
    /// SGLang's `/generate`.
    Sglang,
}

/// What the server knows about a request besides its body.
#[derive(Clone, Copy)]
pub struct RequestContext<'a> {
    /// What is served.
    pub info: &'a EngineInfo,
    /// Sampling where the request is silent.
    pub defaults: &'a DefaultSampling,
    /// `--routed-experts-format`; `None` leaves each endpoint its own default.
    pub rows_format: Option<RowsFormat>,
    /// The client's `X-Request-Id`, which wins over a `request_id` in the body.
    pub header_id: Option<&'a str>,
    /// The version of the weights that serve now.
    pub weight_version: &'a str,
    /// A text that no other request has, also where clients repeat their ids.
    pub unique: &'a str,
    /// Unix time in seconds.
    pub created: u64,
}

/// A request that may be submitted.
pub struct Accepted {
    /// One per prompt.
    pub requests: Vec<GenerateRequest>,
    /// Whether the client wants server-sent events.
    pub stream: bool,
    /// Writes the answer.
    pub reply: Box<dyn Reply>,
}

/// Writes the answer to one accepted request, in one piece or in chunks.
pub trait Reply: Send {
    /// The body, from the outputs of all prompts.
    fn body(&mut self, outputs: Vec<RequestOutput>) -> Vec<u8>;

    /// The chunks that an event of prompt number `prompt` gives; a failure gives none and ends the stream.
    fn chunks(&mut self, prompt: usize, event: Event) -> Vec<Vec<u8>>;

    /// The chunks after the last event.
    fn closing_chunks(&mut self) -> Vec<Vec<u8>>;
}

/// Reads and checks a request.
///
/// # Errors
/// A 400 naming the parameter and the offending value, or a 404 for an unknown model.
pub fn accept(dialect: Dialect, body: &[u8], context: &RequestContext<'_>) -> Result<Accepted, ApiError> {
    match dialect {
        Dialect::Completions => completions::accept(body, context),
        Dialect::Chat => chat::accept(body, context),
        Dialect::Generate => generate::accept(body, context),
        Dialect::Sglang => sglang::accept(body, context),
    }
}

/// The top-level fields that all dialects share.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct CommonFields {
    model: Option<String>,
    request_id: Option<String>,
    cache_salt: Option<String>,
    priority: Option<i64>,
    kv_transfer_params: Option<Value>,
    return_token_ids: Option<bool>,
    return_tokens_as_token_ids: Option<bool>,
}

/// The common fields, checked.
pub(crate) struct Common {
    fields: CommonFields,
    /// Id of the answer.
    id: String,
    /// The model's name as the client calls it.
    model: String,
    /// What the client may call the request by.
    names: Vec<String>,
    priority: i32,
    replay: Option<Arc<ReplayRows>>,
}

impl Common {
    /// Reads the common fields; `prefix` begins the id of the answer, as in `cmpl-…`.
    pub(crate) fn read(body: &[u8], context: &RequestContext<'_>, prefix: &str) -> Result<Self, ApiError> {
        let fields: CommonFields = read(body)?;
        let model = check_model(fields.model.as_deref(), context.info)?;
        if let Some(salt) = &fields.cache_salt {
            check_salt(salt, "cache_salt")?;
        }
        let given = context.header_id.or(fields.request_id.as_deref()).filter(|id| !id.is_empty());
        let id = format!("{prefix}{}", given.unwrap_or(context.unique));
        let priority = clamp(fields.priority.unwrap_or(0));
        let names = given.map(str::to_owned).into_iter().chain([id.clone()]).collect();
        let replay = replay(body, context.info)?;
        Ok(Self { id, model, names, priority, replay, fields })
    }

    /// What `nvext` says of the same things; the top level is not overruled in silence.
    pub(crate) fn with_nvext(mut self, nvext: &Nvext) -> Result<Self, ApiError> {
        if let Some(salt) = &nvext.cache_salt {
            if self.fields.cache_salt.as_ref().is_some_and(|top| top != salt) {
                return Err(ApiError::invalid("nvext.cache_salt", "nvext.cache_salt and cache_salt differ"));
            }
            check_salt(salt, "nvext.cache_salt")?;
            self.fields.cache_salt = Some(salt.clone());
        }
        if let (Some(priority), None) = (nvext.priority, self.fields.priority) {
            // Dynamo's hint grows with importance, vLLM's priority falls.
            self.priority = clamp(priority.saturating_neg());
        }
        Ok(self)
    }

    /// The same under the name that the client gave in another field.
    pub(crate) fn named(mut self, name: Option<&str>) -> Self {
        if let Some(name) = name {
            self.id = name.to_owned();
            self.names = vec![name.to_owned()];
        }
        self
    }

    /// Builds the request of one prompt and checks it; `spell` gives the client's name of a parameter.
    pub(crate) fn request(
        &self,
        prompt: Arc<[u32]>,
        sampling: SamplingParams,
        rows: &RowsAsk,
        info: &EngineInfo,
        spell: impl Fn(&str) -> String,
    ) -> Result<GenerateRequest, ApiError> {
        let mut request = GenerateRequest {
            names: self.names.clone(),
            prompt,
            sampling,
            priority: self.priority,
            cache_salt: self.fields.cache_salt.clone(),
            routed_experts_replay: self.replay.clone(),
            routed_experts_delta: rows.delta,
            ..GenerateRequest::default()
        };
        info.check(&request).map_err(|error| match error {
            SubmitError::Invalid { param, message } => ApiError::invalid(spell(param), message),
            other => other.into(),
        })?;
        let (min, max) = (request.sampling.min_tokens, request.sampling.max_tokens);
        if min > max {
            return Err(ApiError::invalid(spell("min_tokens"), format!("min_tokens is {min}, max_tokens is {max}")));
        }
        request.routed_experts_start = rows.start_for(request.prompt.len(), info)?;
        Ok(request)
    }

    /// What the answer repeats; `sampling` is that of every prompt.
    pub(crate) fn into_head(
        self,
        context: &RequestContext<'_>,
        streaming: Streaming,
        rows: &RowsAsk,
        prompts: Vec<Arc<[u32]>>,
        sampling: &SamplingParams,
    ) -> Head {
        Head {
            id: self.id,
            created: context.created,
            model: self.model,
            tokenizer: context.info.tokenizer.clone(),
            streaming,
            rows: RowsWriter::new(rows.format, context.info.routing.as_ref().map_or(0, |routing| routing.num_experts)),
            prompts,
            n: sampling.n,
            with_logprobs: sampling.logprobs.is_some(),
            return_token_ids: self.fields.return_token_ids.unwrap_or(false),
            tokens_as_ids: self.fields.return_tokens_as_token_ids.unwrap_or(false),
            kv_transfer_params: self.fields.kv_transfer_params,
        }
    }
}

fn check_salt(salt: &str, param: &str) -> Result<(), ApiError> {
    let length = salt.chars().count();
    if (1..=1024).contains(&length) {
        return Ok(());
    }
    Err(ApiError::invalid(param, format!("{param} must have 1 to 1024 characters; it has {length}")))
}

/// Only the order matters, and nobody needs four thousand million ranks.
fn clamp(priority: i64) -> i32 {
    priority.clamp(i32::MIN.into(), i32::MAX.into()) as i32
}

/// The model's name as the client calls it.
pub(crate) fn check_model(asked: Option<&str>, info: &EngineInfo) -> Result<String, ApiError> {
    match asked {
        None => Ok(info.model_name.clone()),
        Some(name) if name == info.model_name || info.model_aliases.iter().any(|alias| alias == name) => {
            Ok(name.to_owned())
        }
        Some(name) => Err(ApiError {
            status: 404,
            message: format!("the model {name:?} does not exist; this server has {:?}", info.model_name),
            param: Some("model".into()),
        }),
    }
}

/// Tokens that fit behind a prompt: the model's length and the pool's, whichever is less.
pub(crate) fn room(info: &EngineInfo, prompt_len: usize) -> usize {
    // The last sampled token is never forwarded, so it needs no slot.
    let pool = (info.num_blocks * info.block_size).saturating_add(1);
    info.max_model_len.min(pool).saturating_sub(prompt_len)
}
