//! `moetrail routes`: rows as files.

use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

/// Standard output of a success, or the one line of a refusal.
fn routes(args: &[&str], input: &Value) -> Result<Value, String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moetrail"));
    command.arg("routes").args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("it runs");
    // A refusal of the arguments may come before the input is read.
    let _ = child.stdin.take().expect("piped").write_all(input.to_string().as_bytes());
    let output = child.wait_with_output().expect("it ends");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    if output.status.success() {
        return Ok(serde_json::from_str(&text(output.stdout)).expect("JSON"));
    }
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0));
    let error = text(output.stderr);
    assert_eq!(error.lines().count(), 1, "{error}");
    Err(error)
}

fn file(folder: &tempfile::TempDir, name: &str, payload: &Value) -> String {
    let path = folder.path().join(name);
    std::fs::write(&path, payload.to_string()).expect("it can be written");
    path.to_string_lossy().into_owned()
}

fn object(start: usize, ids: &[u8]) -> Value {
    use base64::Engine as _;
    let data = base64::engine::general_purpose::STANDARD.encode(ids);
    json!({"data": data, "shape": [ids.len() / 2, 1, 2], "start": start, "dtype": "uint8"})
}

#[test]
fn prefill_and_decode_are_merged() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let prefill = file(&folder, "prefill.json", &object(2, &[1, 2, 3, 4]));
    let merge = |decode: &Value, args: &[&str]| routes(&[&["merge", &prefill, "-"], args].concat(), decode);
    assert_eq!(merge(&object(4, &[5, 6]), &[]), Ok(object(2, &[1, 2, 3, 4, 5, 6])));
    assert_eq!(merge(&object(3, &[9, 9, 5, 6]), &[]), Ok(object(2, &[1, 2, 3, 4, 5, 6])));
    assert_eq!(merge(&object(3, &[9, 9, 5, 6]), &["--overlap", "last"]), Ok(object(2, &[1, 2, 9, 9, 5, 6])));
    let refused = |decode: &Value, args: &[&str], part: &str| {
        let error = merge(decode, args).expect_err(part);
        assert!(error.contains(part), "{error}");
    };
    refused(&object(3, &[9, 9]), &["--overlap", "strict"], "1 of 1 rows that both sides have differ");
    refused(&object(5, &[5, 6]), &[], "rows [4, 5) are missing");
    refused(&Value::Null, &[], "decode has no rows");
    refused(&json!({"data": "AQI=", "shape": [1, 1, 2], "dtype": "uint8"}), &[], "start: it is missing");
    let null = file(&folder, "null.json", &Value::Null);
    assert_eq!(routes(&["merge", &null, &null], &Value::Null), Ok(Value::Null));
    assert!(routes(&["merge", "/nonexistent", &null], &Value::Null).is_err_and(|e| e.contains("/nonexistent")));
    // By reference.
    let segment = |pos: usize, rows: usize, offset: usize| json!({"field": "routed_experts", "file": "f", "offset": offset, "pos": pos, "rows": rows, "dtype": "uint8", "shape": [1, 2]});
    let first = file(&folder, "segments.json", &json!([segment(0, 4, 0)]));
    let merged = routes(&["merge", &first, "-"], &json!([segment(3, 2, 100)]));
    assert_eq!(merged, Ok(json!([segment(0, 4, 0), segment(4, 1, 102)])));
}

#[test]
fn turns_are_stitched() {
    let turn = |prompt: &[u32], completion: &[u32], rows: Value| json!({"prompt_ids": prompt, "completion_ids": completion, "routed_experts": rows});
    let stitch = |turns: Value| routes(&["stitch", "-"], &json!({ "turns": turns }));
    let first = turn(&[1, 2], &[3], object(0, &[1, 2, 3, 4]));
    let second = turn(&[1, 2, 3, 4], &[5], object(2, &[5, 6, 7, 8]));
    let branch = json!({"token_ids": [1, 2, 3, 4, 5], "routed_experts": object(0, &[1, 2, 3, 4, 5, 6, 7, 8])});
    assert_eq!(stitch(json!([first, second])), Ok(json!({"branches": [branch]})));
    let gap = turn(&[1, 2, 3, 4], &[5], object(3, &[7, 8]));
    assert!(stitch(json!([first, gap])).is_err_and(|error| error.contains("turn 1: rows [2, 3) are missing")));
    let none = stitch(json!([turn(&[1], &[2], Value::Null)]));
    assert_eq!(none, Ok(json!({"branches": [{"token_ids": [1, 2], "routed_experts": null}]})));
    assert!(stitch(json!(7)).is_err());
}

#[test]
fn every_format_is_converted_to_every_other() {
    let rows = object(0, &[1, 2, 3, 4, 250, 6]);
    let formats = ["object", "npy", "sglang", "list", "nemo", "skyrl"];
    for from in formats {
        let given = routes(&["convert", "--to", from], &rows).expect(from);
        for to in formats {
            let args = ["convert", "--to", to, "-", "--shape", "3x1x2"];
            assert_eq!(routes(&args, &given), routes(&["convert", "--to", to], &rows), "{from} to {to}");
        }
    }
    let moved = routes(&["convert", "--to", "object", "--start", "7"], &json!([[[1, 2]]]));
    assert_eq!(moved, Ok(object(7, &[1, 2])));
    let nemo = routes(&["convert", "--to", "nemo", "--num-experts", "300"], &object(0, &[1, 2])).expect("nemo");
    assert!(nemo.as_str().is_some_and(|text| text.starts_with("nrlre1:int16:2x1x2:")));
    assert!(routes(&["convert", "--to", "nemo"], &object(1, &[1, 2])).is_err_and(|error| error.contains("start")));
    assert!(routes(&["convert", "--to", "object"], &json!("AQAAAA==")).is_err_and(|error| error.contains("shape")));
    assert_eq!(routes(&["convert", "--to", "npy"], &Value::Null), Ok(Value::Null));
    let stats = routes(&["stats", "-"], &rows).expect("stats");
    assert_eq!((&stats["rows"], &stats["layers"][0]["experts_used"]), (&json!(3), &json!(6)));
}
