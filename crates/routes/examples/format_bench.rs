//! How fast rows are written and read, beside a plain copy of the same bytes: `cargo run --release --example
//! format_bench`. Prints JSON; GB/s of rows, not of text. 32 768 rows of a Qwen3-30B-A3B (48 layers, top-8).

use std::time::Instant;

use moetrail_routes::format::{Format, Import};
use moetrail_routes::{ExpertDtype, ExpertRows, RowLayout};

const ROUNDS: usize = 11;

fn gigabytes_per_second(bytes: usize, mut work: impl FnMut()) -> f64 {
    let seconds = (0..ROUNDS).map(|_| {
        let began = Instant::now();
        work();
        began.elapsed().as_secs_f64()
    });
    let mut seconds: Vec<f64> = seconds.collect();
    seconds.sort_by(f64::total_cmp);
    bytes as f64 / seconds[ROUNDS / 2] / 1e9
}

fn main() {
    let layout = RowLayout { num_layers: 48, top_k: 8, dtype: ExpertDtype::U8 };
    let data: Vec<u8> = (0..32_768 * layout.row_bytes()).map(|i| (i * 7 % 128) as u8).collect();
    let bytes = data.len();
    let copy = gigabytes_per_second(bytes, || drop(std::hint::black_box(data.clone())));
    let rows = ExpertRows::new(0, layout, data).expect("whole rows");
    let mut lines = vec![format!(r#"{{"measure":"copy","gb_s":{copy:.2}}}"#)];
    for format in Format::ALL {
        // Into one buffer that is kept, as a body is: what is measured is the encoding.
        let mut out = Vec::with_capacity(bytes * 6);
        let write = gigabytes_per_second(bytes, || {
            out.clear();
            format.write_json(&rows, 128, &mut out).expect("writing to memory does not fail");
        });
        let value = serde_json::from_slice(&out).expect("JSON");
        let hints = Import { format: Some(format), shape: Some(rows.shape()), bare_skyrl: true, start: None };
        let read = gigabytes_per_second(bytes, || drop(std::hint::black_box(hints.read(&value).expect("rows"))));
        let name = format.name();
        lines.push(format!(r#"{{"format":"{name}","write_gb_s":{write:.2},"read_gb_s":{read:.2}}}"#));
    }
    println!("[\n{}\n]", lines.join(",\n"));
}
