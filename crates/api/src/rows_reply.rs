//! Routed experts on the wire.

use std::io;

use moetrail_engine::{Finish, RowsError, WeightVersionSpan};
use moetrail_routes::ExpertRows;
use moetrail_routes::format::Format;
use serde::{Serialize, Serializer};

use crate::rows::RowsFormat;

/// The rows of a body: its JSON names them by number, and they are encoded when that is written.
#[derive(Debug, Default)]
pub(crate) struct Payloads(Vec<Payload>);

#[derive(Debug)]
struct Payload {
    rows: ExpertRows,
    format: Format,
    num_experts: usize,
}

/// Stands for a payload; written as a number of 128 bits, which nothing else in our bodies is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PayloadRef(usize);

impl Serialize for PayloadRef {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u128(self.0 as u128)
    }
}

impl Payloads {
    fn add(&mut self, payload: Payload) -> PayloadRef {
        self.0.push(payload);
        PayloadRef(self.0.len() - 1)
    }

    /// Room that the payloads will need, roughly.
    pub(crate) fn size(&self) -> usize {
        self.0.iter().map(|payload| payload.rows.data().len() / 3 * 4 + 200).sum()
    }

    /// Encodes payload number `index`.
    pub(crate) fn write(&self, index: u128, out: &mut dyn io::Write) -> io::Result<()> {
        match usize::try_from(index).ok().and_then(|index| self.0.get(index)) {
            Some(payload) => payload.format.write_json(&payload.rows, payload.num_experts, out),
            None => Err(io::Error::other("no payload has this number")),
        }
    }
}

/// The fields of a choice about its rows. `routed_experts` comes first and, in the object form, `data` first in it:
/// clients cut the bytes behind `"routed_experts":{"data":"` out of the raw body.
#[derive(Debug, Default, Serialize)]
pub(crate) struct RowsReply {
    #[serde(skip_serializing_if = "Place::is_elsewhere")]
    routed_experts: Place,
    #[serde(skip_serializing_if = "Option::is_none")]
    routed_experts_start: Option<usize>,
    #[serde(flatten)]
    rest: RowsRest,
}

#[derive(Debug, Default)]
enum Place {
    #[default]
    Nowhere,
    Here(PayloadRef),
    /// In the message, or in `nvext`.
    Elsewhere(PayloadRef),
}

impl Place {
    fn is_elsewhere(&self) -> bool {
        matches!(self, Self::Elsewhere(_))
    }
}

impl Serialize for Place {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Nowhere => serializer.serialize_none(),
            Self::Here(payload) | Self::Elsewhere(payload) => payload.serialize(serializer),
        }
    }
}

#[derive(Debug, Serialize)]
struct RowsErrorReply {
    code: &'static str,
    message: String,
}

#[derive(Debug, Serialize)]
struct VersionReply {
    version: String,
    start: usize,
    end: usize,
}

/// `nvext` of an answer.
#[derive(Debug, Serialize)]
pub(crate) struct NvextReply {
    routed_experts: PayloadRef,
}

impl RowsReply {
    /// What belongs to the message instead of the choice.
    pub(crate) fn in_message(&self, format: RowsFormat) -> Option<PayloadRef> {
        self.elsewhere().filter(|_| format != RowsFormat::Nvext)
    }

    /// What belongs to `nvext` instead of the choice.
    pub(crate) fn in_nvext(&self, format: RowsFormat) -> Option<NvextReply> {
        self.elsewhere().filter(|_| format == RowsFormat::Nvext).map(|routed_experts| NvextReply { routed_experts })
    }

    fn elsewhere(&self) -> Option<PayloadRef> {
        match self.routed_experts {
            Place::Elsewhere(payload) => Some(payload),
            Place::Nowhere | Place::Here(_) => None,
        }
    }

