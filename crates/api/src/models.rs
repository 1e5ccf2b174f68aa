//! `/v1/models` and `/version`.

use moetrail_engine::EngineInfo;
use serde::Serialize;

use crate::accept::check_model;
use crate::body::write;
use crate::error::ApiError;

#[derive(Serialize)]
struct List<'a> {
    object: &'static str,
    data: Vec<Card<'a>>,
}

#[derive(Serialize)]
struct Card<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: &'a str,
    parent: Option<&'a str>,
    max_model_len: usize,
}

#[derive(Serialize)]
struct Version {
    version: &'static str,
}

fn card<'a>(info: &'a EngineInfo, id: &'a str) -> Card<'a> {
    Card {
        id,
        object: "model",
        created: info.created,
        owned_by: "moetrail",
        root: &info.model_name,
        parent: None,
        max_model_len: info.max_model_len,
    }
}

/// The body of `GET /v1/models`: the model under each of its names.
pub fn model_list(info: &EngineInfo) -> Vec<u8> {
    let names = std::iter::once(&info.model_name).chain(&info.model_aliases);
    write(&List { object: "list", data: names.map(|name| card(info, name)).collect() })
}

/// The body of `GET /v1/models/{id}`.
///
/// # Errors
/// A 404 if the model has another name.
pub fn model_card(info: &EngineInfo, id: &str) -> Result<Vec<u8>, ApiError> {
    check_model(Some(id), info).map(|id| write(&card(info, &id)))
}

/// The body of `GET /version`.
pub fn version() -> Vec<u8> {
    write(&Version { version: env!("CARGO_PKG_VERSION") })
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::fixtures;

    #[test]
    fn the_model_is_listed_under_each_name() {
        let list: Value = serde_json::from_slice(&model_list(&fixtures::info())).expect("JSON");
        assert_eq!(list["object"], "list");
        assert_eq!(list["data"][0]["id"], "toy");
        assert_eq!(list["data"][1]["id"], "toy-alias");
        assert_eq!(list["data"][1]["max_model_len"], 64);
    }

    #[test]
    fn an_unknown_model_is_a_404() {
        assert!(model_card(&fixtures::info(), "toy-alias").is_ok());
        let error = model_card(&fixtures::info(), "gpt").expect_err("unknown");
        assert_eq!((error.status, error.kind(), error.param.as_deref()), (404, "NotFoundError", Some("model")));
        assert!(error.message.contains("\"gpt\""), "{error}");
    }
}
