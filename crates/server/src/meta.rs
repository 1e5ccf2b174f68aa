//! The endpoints that do not generate.

use axum::extract::{Path, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::body::RawBody;
use crate::generation::{LARGE_BODY, off_the_workers_if};
use crate::rejection::{Rejection, json};
use crate::state::AppState;

/// 503 once the engine takes no request any more, so that a router sends none.
pub(crate) async fn health(State(state): State<AppState>) -> StatusCode {
    if state.engine().is_closed() { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK }
}

pub(crate) async fn version() -> Response {
    json(StatusCode::OK, moetrail_api::version())
}

pub(crate) async fn openapi() -> Response {
    json(StatusCode::OK, moetrail_api::openapi())
}

pub(crate) async fn models(State(state): State<AppState>) -> Response {
    json(StatusCode::OK, moetrail_api::model_list(state.info()))
}

pub(crate) async fn model(State(state): State<AppState>, Path(id): Path<String>) -> Result<Response, Rejection> {
    Ok(json(StatusCode::OK, moetrail_api::model_card(state.info(), &id)?))
}

pub(crate) async fn tokenize(State(state): State<AppState>, RawBody(body): RawBody) -> Result<Response, Rejection> {
    let large = body.len() > LARGE_BODY;
    let tokens = off_the_workers_if(large, move || moetrail_api::tokenize(&body, state.info())).await??;
    Ok(json(StatusCode::OK, tokens))
}

pub(crate) async fn detokenize(State(state): State<AppState>, RawBody(body): RawBody) -> Result<Response, Rejection> {
    let large = body.len() > LARGE_BODY;
    let text = off_the_workers_if(large, move || moetrail_api::detokenize(&body, state.info())).await??;
    Ok(json(StatusCode::OK, text))
}

pub(crate) async fn metrics(State(state): State<AppState>) -> Response {
    let text = state.stats().encode_after(&state.engine().stats().encode());
    let kind = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}