    /// The payload, its start and the error, for an endpoint that names them otherwise.
    pub(crate) fn into_parts(self) -> (Option<PayloadRef>, Option<usize>, RowsRest) {
        let payload = match self.routed_experts {
            Place::Nowhere => None,
            Place::Here(payload) | Place::Elsewhere(payload) => Some(payload),
        };
        (payload, self.routed_experts_start, self.rest)
    }

    fn lost(code: &'static str, message: String) -> Self {
        let routed_experts_error = Some(RowsErrorReply { code, message });
        Self { rest: RowsRest { routed_experts_error, ..RowsRest::default() }, ..Self::default() }
    }
}

/// What all endpoints name alike.
#[derive(Debug, Default, Serialize)]
pub(crate) struct RowsRest {
    #[serde(skip_serializing_if = "Option::is_none")]
    routed_experts_error: Option<RowsErrorReply>,
    #[serde(skip_serializing_if = "Option::is_none")]
    routed_experts_recomputed: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    weight_versions: Option<Vec<VersionReply>>,
}

/// Writes the rows of one answer's choices.
#[derive(Debug, Clone)]
pub(crate) struct RowsWriter {
    pub(crate) format: RowsFormat,
    /// Experts of the model, which decide the dtype of one format.
    pub(crate) num_experts: usize,
    /// Whether a choice has a message in which rows can be.
    pub(crate) has_message: bool,
    /// Set once choice 0 has ended without its rows.
    first_lost: bool,
}

impl RowsWriter {
    pub(crate) fn new(format: RowsFormat, num_experts: usize) -> Self {
        Self { format, num_experts, has_message: false, first_lost: false }
    }

    /// The rows with which choice `index` ends. A client that cuts the first payload out of the raw body writes it
    /// back to `choices[0]`, so where that one has lost its rows no other may have any. In a stream that holds from
    /// the chunk on that tells the loss: what was sent before cannot be taken back.
    pub(crate) fn end(
        &mut self,
        index: usize,
        rows: Option<Result<ExpertRows, RowsError>>,
        recomputed: Option<Vec<WeightVersionSpan>>,
        payloads: &mut Payloads,
    ) -> RowsReply {
        let mut reply = match rows {
            None => RowsReply::default(),
            Some(Err(error)) => {
                self.first_lost |= index == 0;
                RowsReply::lost(error.code, error.message)
            }
            Some(Ok(_)) if self.first_lost => RowsReply::lost("first_choice_lost", "choices[0] has no rows".into()),
            Some(Ok(rows)) => self.rows(rows, payloads),
        };
        reply.rest.weight_versions = recomputed.map(|spans| {
            let version = |span: WeightVersionSpan| VersionReply {
                version: span.version.to_string(),
                start: span.span.start,
                end: span.span.end,
            };
            spans.into_iter().map(version).collect()
        });
        reply.rest.routed_experts_recomputed = reply.rest.weight_versions.is_some().then_some(true);
        reply
    }

    /// Rows that are sent, all of a choice's or those of a chunk.
    pub(crate) fn rows(&self, rows: ExpertRows, payloads: &mut Payloads) -> RowsReply {
        let (format, start) = (self.format.payload(), rows.start());
        let payload = payloads.add(Payload { rows, format, num_experts: self.num_experts });
        let elsewhere = self.format == RowsFormat::Nvext || (format == Format::Nemo && self.has_message);
        RowsReply {
            routed_experts: if elsewhere { Place::Elsewhere(payload) } else { Place::Here(payload) },
            routed_experts_start: (!format.has_start()).then_some(start),
            ..RowsReply::default()
        }
    }
}

