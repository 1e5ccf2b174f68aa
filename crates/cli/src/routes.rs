//! `moetrail routes`: rows as files, without a model.

use std::io::{Read, Write};

use anyhow::{Context, Result, bail};
use moetrail_routes::format::{self, Format, Import};
use moetrail_routes::{Overlap, RoutingStats, Segment, Turn, merge, merge_segments, stitch};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::args::{ConvertArgs, ImportArgs, MergeArgs, RoutesCommand, StatsArgs, StitchArgs};

/// Prints the result's payload, and nothing else, on standard output.
pub fn routes(command: &RoutesCommand) -> Result<()> {
    let payload = match command {
        RoutesCommand::Merge(args) => merged(args)?,
        RoutesCommand::Stitch(args) => stitched(args)?,
        RoutesCommand::Convert(args) => converted(args)?,
        RoutesCommand::Stats(args) => stats(args)?,
    };
    let mut out = std::io::stdout().lock();
    out.write_all(payload.as_bytes())?;
    Ok(out.write_all(b"\n")?)
}

fn read(file: &str) -> Result<Value> {
    let mut text = String::new();
    let read = match file {
        "-" => std::io::stdin().read_to_string(&mut text),
        path => std::fs::File::open(path).and_then(|mut file| file.read_to_string(&mut text)),
    };
    read.with_context(|| format!("cannot read {file}"))?;
    serde_json::from_str(&text).with_context(|| format!("{file} is not JSON"))
}

impl ImportArgs {
    /// What is known of a payload; where rows are put together, a missing start is not taken for 0.
    fn import(&self, bare_skyrl: bool) -> Import {
        let bare_skyrl = bare_skyrl || self.start.is_some();
        Import { format: self.from, start: self.start, shape: self.shape, bare_skyrl }
    }
}

fn merged(args: &MergeArgs) -> Result<String> {
    if args.prefill == "-" && args.decode == "-" {
        bail!("PREFILL and DECODE cannot both be standard input");
    }
    let (prefill, decode) = (read(&args.prefill)?, read(&args.decode)?);
    if is_segments(&prefill) || is_segments(&decode) {
        let segments = |value: Value, side: &str| match value {
            Value::Null => Ok(Vec::new()),
            value => Vec::<Segment>::deserialize(value).with_context(|| format!("{side} is no list of segments")),
        };
        let merged = merge_segments(&segments(prefill, "prefill")?, &segments(decode, "decode")?)?;
        return Ok(serde_json::to_string(&merged)?);
    }
    let import = args.import.import(false);
    let prefill = import.read(&prefill).context("prefill")?;
    let decode = import.read(&decode).context("decode")?;
    let Some(merged) = merge(prefill.as_ref(), decode.as_ref(), args.overlap)? else { return Ok("null".into()) };
    if merged.differing > 0 {
        eprintln!("{} of {} rows that both sides have differ", merged.differing, merged.overlapping);
    }
    Ok(Format::Object.to_json(&merged.rows, 0)?)
}

fn is_segments(value: &Value) -> bool {
    matches!(value, Value::Array(items) if items.first().is_some_and(|item| item.get("field").is_some()))
}

#[derive(Deserialize)]
struct Turns {
    turns: Vec<TurnFields>,
}

#[derive(Deserialize)]
struct TurnFields {
    prompt_ids: Vec<u32>,
    #[serde(default)]
    completion_ids: Vec<u32>,
    #[serde(default)]
    routed_experts: Value,
    #[serde(default)]
    routed_experts_start: Value,
}

fn stitched(args: &StitchArgs) -> Result<String> {
    let import = args.import.import(false);
    let read = Turns::deserialize(read(&args.turns)?).context("the turns are malformed")?;
    let turn = |(index, fields): (usize, TurnFields)| {
        let payload = json!({
            "routed_experts": fields.routed_experts, "routed_experts_start": fields.routed_experts_start,
        });
        let rows = import.read(&payload).with_context(|| format!("turn {index}"))?;
        anyhow::Ok(Turn { prompt_ids: fields.prompt_ids, completion_ids: fields.completion_ids, rows })
    };
    let turns = read.turns.into_iter().enumerate().map(turn).collect::<Result<Vec<_>>>()?;
    let stitched = stitch(&turns)?;
    if stitched.differing > 0 {
        eprintln!("{} rows came again and differ; the first ones stay", stitched.differing);
    }
    let mut branches = Vec::new();
    for branch in &stitched.branches {
        let rows = branch.rows.as_ref().map_or(Ok("null".into()), |rows| Format::Object.to_json(rows, 0))?;
        let token_ids = serde_json::to_string(&branch.token_ids)?;
        branches.push(format!(r#"{{"token_ids":{token_ids},"routed_experts":{rows}}}"#));
    }
    Ok(format!(r#"{{"branches":[{}]}}"#, branches.join(",")))
}

fn converted(args: &ConvertArgs) -> Result<String> {
    match args.import.import(true).read(&read(&args.file)?)? {
        None => Ok("null".into()),
        Some(rows) => Ok(args.to.to_json(&rows, args.num_experts.unwrap_or(0))?),
    }
}

fn stats(args: &StatsArgs) -> Result<String> {
    match args.import.import(true).read(&read(&args.file)?)? {
        None => Ok("null".into()),
        Some(rows) => Ok(serde_json::to_string(&RoutingStats::new(&rows))?),
    }
}

/// Reads `--overlap`.
pub fn parse_overlap(name: &str) -> Result<Overlap, String> {
    Overlap::from_name(name).ok_or_else(|| "expected first, last or strict".to_owned())
}

/// Reads `--to` and `--from`.
pub fn parse_format(name: &str) -> Result<Format, String> {
    // Dynamo's is the object form in another place.
    let format = if name == "dynamo" { Some(Format::Object) } else { Format::from_name(name) };
    format.ok_or_else(|| format!("expected one of {}, dynamo", Format::ALL.map(Format::name).join(", ")))
}

/// Reads `--shape`.
pub fn parse_shape(text: &str) -> Result<[usize; 3], String> {
    format::parse_shape(text).ok_or_else(|| "expected ROWSxLAYERSxTOP_K".to_owned())
}
