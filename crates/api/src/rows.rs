//! Routed experts on the wire: what a request asks for, and the forms in which rows are sent.

use moetrail_engine::{EngineInfo, RowsError};
use moetrail_routes::ExpertRows;
use moetrail_routes::format::{ObjectRows, npy_base64};
use serde::{Deserialize, Serialize};

use crate::error::ApiError;

/// The form in which rows are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowsFormat {
    /// `{"data","shape","start","dtype"}`.
    Object,
    /// Base64 of a whole `.npy` file, with the start beside it.
    Npy,
}

/// Forms of the contract that this build does not speak yet.
const LATER: [&str; 5] = ["sglang", "dynamo", "list", "nemo", "skyrl"];

impl RowsFormat {
    /// The form of that name, `None` if this build has none.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "object" => Some(Self::Object),
            "npy" => Some(Self::Npy),
            _ => None,
        }
    }

    /// Reads the name that a request gives.
    fn parse(name: &str) -> Result<Self, ApiError> {
        Self::from_name(name).ok_or_else(|| {
            let what = if LATER.contains(&name) { "not supported yet" } else { "unknown" };
            let message = format!("routed_experts_format {name:?} is {what}; use \"object\" or \"npy\"");
            ApiError::invalid("routed_experts_format", message)
        })
    }
}

/// The fields about rows, at the top level of every generation request.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct RowsFields {
    return_routed_experts: Option<bool>,
    routed_experts_prompt_start: Option<i64>,
    routed_experts_format: Option<String>,
    routed_experts_stream: Option<String>,
}

/// The one field about rows that `sampling_params` may hold.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default)]
pub(crate) struct NestedStart {
    pub(crate) routed_experts_prompt_start: Option<i64>,
}

const START: &str = "routed_experts_prompt_start";
const NESTED_START: &str = "sampling_params.routed_experts_prompt_start";

/// What a request asks for, checked as far as the request alone allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RowsAsk {
    wanted: Option<bool>,
    /// The start and the name under which it was given.
    start: Option<(i64, &'static str)>,
    /// The form of the reply.
    pub(crate) format: RowsFormat,
}

impl RowsFields {
    /// Puts the two places of the start together and reads the names.
    pub(crate) fn resolve(&self, nested: NestedStart, default_format: RowsFormat) -> Result<RowsAsk, ApiError> {
        let start = match (self.routed_experts_prompt_start, nested.routed_experts_prompt_start) {
            (Some(top), Some(nested)) if top != nested => {
                let message = format!("{START} is {top} at the top level and {nested} in sampling_params");
                return Err(ApiError::invalid(START, message));
            }
            (Some(top), _) => Some((top, START)),
            (None, Some(nested)) => Some((nested, NESTED_START)),
            (None, None) => None,
        };
        let format = self.routed_experts_format.as_deref().map_or(Ok(default_format), RowsFormat::parse)?;
        match self.routed_experts_stream.as_deref() {
            None | Some("final") => {}
            Some("delta") => {
                let message = "routed_experts_stream \"delta\" is not supported yet; use \"final\"";
                return Err(ApiError::invalid("routed_experts_stream", message));
            }
            Some(other) => {
                let message = format!("routed_experts_stream {other:?} is unknown; use \"final\"");
                return Err(ApiError::invalid("routed_experts_stream", message));
            }
        }
        Ok(RowsAsk { wanted: self.return_routed_experts, start, format })
    }
}

impl RowsAsk {
    /// The start for a prompt of `prompt_len` tokens, `None` if no rows are returned.
    ///
    /// A start is checked even where the client wants no rows.
    pub(crate) fn start_for(&self, prompt_len: usize, info: &EngineInfo) -> Result<Option<usize>, ApiError> {
        let start = match self.start {
            None => 0,
            Some((start, param)) => {
                usize::try_from(start).ok().filter(|start| *start <= prompt_len).ok_or_else(|| {
                    let range = format!("must be between 0 and the prompt length ({prompt_len}), inclusive");
                    ApiError::invalid(param, format!("{START} {range}; it is {start}"))
                })?
            }
        };
        let wanted = self.wanted.unwrap_or(self.start.is_some() || info.return_routed_experts);
        if wanted && info.row_layout.is_none() {
            let param =
                if self.wanted.is_some() { "return_routed_experts" } else { self.start.map_or(START, |(_, p)| p) };
            let message = "routed experts were asked for, but this server does not capture them";
            return Err(ApiError::invalid(param, message));
        }
        Ok(wanted.then_some(start))
    }
}

