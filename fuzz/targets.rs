//! What is fuzzed: everything that reads what strangers send. The same functions replay the corpus in the tests.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use moetrail_api::{DefaultSampling, Dialect, RequestContext};
use moetrail_engine::{EngineInfo, RoutingShape};
use moetrail_routes::format::{Format, Import};
use moetrail_routes::{
    ExpertDtype, ExpertRows, Overlap, RoutingStats, RowLayout, Segment, Turn, merge as merge_rows, merge_segments,
    stitch as stitch_turns,
};
use moetrail_text::Tokenizer;
use serde_json::Value;

/// Every way to read a payload.
fn read(value: &Value) -> Vec<ExpertRows> {
    let formats = Format::ALL.map(Some).into_iter().chain([None]);
    let hints = formats.flat_map(|format| {
        [None, Some([2, 1, 2]), Some([usize::MAX; 3])].map(|shape| Import {
            format,
            start: Some(3),
            shape,
            bare_skyrl: shape.is_some(),
        })
    });
    hints.filter_map(|hints| hints.read(value).ok().flatten()).collect()
}

/// Every payload that can be read can be written and read again.
pub fn decode(data: &[u8]) {
    let Ok(value) = serde_json::from_slice::<Value>(data) else { return };
    for rows in read(&value) {
        let _ = RoutingStats::new(&rows);
        for format in Format::ALL {
            let Ok(json) = format.to_json(&rows, 300) else { continue };
            let written: Value = serde_json::from_str(&json).expect("what is written is JSON");
            let hints =
                Import { format: Some(format), start: Some(rows.start()), shape: Some(rows.shape()), bare_skyrl: true };
            let again = hints.read(&written).expect("what is written is read").expect("rows");
            assert_eq!((again.start(), again.shape()), (rows.start(), rows.shape()));
            assert!(again.iter_ids().eq(rows.iter_ids()));
        }
    }
}

/// `[prefill, decode]`, as payloads or as segments.
pub fn merge(data: &[u8]) {
    let Ok((prefill, decode)) = serde_json::from_slice::<(Value, Value)>(data) else { return };
    if let (Ok(prefill), Ok(decode)) = (
        serde_json::from_value::<Vec<Segment>>(prefill.clone()),
        serde_json::from_value::<Vec<Segment>>(decode.clone()),
    ) {
        let _ = merge_segments(&prefill, &decode);
    }
    for prefill in read(&prefill) {
        for decode in read(&decode) {
            for overlap in [Overlap::First, Overlap::Last, Overlap::Strict] {
                let Ok(Some(merged)) = merge_rows(Some(&prefill), Some(&decode), overlap) else { continue };
                assert_eq!(merged.rows.start(), prefill.start());
                assert_eq!(merged.rows.span().end, prefill.span().end.max(decode.span().end));
                assert!(merged.differing <= merged.overlapping);
            }
        }
    }
}

/// `[[prompt ids, completion ids, payload], …]`.
pub fn stitch(data: &[u8]) {
    let Ok(turns) = serde_json::from_slice::<Vec<(Vec<u32>, Vec<u32>, Value)>>(data) else { return };
    let turns: Vec<Turn> = turns
        .into_iter()
        .map(|(prompt_ids, completion_ids, payload)| {
            let rows = Import::default().read(&payload).ok().flatten();
            Turn { prompt_ids, completion_ids, rows }
        })
        .collect();
    let Ok(stitched) = stitch_turns(&turns) else { return };
    assert!(stitched.branches.len() <= turns.len());
    for branch in stitched.branches {
        assert!(branch.rows.is_none_or(|rows| rows.start() == 0 && rows.num_rows() <= branch.token_ids.len()));
    }
}

fn info() -> &'static EngineInfo {
    static INFO: OnceLock<EngineInfo> = OnceLock::new();
    INFO.get_or_init(|| {
        // The tests run in the package's folder, the fuzzer in its own.
        let folders = ["models/bundled", "../models/bundled"];
        let tokenizer = folders.iter().find_map(|folder| Tokenizer::from_dir(Path::new(folder)).ok().flatten());
        EngineInfo {
            model_name: "m".into(),
            model_aliases: Vec::new(),
            max_model_len: 64,
            max_num_seqs: 4,
            max_live_requests: 8,
            max_logprobs: 5,
            vocab_size: 1536,
            eos_token_ids: vec![2],
            routing: Some(RoutingShape { num_layers: 1, moe_layers: vec![0], top_k: 2, num_experts: 4 }),
            row_layout: Some(RowLayout { num_layers: 1, top_k: 2, dtype: ExpertDtype::U8 }),
            return_routed_experts: false,
            num_blocks: 32,
            block_size: 4,
            tokenizer: Some(Arc::new(tokenizer.expect("the bundled model's tokenizer"))),
            created: 0,
        }
    })
}

/// Bodies of every endpoint: accepted, or refused with a status of 4xx.
pub fn bodies(data: &[u8]) {
    let (info, defaults) = (info(), DefaultSampling::default());
    let context = RequestContext {
        info,
        defaults: &defaults,
        rows_format: None,
        header_id: None,
        weight_version: "0",
        unique: "u",
        created: 0,
    };
    for dialect in [Dialect::Completions, Dialect::Chat, Dialect::Generate, Dialect::Sglang] {
        match moetrail_api::accept(dialect, data, &context) {
            Ok(accepted) => accepted.requests.iter().for_each(|request| info.check(request).expect("it was checked")),
            Err(error) => assert!((400..500).contains(&error.status), "{error}"),
        }
    }
    let refusals = [
        moetrail_api::tokenize(data, info).err(),
        moetrail_api::detokenize(data, info).err(),
        moetrail_api::pause_order(&[], data).err(),
        moetrail_api::update_order(data).err(),
        moetrail_api::abort_order(data).err(),
    ];
    refusals.into_iter().flatten().for_each(|error| assert!((400..500).contains(&error.status), "{error}"));
}
