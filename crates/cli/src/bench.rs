//! `moetrail bench`: speed of the engine on this machine, without HTTP.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use moetrail_engine::{EngineConfig, EngineHandle, Event, EventStream, GenerateRequest};
use moetrail_kernels::{Form, pool};
use serde_json::{Value, json};

use crate::args::BenchArgs;
use crate::load::load;
use crate::probe::greedy;

/// Prints one JSON object: every repetition of every measure, in tokens per second.
pub fn bench(args: &BenchArgs) -> Result<()> {
    let widest = args.batch.iter().copied().max().unwrap_or(1);
    let began = Instant::now();
    let config = EngineConfig {
        enable_prefix_caching: false,
        max_num_seqs: if args.mixed > 0 { widest.max(EngineConfig::default().max_num_seqs) } else { widest },
        max_num_batched_tokens: args.max_num_batched_tokens,
        num_blocks: (args.capture_pairs > 0).then(|| blocks_needed(args, widest)),
        ..EngineConfig::default()
    };
    let rows = !args.model.no_capture;
    let model = load(&args.model)?;
    let engine = model.start(&args.model, rows, config.clone())?;
    let load_seconds = began.elapsed().as_secs_f64();
    let handle = engine.handle();
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
        results.push(told(json!({"measure": "prefill", "tokens": length, "tokens_per_second": rates})));
    }
    for &batch in &args.batch {
        let mut rates = Vec::new();
        for rep in 0..=args.reps {
            let rate = decode_rate(&handle, batch, args, rep, rows)?;
            if rep > 0 {
                rates.push(rate);
            }
        }
        results.push(told(json!({
            "measure": "decode",
            "batch": batch,
            "context": args.context,
            "tokens": args.gen_len,
            "tokens_per_second": rates,
        })));
    }
    if args.mixed > 0 {
        let mut rates = Vec::new();
        for rep in 0..=args.reps {
            let (tokens, elapsed) = mixed(&handle, args.mixed)?;
            if rep > 0 {
                rates.push(tokens as f64 / elapsed.as_secs_f64());
            }
        }
        results.push(told(json!({"measure": "mixed", "requests": args.mixed, "tokens_per_second": rates})));
    }
    let pairs = match args.capture_pairs {
        0 => None,
        _ => {
            let other = model.start(&args.model, !rows, config)?;
            let pairs = match rows {
                true => capture_pairs(&handle, &other.handle(), args),
                false => capture_pairs(&other.handle(), &handle, args),
            };
            other.shutdown();
            Some(pairs?)
        }
    };
    let perplexity = args.score.map(|length| perplexity(&handle, length)).transpose()?;
    let (steps, steps_ahead) = handle.stats().num_steps();
    let report = json!({
        "perplexity": perplexity,
        "steps": steps,
        "steps_ahead": steps_ahead,
        "model": handle.info().model_name,
        "kernels": format!("{:?}", Form::current()),
        "threads": pool::threads(),
        "capture": rows,
        "load_seconds": load_seconds,
        "results": results,
        "capture_pairs": pairs,
    });
    println!("{report}");
    engine.shutdown();
    Ok(())
}

/// A measure, written to standard error too: whoever stops a long run has what was measured until then.
fn told(measure: Value) -> Value {
    eprintln!("{measure}");
    measure
}

/// Blocks for any of the measures. Where two engines share a device's memory, neither may take what is free.
fn blocks_needed(args: &BenchArgs, widest: usize) -> usize {
    let block = EngineConfig::default().block_size;
    // One more for what begins in the middle of a block.
    let blocks = |tokens: usize| tokens.div_ceil(block) + 1;
    let prefill = args.prompt_len.iter().map(|&length| blocks(length + 1)).max().unwrap_or(0);
    let decode = widest * blocks(args.context + args.gen_len);
    let mixed = args.mixed.min(EngineConfig::default().max_num_seqs.max(widest)) * blocks(32 + 480 + 16 + 112);
    let score = args.score.map_or(0, |length| blocks(length + 1));
    prefill.max(decode).max(mixed).max(score)
}

/// Every measure in pairs, with capture and without, alternately first: the rates of both, pair by pair.
///
/// Both engines have the same weights at the same places in memory, and the runs of a pair follow each other at once.
fn capture_pairs(on: &EngineHandle, off: &EngineHandle, args: &BenchArgs) -> Result<Vec<Value>> {
    let prefills = args.prompt_len.iter().map(|&length| ("prefill", length));
    let measures: Vec<_> = prefills.chain(args.batch.iter().map(|&batch| ("decode", batch))).collect();
    let mut rates = vec![[Vec::new(), Vec::new()]; measures.len()];
    // The first pair warms both engines up.
    for pair in 0..=args.capture_pairs {
        for (&(measure, count), rates) in measures.iter().zip(&mut rates) {
            for off_now in [pair % 2 == 0, pair % 2 == 1] {
                let handle = if off_now { off } else { on };
                let rate = match measure {
                    "prefill" => count as f64 / prefill(handle, count, pair, !off_now)?.as_secs_f64(),
                    _ => decode_rate(handle, count, args, pair, !off_now)?,
                };
                if pair > 0 {
                    rates[usize::from(off_now)].push(rate);
                }
            }
        }
    }
    let lines = measures.into_iter().zip(rates);
    Ok(lines
        .map(|((measure, count), [on, off])| json!({"measure": measure, "count": count, "on": on, "off": off}))
        .collect())
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
    finish(handle.submit(request(handle, length, 1, salt, rows))?)?;
    Ok(began.elapsed())
}

/// Waits for the end of a request.
fn finish(mut stream: EventStream) -> Result<()> {
    while let Some(event) = stream.blocking_next() {
        if let Event::Failed(error) = event {
            bail!(error);
        }
    }
    Ok(())
}

/// `count` requests of mixed lengths, all at once: the tokens they generate, and the time to the last.
fn mixed(handle: &EngineHandle, count: usize) -> Result<(usize, Duration)> {
    let began = Instant::now();
    let mut tokens = 0;
    let mut streams = Vec::with_capacity(count);
    for i in 0..count {
        let (prompt_len, max_tokens) = (32 + i * 97 % 480, 16 + i * 53 % 112);
        tokens += max_tokens;
        streams.push(handle.submit(request(handle, prompt_len, max_tokens, 1000 + i, false))?);
    }
    streams.into_iter().try_for_each(finish)?;
    Ok((tokens, began.elapsed()))
}

/// `exp` of the mean negative log-probability of a text's tokens after the first.
fn perplexity(handle: &EngineHandle, length: usize) -> Result<f64> {
    let mut request = request(handle, length, 1, 7, false);
    request.sampling.prompt_logprobs = Some(0);
    let mut stream = handle.submit(request)?;
    let mut total = 0.0;
    while let Some(event) = stream.blocking_next() {
        match event {
            Event::Failed(error) => bail!(error),
            Event::Prompt(prompt) => {
                let entries = prompt.prompt_logprobs.unwrap_or_default();
                total = entries.iter().flatten().map(|entry| f64::from(entry.logprob)).sum();
            }
            Event::Choice(_) => {}
        }
    }
    Ok((-total / (length as f64 - 1.0)).exp())
}

/// Tokens per second from the step in which the last of `batch` sequences got its first token to the end of all.
fn decode_rate(handle: &EngineHandle, batch: usize, args: &BenchArgs, salt: usize, rows: bool) -> Result<f64> {
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
    streams.into_iter().try_for_each(finish)?;
    Ok((batch * (args.gen_len - 1)) as f64 / began.elapsed().as_secs_f64())
}
