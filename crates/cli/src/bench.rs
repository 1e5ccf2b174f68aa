//! `moetrail bench`: speed of the engine on this machine, without HTTP.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use moetrail_engine::{EngineConfig, EngineHandle, Event, GenerateRequest};
use moetrail_kernels::{Form, pool};
use serde_json::json;

use crate::args::BenchArgs;
use crate::load::start;
use crate::probe::greedy;

/// Prints one JSON object: every repetition of every measure, in tokens per second.
pub fn bench(args: &BenchArgs) -> Result<()> {
    let widest = args.batch.iter().copied().max().unwrap_or(1);
    let began = Instant::now();
    let config = EngineConfig {
        enable_prefix_caching: false,
        max_num_seqs: widest,
        max_num_batched_tokens: args.max_num_batched_tokens,
        ..EngineConfig::default()
    };
    let loaded = start(&args.model, config)?;
    let load_seconds = began.elapsed().as_secs_f64();
    let handle = loaded.engine.handle();
    let rows = !args.model.no_capture;
    let mut results = Vec::new();
    for &length in &args.prompt_len {
        let mut rates = Vec::new();
        for rep in 0..=args.reps {
            let elapsed = prefill(&handle, length, rep, rows)?;
            // The first run warms caches and memory up.
            if rep > 0 {
                rates.push(length as f64 / elapsed.as_secs_f64());
            }
        }
        results.push(json!({"measure": "prefill", "tokens": length, "tokens_per_second": rates}));
    }
    for &batch in &args.batch {
        let mut rates = Vec::new();
        for rep in 0..=args.reps {
            let elapsed = decode(&handle, batch, args, rep, rows)?;
            if rep > 0 {
                rates.push((batch * (args.gen_len - 1)) as f64 / elapsed.as_secs_f64());
            }
        }
        results.push(json!({
            "measure": "decode",
            "batch": batch,
            "context": args.context,
            "tokens": args.gen_len,
            "tokens_per_second": rates,
        }));
    }
    let report = json!({
        "model": handle.info().model_name,
        "kernels": format!("{:?}", Form::current()),
        "threads": pool::threads(),
        "capture": rows,
        "load_seconds": load_seconds,
        "results": results,
    });
    println!("{report}");
    loaded.engine.shutdown();
    Ok(())
}

fn request(handle: &EngineHandle, prompt_len: usize, max_tokens: usize, salt: usize, rows: bool) -> GenerateRequest {
    let vocab = handle.info().vocab_size;
    // Spread over the vocabulary; which tokens they are does not matter to a kernel, that they differ does.
    let prompt = (0..prompt_len).map(|i| ((i * 7919 + salt * 104_729) % vocab) as u32).collect();
    greedy(prompt, max_tokens, rows)
}

/// Time from submission to the first token.
fn prefill(handle: &EngineHandle, length: usize, salt: usize, rows: bool) -> Result<Duration> {
    let began = Instant::now();
    let mut stream = handle.submit(request(handle, length, 1, salt, rows))?;
    while let Some(event) = stream.blocking_next() {
        if let Event::Failed(error) = event {
            bail!(error);
        }
    }
    Ok(began.elapsed())
}

/// Time from the step in which the last of `batch` sequences got its first token to the end of all.
fn decode(handle: &EngineHandle, batch: usize, args: &BenchArgs, salt: usize, rows: bool) -> Result<Duration> {
    let mut streams = (0..batch)
        .map(|i| Ok(handle.submit(request(handle, args.context, args.gen_len, salt * 1000 + i, rows))?))
        .collect::<Result<Vec<_>>>()?;
    for stream in &mut streams {
        while let Some(event) = stream.blocking_next() {
            match event {
                Event::Failed(error) => bail!(error),
                Event::Choice(_) => break,
                Event::Prompt(_) => {}
            }
        }
    }
    let began = Instant::now();
    for stream in &mut streams {
        while let Some(event) = stream.blocking_next() {
            if let Event::Failed(error) = event {
                bail!(error);
            }
        }
    }
    Ok(began.elapsed())
}