/// The rows with which a choice goes on or ends; nothing is said of them in between.
pub(crate) fn end(
    writer: &mut RowsWriter,
    index: usize,
    mut finish: Option<Finish>,
    rows: Option<ExpertRows>,
    payloads: &mut Payloads,
) -> (Option<Finish>, Option<RowsReply>) {
    let reply = match &mut finish {
        Some(finish) => Some(writer.end(index, finish.routed_experts.take(), finish.recomputed.take(), payloads)),
        None => rows.map(|rows| writer.rows(rows, payloads)),
    };
    (finish, reply)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use moetrail_routes::{ExpertDtype, RowLayout, TokenSpan};

    use super::*;
    use crate::body::write_with;

    fn rows() -> ExpertRows {
        let layout = RowLayout { num_layers: 1, top_k: 2, dtype: ExpertDtype::U8 };
        ExpertRows::new(3, layout, vec![1, 2, 255, 0]).expect("whole rows")
    }

    fn lost() -> RowsError {
        RowsError { code: "generation_mismatch", message: "block 3".into() }
    }

    fn json(format: &str, ends: Vec<Option<Result<ExpertRows, RowsError>>>) -> Vec<String> {
        let format = RowsFormat::from_name(format).expect("a format");
        let mut writer = RowsWriter::new(format, 256);
        let (mut replies, mut payloads) = (Vec::new(), Payloads::default());
        for (index, rows) in ends.into_iter().enumerate() {
            replies.push(writer.end(index, rows, None, &mut payloads));
        }
        let text = |reply| String::from_utf8(write_with(&reply, &payloads)).expect("UTF-8");
        replies.into_iter().map(text).collect()
    }

    #[test]
    fn the_object_begins_with_the_bytes_that_clients_look_for() {
        let reply = json("object", vec![Some(Ok(rows())), None]);
        let expect = r#"{"routed_experts":{"data":"AQL/AA==","shape":[2,1,2],"start":3,"dtype":"uint8"}}"#;
        assert_eq!(reply, [expect, r#"{"routed_experts":null}"#]);
    }

    #[test]
    fn forms_without_a_start_have_it_beside_them() {
        for (format, begins) in [
            ("npy", "\"k05VTVBZ"),
            ("sglang", "\"AQAAAAIAAAD/"),
            ("list", "[[[1,2]],[[255,0]]]"),
            ("skyrl", "{\"data\""),
        ] {
            let reply = json(format, vec![Some(Ok(rows()))]).remove(0);
            assert!(reply.starts_with(&format!(r#"{{"routed_experts":{begins}"#)), "{reply}");
            assert!(reply.ends_with(r#","routed_experts_start":3}"#), "{reply}");
        }
        assert_eq!(json("dynamo", vec![Some(Ok(rows()))]), ["{}"], "it is in nvext");
    }

    #[test]
    fn if_the_first_choice_lost_its_rows_no_other_has_any() {
        let replies = json("object", vec![Some(Err(lost())), Some(Ok(rows()))]);
        let expect =
            r#"{"routed_experts":null,"routed_experts_error":{"code":"generation_mismatch","message":"block 3"}}"#;
        assert_eq!(replies[0], expect);
        assert!(replies[1].starts_with(r#"{"routed_experts":null,"routed_experts_error":{"#));
        let replies = json("object", vec![Some(Ok(rows())), Some(Err(lost()))]);
        assert!(replies[0].contains("\"data\""));
        assert!(replies[1].starts_with(r#"{"routed_experts":null"#));
    }

    #[test]
    fn versions_are_told_where_state_was_dropped() {
        let mut payloads = Payloads::default();
        let spans = vec![WeightVersionSpan { version: Arc::from("7"), span: TokenSpan::new(3, 5) }];
        let mut writer = RowsWriter::new(RowsFormat::InChoice(Format::List), 256);
        let reply = writer.end(0, Some(Ok(rows())), Some(spans), &mut payloads);
        let text = String::from_utf8(write_with(&reply, &payloads)).expect("UTF-8");
        let expect = r#""routed_experts_recomputed":true,"weight_versions":[{"version":"7","start":3,"end":5}]}"#;
        assert!(text.ends_with(expect), "{text}");
    }
}
