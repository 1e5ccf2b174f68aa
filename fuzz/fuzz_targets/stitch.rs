#![no_main]

#[allow(dead_code, reason = "every target is in one file, which tests/corpus.rs includes, too")]
#[path = "../targets.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::stitch(data));