/// The fields of a choice about its rows. `routed_experts` comes first and, in the object form, `data` first in it:
/// clients cut the bytes behind `"routed_experts":{"data":"` out of the raw body.
#[derive(Debug, Default, Serialize)]
pub(crate) struct RowsReply {
    routed_experts: Option<Payload>,
    #[serde(skip_serializing_if = "Option::is_none")]
    routed_experts_start: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    routed_experts_error: Option<RowsErrorReply>,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Payload {
    Object(ObjectRows),
    Npy(String),
}

#[derive(Debug, Serialize)]
struct RowsErrorReply {
    code: &'static str,
    message: String,
}

impl RowsReply {
    /// Writes the rows of a finished choice.
    pub(crate) fn new(rows: Option<&Result<ExpertRows, RowsError>>, format: RowsFormat) -> Self {
        match (rows, format) {
            (None, _) => Self::default(),
            (Some(Ok(rows)), RowsFormat::Object) => {
                Self { routed_experts: Some(Payload::Object(rows.into())), ..Self::default() }
            }
            (Some(Ok(rows)), RowsFormat::Npy) => Self {
                routed_experts: Some(Payload::Npy(npy_base64(rows))),
                routed_experts_start: Some(rows.start()),
                ..Self::default()
            },
            (Some(Err(error)), _) => Self::lost(error.code, error.message.clone()),
        }
    }

    /// Writes the rows of all choices of one body. A client that cuts the first payload out of the raw body writes it
    /// back to `choices[0]`, so where that one has lost its rows no other may have any.
    pub(crate) fn all<'a>(
        choices: impl Iterator<Item = Option<&'a Result<ExpertRows, RowsError>>>,
        format: RowsFormat,
    ) -> Vec<Self> {
        let mut first_lost = false;
        choices
            .enumerate()
            .map(|(index, rows)| match rows {
                Some(Ok(_)) if first_lost => Self::lost("first_choice_lost", "choices[0] has no rows".into()),
                rows => {
                    first_lost |= index == 0 && !matches!(rows, Some(Ok(_)));
                    Self::new(rows, format)
                }
            })
            .collect()
    }

