//! The endpoints that generate.

use axum::Extension;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::{MethodFilter, MethodRouter, on};
use moetrail_api::{Accepted, ApiError, Dialect, RequestContext, RequestOutput, accept};
use moetrail_engine::EventStream;

use crate::access::RequestId;
use crate::body::RawBody;
use crate::rejection::{Rejection, json};
use crate::sse;
use crate::state::AppState;

/// A body of more bytes is parsed and tokenized off the async workers.
pub(crate) const LARGE_BODY: usize = 32 << 10;
/// An answer of more bytes is formatted off the async workers.
pub(crate) const LARGE_ANSWER: usize = 256 << 10;

/// Generates from bodies of one dialect.
pub(crate) fn endpoint(dialect: Dialect) -> MethodRouter<AppState> {
    // SGLang's server takes both.
    let methods =
        if dialect == Dialect::Sglang { MethodFilter::POST.or(MethodFilter::PUT) } else { MethodFilter::POST };
    on(methods, move |State(state), Extension(id), RawBody(body)| generate(dialect, state, id, body))
}

/// A request that runs: its answer, and the events of each prompt.
pub(crate) struct Running {
    pub(crate) accepted: Accepted,
    pub(crate) events: Vec<EventStream>,
}

async fn generate(dialect: Dialect, state: AppState, id: RequestId, body: Bytes) -> Result<Response, Rejection> {
    let large = body.len() > LARGE_BODY;
    let engine = state.engine().clone();
    let accepted = off_the_workers_if(large, move || {
        let weight_version = state.engine().weight_version();
        let context = RequestContext {
            weight_version: &weight_version,
            info: state.info(),
            defaults: state.defaults(),
            rows_format: state.rows_format(),
            header_id: id.given.as_deref(),
            unique: &id.unique,
            created: unix_time(),
        };
        accept(dialect, &body, &context)
    })
    .await??;
    // A prompt that is refused drops, and so cancels, those before it.
    let events = accepted.requests.iter().map(|request| engine.submit(request.clone())).collect::<Result<_, _>>()?;
    let running = Running { accepted, events };
    if running.accepted.stream { Ok(sse::response(running)) } else { answer(running).await }
}

/// Waits for all prompts and answers in one piece. The handler is dropped if the client goes away, and the events with
/// it, which cancels the request.
async fn answer(running: Running) -> Result<Response, Rejection> {
    let Running { accepted, events } = running;
    let mut outputs = Vec::with_capacity(events.len());
    for (request, mut events) in accepted.requests.iter().zip(events) {
        let mut output = RequestOutput::new(request.sampling.n);
        while let Some(event) = events.next().await {
            output.push(event)?;
        }
        if !output.is_finished() {
            return Err(ended_early().into());
        }
        outputs.push(output);
    }
    let large = outputs.iter().map(RequestOutput::weight).sum::<usize>() > LARGE_ANSWER;
    let mut reply = accepted.reply;
    let body = off_the_workers_if(large, move || reply.body(outputs)).await?;
    Ok(json(StatusCode::OK, body))
}

/// Why a request without an end ended.
pub(crate) fn ended_early() -> ApiError {
    ApiError::new(500, "the engine stopped before the request was finished")
}

/// Runs `work` here if it is short, else where it holds up no other request.
pub(crate) async fn off_the_workers_if<T: Send + 'static>(
    long: bool,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    if !long {
        return Ok(work());
    }
    tokio::task::spawn_blocking(work).await.map_err(|_| ApiError::new(500, "the server failed on this request"))
}

fn unix_time() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}
