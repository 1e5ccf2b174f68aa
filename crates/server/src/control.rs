//! The endpoints by which an RL trainer steers the engine.

use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use moetrail_api::{ApiError, Done, abort_order, pause_order, server_info, update_order};

use crate::body::RawBody;
use crate::rejection::{Rejection, json};
use crate::state::AppState;

type Answer = Result<Response, Rejection>;

fn ok(done: &Done) -> Answer {
    Ok(json(StatusCode::OK, done.to_json()))
}

pub(crate) async fn pause(
    State(state): State<AppState>,
    Query(query): Query<Vec<(String, String)>>,
    RawBody(body): RawBody,
) -> Answer {
    let order = pause_order(&query, &body)?;
    state.engine().pause(order.mode, order.clear_cache).await.map_err(ApiError::from)?;
    ok(&Done::Paused)
}

pub(crate) async fn resume(State(state): State<AppState>) -> Answer {
    state.engine().resume().await.map_err(ApiError::from)?;
    ok(&Done::Resumed)
}

pub(crate) async fn is_paused(State(state): State<AppState>) -> Answer {
    ok(&Done::IsPaused(state.engine().is_paused()))
}

/// vLLM's `/reset_prefix_cache`, and SGLang's `/flush_cache`.
pub(crate) async fn reset_cache(State(state): State<AppState>) -> Answer {
    state.engine().reset_prefix_cache().await.map_err(ApiError::from)?;
    ok(&Done::CacheReset)
}

pub(crate) async fn update_weights(State(state): State<AppState>, RawBody(body): RawBody) -> Answer {
    let order = update_order(&body)?;
    let version = state.engine().update_weights(order.path, order.version).await.map_err(ApiError::from)?;
    ok(&Done::Updated(version.to_string()))
}

pub(crate) async fn abort_requests(State(state): State<AppState>, RawBody(body): RawBody) -> Answer {
    let aborted = state.engine().abort(abort_order(&body)?).await.map_err(ApiError::from)?;
    ok(&Done::Aborted(aborted))
}

pub(crate) async fn info(State(state): State<AppState>) -> Answer {
    let engine = state.engine();
    Ok(json(StatusCode::OK, server_info(engine.info(), &engine.weight_version(), engine.is_paused())))
}
