//! What a request asks for about routed experts.

use moetrail_engine::EngineInfo;
use moetrail_routes::format::Format;
use serde::Deserialize;

use crate::error::ApiError;

/// The form in which rows are sent, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowsFormat {
    /// In the choice (`sglang`'s own endpoint: in `meta_info`; `nemo` in chat: in the message).
    InChoice(Format),
    /// The object form in `nvext.routed_experts` of the body or of the final chunk (Dynamo).
    Nvext,
}

impl RowsFormat {
    /// Names on the wire and on the command line.
    pub(crate) const NAMES: [&str; 7] = ["object", "npy", "sglang", "dynamo", "list", "nemo", "skyrl"];

    /// The form of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        if name == "dynamo" { Some(Self::Nvext) } else { Format::from_name(name).map(Self::InChoice) }
    }

    /// The encoding.
    pub(crate) fn payload(self) -> Format {
        match self {
            Self::InChoice(format) => format,
            Self::Nvext => Format::Object,
        }
    }

    /// Reads the name that a request gives.
    fn parse(name: &str) -> Result<Self, ApiError> {
        Self::from_name(name).ok_or_else(|| {
            let message = format!("routed_experts_format {name:?} is unknown; it is one of {}", Self::NAMES.join(", "));
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

pub(crate) const START: &str = "routed_experts_prompt_start";
pub(crate) const NESTED_START: &str = "sampling_params.routed_experts_prompt_start";

/// What an endpoint brings to the fields of the top level.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowsDefaults {
    /// The start under another name.
    pub(crate) other_start: Option<(i64, &'static str)>,
    /// The form where the request names none.
    pub(crate) format: RowsFormat,
    /// Whether something else asks for rows.
    pub(crate) wanted: bool,
    /// Whether the answer is streamed.
    pub(crate) streamed: bool,
}

/// What a request asks for, checked as far as the request alone allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RowsAsk {
    wanted: Option<bool>,
    /// The start and the name under which it was given.
    start: Option<(i64, &'static str)>,
    /// The form of the reply.
    pub(crate) format: RowsFormat,
    /// Whether each chunk carries its rows.
    pub(crate) delta: bool,
}

impl RowsFields {
    /// Puts the places of the start together and reads the names.
    pub(crate) fn resolve(&self, defaults: RowsDefaults) -> Result<RowsAsk, ApiError> {
        let start = match (self.routed_experts_prompt_start, defaults.other_start) {
            (Some(top), Some((other, name))) if top != other => {
                let message = format!("{START} is {top} at the top level, and {name} is {other}");
                return Err(ApiError::invalid(START, message));
            }
            (Some(top), _) => Some((top, START)),
            (None, other) => other,
        };
        let format = self.routed_experts_format.as_deref().map_or(Ok(defaults.format), RowsFormat::parse)?;
        let asks_for_delta = match self.routed_experts_stream.as_deref() {
            None | Some("final") => false,
            Some("delta") => true,
            Some(other) => {
                let message = format!("routed_experts_stream {other:?} is unknown; use \"final\" or \"delta\"");
                return Err(ApiError::invalid("routed_experts_stream", message));
            }
        };
        if asks_for_delta && matches!(format.payload(), Format::Nemo | Format::Skyrl) {
            let name = format.payload().name();
            let message = format!("routed_experts_stream \"delta\" is not possible with {name}, which has no start");
            return Err(ApiError::invalid("routed_experts_stream", message));
        }
        let wanted = self.return_routed_experts.or(defaults.wanted.then_some(true));
        // An answer in one piece has one delta: everything.
        Ok(RowsAsk { wanted, start, format, delta: asks_for_delta && defaults.streamed })
    }
}

/// `nvext` has room for one choice's rows; the others' must not be lost in silence.
pub(crate) fn check_nvext_has_one(rows: &RowsAsk, choices: usize, param: &str) -> Result<(), ApiError> {
    let asked = rows.wanted.unwrap_or(rows.start.is_some());
    if asked && rows.format == RowsFormat::Nvext && choices > 1 {
        let message = format!("{param}: nvext.routed_experts holds the rows of one choice; the answer has {choices}");
        return Err(ApiError::invalid(param, message));
    }
    Ok(())
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
                    ApiError::invalid(param, format!("{param} {range}; it is {start}"))
                })?
            }
        };
        let wanted = self.wanted.unwrap_or(self.start.is_some() || info.return_routed_experts);
        let start_param = self.start.map_or(START, |(_, param)| param);
        if wanted && info.row_layout.is_none() {
            let param = if self.wanted.is_some() { "return_routed_experts" } else { start_param };
            let message = "routed experts were asked for, but this server does not capture them";
            return Err(ApiError::invalid(param, message));
        }
        if wanted {
            let possible = self.format.payload().check_start(start);
            possible.map_err(|error| ApiError::invalid(start_param, format!("{start_param}: {}", error.message())))?;
        }
        Ok(wanted.then_some(start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::read;
    use crate::fixtures;

    fn ask(body: &str, nested: Option<i64>) -> Result<RowsAsk, ApiError> {
        let other_start = nested.map(|start| (start, NESTED_START));
        let format = RowsFormat::InChoice(Format::Object);
        let defaults = RowsDefaults { other_start, format, wanted: false, streamed: true };
        read::<RowsFields>(body.as_bytes())?.resolve(defaults)
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
        refused(
            start(r#"{"routed_experts_prompt_start":1}"#, Some(2), &info),
            START,
            "1 at the top level, and sampling_params.routed_experts_prompt_start is 2",
        );
    }

    #[test]
    fn names_and_flags_are_strict() {
        refused(ask(r#"{"return_routed_experts":1}"#, None), "return_routed_experts", "integer `1`");
        refused(ask(r#"{"routed_experts_format":"xml"}"#, None), "routed_experts_format", "\"xml\" is unknown");
        for format in ["nemo", "skyrl"] {
            let body = format!(r#"{{"routed_experts_stream":"delta","routed_experts_format":"{format}"}}"#);
            refused(ask(&body, None), "routed_experts_stream", "has no start");
        }
        assert_eq!(ask(r#"{"routed_experts_stream":"delta"}"#, None).map(|ask| ask.delta), Ok(true));
        refused(ask(r#"{"routed_experts_stream":"x"}"#, None), "routed_experts_stream", "\"x\" is unknown");
        let ask = ask(r#"{"routed_experts_format":"npy","routed_experts_stream":"final"}"#, None).expect("valid");
        assert_eq!((ask.format, ask.delta), (RowsFormat::InChoice(Format::Npy), false));
        for name in RowsFormat::NAMES {
            assert!(RowsFormat::from_name(name).is_some(), "{name}");
        }
    }

    #[test]
    fn a_form_without_a_start_takes_none() {
        let info = fixtures::info();
        let nemo = |start: i64| format!(r#"{{"routed_experts_format":"nemo","routed_experts_prompt_start":{start}}}"#);
        assert_eq!(start(&nemo(0), None, &info), Ok(Some(0)));
        refused(start(&nemo(1), None, &info), START, "its rows begin at 0");
    }

    #[test]
    fn asking_without_capture_is_refused() {
        let off = EngineInfo { row_layout: None, ..fixtures::info() };
        refused(start(r#"{"return_routed_experts":true}"#, None, &off), "return_routed_experts", "does not capture");
        refused(start(r#"{"routed_experts_prompt_start":1}"#, None, &off), START, "does not capture");
        refused(start("{}", Some(1), &off), NESTED_START, "does not capture");
        assert_eq!(start(r#"{"return_routed_experts":false,"routed_experts_prompt_start":1}"#, None, &off), Ok(None));
    }
}
