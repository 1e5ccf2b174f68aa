//! Routing that a request brings along.

use std::sync::Arc;

use moetrail_engine::{EngineInfo, ReplayRows, ReplayStats};
use moetrail_routes::format::ObjectFields;
use serde::{Deserialize, Serialize};

use crate::body::{Object, read};
use crate::error::ApiError;

const PARAM: &str = "routed_experts_replay";

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct ReplayField {
    routed_experts_replay: Option<Object<ObjectFields>>,
}

/// The given routing, decoded and checked against the model; whether it fits the prompt is the engine's to say.
pub(crate) fn replay(body: &[u8], info: &EngineInfo) -> Result<Option<Arc<ReplayRows>>, ApiError> {
    let Some(Object(fields)) = read::<ReplayField>(body)?.routed_experts_replay else { return Ok(None) };
    let Some(shape) = &info.routing else {
        return Err(ApiError::invalid(PARAM, "the model is dense: it has no routing to replay"));
    };
    let rows = fields.decode().map_err(|error| {
        let param = format!("{PARAM}.{}", error.field());
        let message = format!("{param}: {}", error.message());
        ApiError::invalid(param, message)
    })?;
    let rows = ReplayRows::new(&rows, shape).map_err(|error| ApiError::invalid(PARAM, format!("{PARAM}: {error}")))?;
    Ok(Some(Arc::new(rows)))
}

/// `routed_experts_replay_stats` of an answer.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct ReplayStatsReply {
    rows: usize,
    cells: usize,
    cells_changed: usize,
}

impl ReplayStatsReply {
    /// Those of all prompts of an answer together; `None` if none was replayed.
    pub(crate) fn sum(stats: impl Iterator<Item = Option<ReplayStats>>) -> Option<Self> {
        stats.flatten().fold(None, |sum: Option<Self>, next| {
            let sum = sum.unwrap_or(Self { rows: 0, cells: 0, cells_changed: 0 });
            Some(Self {
                rows: sum.rows + next.rows,
                cells: sum.cells + next.cells,
                cells_changed: sum.cells_changed + next.cells_changed,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;

    #[track_caller]
    fn refused(value: &str, param: &str, part: &str) {
        let body = format!(r#"{{"routed_experts_replay":{value}}}"#);
        let error = replay(body.as_bytes(), &fixtures::info()).expect_err(value);
        assert_eq!((error.status, error.param.as_deref()), (400, Some(param)), "{error}");
        assert!(error.message.contains(part), "{error}");
    }

    #[test]
    fn faults_are_named() {
        let info = fixtures::info();
        assert_eq!(replay(br#"{"routed_experts_replay":null}"#, &info), Ok(None));
        let good = br#"{"routed_experts_replay":{"data":"AQI=","shape":[1,1,2],"start":1}}"#;
        assert!(replay(good, &info).is_ok_and(|rows| rows.is_some_and(|rows| rows.span().start == 1)));
        refused("[1]", PARAM, "expected an object");
        refused(r#""AQI=""#, PARAM, "expected an object");
        refused(r#"{"data":"AQI=","shape":[1,1,2]}"#, "routed_experts_replay.start", "missing");
        refused(r#"{"data":"AQI=","shape":[1,1,2],"start":-1}"#, "routed_experts_replay.start", "-1");
        refused(r#"{"data":"AQI=","shape":[2,1,2],"start":0}"#, "routed_experts_replay.data", "needs 4");
        refused(r#"{"data":"AQI","shape":[1,1,2],"start":0}"#, "routed_experts_replay.data", "base64");
        refused(r#"{"data":"AQI=","shape":[1,1,2],"start":0,"dtype":"int32"}"#, "routed_experts_replay.dtype", "int32");
        refused(r#"{"data":"AQI=","shape":[1,2,1],"start":0}"#, PARAM, "[1, 2, 1]");
        refused(r#"{"data":"AQQ=","shape":[1,1,2],"start":0}"#, PARAM, "expert 4 of 4");
        refused(r#"{"data":"AQE=","shape":[1,1,2],"start":0}"#, PARAM, "occurs twice");
        let dense = EngineInfo { routing: None, ..info };
        assert!(replay(good, &dense).is_err_and(|error| error.message.contains("dense")));
    }
}