    fn lost(code: &'static str, message: String) -> Self {
        Self { routed_experts_error: Some(RowsErrorReply { code, message }), ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use moetrail_routes::{ExpertDtype, RowLayout};

    use super::*;
    use crate::body::read;
    use crate::fixtures;

    fn ask(body: &str, nested: Option<i64>) -> Result<RowsAsk, ApiError> {
        let nested = NestedStart { routed_experts_prompt_start: nested };
        read::<RowsFields>(body.as_bytes())?.resolve(nested, RowsFormat::Object)
    }

    fn start(body: &str, nested: Option<i64>, info: &EngineInfo) -> Result<Option<usize>, ApiError> {
        ask(body, nested)?.start_for(5, info)
    }

    #[track_caller]
    fn refused<T: std::fmt::Debug>(found: Result<T, ApiError>, param: &str, part: &str) {
        let error = found.expect_err(param);
        assert_eq!((error.status, error.param.as_deref()), (400, Some(param)));
        assert!(error.message.contains(part), "{error}");
    }

    #[test]
    fn rows_are_returned_iff_asked_for() {
        let info = fixtures::info();
        assert_eq!(start("{}", None, &info), Ok(None));
        assert_eq!(
            start(r#"{"return_routed_experts":null,"routed_experts_prompt_start":null}"#, None, &info),
            Ok(None)
        );
        assert_eq!(start(r#"{"return_routed_experts":true}"#, None, &info), Ok(Some(0)));
        assert_eq!(start(r#"{"routed_experts_prompt_start":5}"#, None, &info), Ok(Some(5)));
        assert_eq!(start("{}", Some(3), &info), Ok(Some(3)));
        assert_eq!(start(r#"{"routed_experts_prompt_start":3}"#, Some(3), &info), Ok(Some(3)));
        assert_eq!(start(r#"{"return_routed_experts":false,"routed_experts_prompt_start":2}"#, None, &info), Ok(None));
        let by_default = EngineInfo { return_routed_experts: true, ..fixtures::info() };
        assert_eq!(start("{}", None, &by_default), Ok(Some(0)));
        assert_eq!(start(r#"{"return_routed_experts":false}"#, None, &by_default), Ok(None));
    }

    #[test]
    fn a_start_must_be_an_integer_within_the_prompt() {
        let info = fixtures::info();
        for (value, part) in [
            ("-1", "it is -1"),
            ("6", "the prompt length (5), inclusive; it is 6"),
            ("true", "boolean `true`"),
            ("1.0", "floating point `1.0`"),
            ("\"1\"", "string \"1\""),
            ("9223372036854775808", "9223372036854775808"),
        ] {
            refused(start(&format!("{{\"routed_experts_prompt_start\":{value}}}"), None, &info), START, part);
        }
        refused(start("{}", Some(6), &info), NESTED_START, "it is 6");
        let unwanted = r#"{"return_routed_experts":false,"routed_experts_prompt_start":-2}"#;
        refused(start(unwanted, None, &info), START, "it is -2");
        refused(start(r#"{"routed_experts_prompt_start":1}"#, Some(2), &info), START, "1 at the top level and 2");
    }

    #[test]
    fn names_and_flags_are_strict() {
        refused(ask(r#"{"return_routed_experts":1}"#, None), "return_routed_experts", "integer `1`");
        refused(ask(r#"{"routed_experts_format":"nemo"}"#, None), "routed_experts_format", "not supported yet");
        refused(ask(r#"{"routed_experts_format":"xml"}"#, None), "routed_experts_format", "\"xml\" is unknown");
        refused(ask(r#"{"routed_experts_stream":"delta"}"#, None), "routed_experts_stream", "not supported yet");
        refused(ask(r#"{"routed_experts_stream":"x"}"#, None), "routed_experts_stream", "\"x\" is unknown");
        let ask = ask(r#"{"routed_experts_format":"npy","routed_experts_stream":"final"}"#, None).expect("valid");
        assert_eq!(ask.format, RowsFormat::Npy);
    }

    #[test]
    fn asking_without_capture_is_refused() {
        let off = EngineInfo { row_layout: None, ..fixtures::info() };
        refused(start(r#"{"return_routed_experts":true}"#, None, &off), "return_routed_experts", "does not capture");
        refused(start(r#"{"routed_experts_prompt_start":1}"#, None, &off), START, "does not capture");
        refused(start("{}", Some(1), &off), NESTED_START, "does not capture");
        assert_eq!(start(r#"{"return_routed_experts":false,"routed_experts_prompt_start":1}"#, None, &off), Ok(None));
    }

    fn rows() -> Result<ExpertRows, RowsError> {
        let layout = RowLayout { num_layers: 1, top_k: 2, dtype: ExpertDtype::U8 };
        Ok(ExpertRows::new(3, layout, vec![1, 2, 255, 0]).expect("whole rows"))
    }

    fn json(reply: &RowsReply) -> String {
        serde_json::to_string(reply).expect("serialises")
    }

    #[test]
    fn the_object_begins_with_the_bytes_that_clients_look_for() {
        let reply = json(&RowsReply::new(Some(&rows()), RowsFormat::Object));
        let expect = r#"{"routed_experts":{"data":"AQL/AA==","shape":[2,1,2],"start":3,"dtype":"uint8"}}"#;
        assert_eq!(reply, expect);
        assert_eq!(json(&RowsReply::new(None, RowsFormat::Object)), r#"{"routed_experts":null}"#);
    }

    #[test]
    fn npy_has_its_start_beside_it() {
        let reply = json(&RowsReply::new(Some(&rows()), RowsFormat::Npy));
        assert!(reply.starts_with(r#"{"routed_experts":"k05VTVBZ"#), "{reply}");
        assert!(reply.ends_with(r#"","routed_experts_start":3}"#), "{reply}");
    }

    #[test]
    fn if_the_first_choice_lost_its_rows_no_other_has_any() {
        let lost: Result<ExpertRows, RowsError> =
            Err(RowsError { code: "generation_mismatch", message: "block 3".into() });
        let replies = RowsReply::all([Some(&lost), Some(&rows())].into_iter(), RowsFormat::Object);
        let expect =
            r#"{"routed_experts":null,"routed_experts_error":{"code":"generation_mismatch","message":"block 3"}}"#;
        assert_eq!(json(&replies[0]), expect);
        assert!(json(&replies[1]).starts_with(r#"{"routed_experts":null,"routed_experts_error":{"#));
        let replies = RowsReply::all([Some(&rows()), Some(&lost)].into_iter(), RowsFormat::Object);
        assert!(json(&replies[0]).contains("\"data\""));
        assert!(json(&replies[1]).starts_with(r#"{"routed_experts":null"#));
    }
}
