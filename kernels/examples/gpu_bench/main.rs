//! Speeds of the GPU kernels on the shapes of Qwen3-30B-A3B, beside what the device copies.
//!
//! `gpu_bench cuda|emulation [--tiny] [PART ...]`; prints one JSON object. A measure is a recorded graph of equal calls, over
//! weights that take turns so that no cache holds them: time is the median of its launches, divided by the calls. `--tiny`
//! takes small shapes, for the emulation and for the sanitizers.

mod attention;
mod bench;
mod copy;
mod experts;
mod launch;
mod linear;
mod norm;
mod ring;
mod router;
mod sizes;

use moetrail_kernels::gpu::cuda;

use crate::bench::Bench;

const PARTS: [&str; 8] = ["copy", "launch", "linear", "experts", "attention", "router", "ring", "norm"];

fn main() {
    let mut words = std::env::args().skip(1).peekable();
    let device = words.next().unwrap_or_default();
    let tiny = words.next_if(|word| word == "--tiny").is_some();
    let wanted: Vec<String> = words.collect();
    let gpu = match device.as_str() {
        "cuda" => cuda::open(0).unwrap_or_else(|error| fail(&error.to_string())),
        "emulation" => moetrail_emulation::gpu(0, 1 << 30).unwrap_or_else(|| fail("no kernels to emulate")),
        _ => fail("gpu_bench cuda|emulation [--tiny] [PART ...]"),
    };
    if let Some(word) = wanted.iter().find(|word| !PARTS.contains(&word.as_str())) {
        fail(&format!("{word:?} is none of {}", PARTS.join(", ")));
    }
    let mut bench = Bench::new(&gpu, tiny);
    for part in PARTS {
        // Every share is of the copy.
        if part != "copy" && !wanted.is_empty() && !wanted.iter().any(|word| word == part) {
            continue;
        }
        let done = match part {
            "copy" => bench.copy(),
            "launch" => bench.launch(),
            "linear" => bench.linear(),
            "experts" => bench.experts(),
            "attention" => bench.attention(),
            "router" => bench.router(),
            "ring" => bench.ring(),
            _ => bench.norm(),
        };
        // The parts before it count all the same; after a fault the device answers nothing.
        if let Err(error) = done {
            bench.lines.push(format!("{{\"op\": \"{part}\", \"error\": {:?}}}", error.to_string()));
            break;
        }
    }
    let driver = gpu.driver();
    println!(
        "{{\"device\": {:?}, \"capability\": {}, \"multiprocessors\": {}, \"tiny\": {tiny}, \"copy_gb_s\": {:.1}, \"lines\": [\n{}\n]}}",
        driver.name(),
        driver.capability(),
        driver.multiprocessors(),
        bench.copied / 1e9,
        bench.lines.join(",\n")
    );
}

fn fail(message: &str) -> ! {
    eprintln!("{message}");
    std::process::exit(2)
}
