//! `moetrail doctor`: is this machine fit to serve?

use std::time::Instant;

use anyhow::Result;
use moetrail_engine::{EngineConfig, Event};
use moetrail_kernels::gpu::Gpu;
use moetrail_kernels::{Form, pool};

use crate::args::DoctorArgs;
use crate::{load, probe};

/// Prints what was found, one line each; fails at the first thing that does not work.
pub fn doctor(args: &DoctorArgs) -> Result<()> {
    load::configure_kernels(&args.model)?;
    println!("moetrail    {}", env!("CARGO_PKG_VERSION"));
    println!("machine     {} {}", std::env::consts::ARCH, std::env::consts::OS);
    println!("kernels     {:?} (available: {:?})", Form::current(), Form::available());
    println!("threads     {}", pool::threads());
    let gpu = load::device(&args.model)?;
    println!("device      {}", device(gpu.as_ref()));

    let loaded = load::start_on(gpu, &args.model, EngineConfig { num_blocks: Some(256), ..EngineConfig::default() })?;
    let model = loaded.checkpoint.config();
    let (handle, decoder_layers) = (loaded.engine.handle(), model.num_hidden_layers);
    println!(
        "model       {}: {}, {decoder_layers} layers ({} MoE), top-{} of {} experts, {} tokens",
        handle.info().model_name,
        model.architecture,
        model.moe_layers.len(),
        model.num_experts_per_tok,
        model.num_experts,
        handle.info().max_model_len,
    );
    println!("tokenizer   {}", if handle.info().tokenizer.is_some() { "ok" } else { "none: token ids only" });
    println!("capture     {}", if handle.info().row_layout.is_some() { "ok (self-check passed)" } else { "off" });

    let tokens = 32.min(handle.info().max_model_len - 1);
    let began = Instant::now();
    let mut stream = handle.submit(probe::greedy(vec![0], tokens, handle.info().row_layout.is_some()))?;
    let mut rows = None;
    while let Some(event) = stream.blocking_next() {
        match event {
            Event::Failed(error) => anyhow::bail!(error),
            Event::Choice(delta) => rows = rows.or(delta.finish.and_then(|finish| finish.routed_experts)),
            Event::Prompt(_) => {}
        }
    }
    println!("generation  ok: {tokens} tokens, {:.0} tokens/s", tokens as f64 / began.elapsed().as_secs_f64());
    if let Some(rows) = rows {
        println!("rows        ok: {:?}", rows?.shape());
    }
    drop(stream);
    loaded.engine.shutdown();
    Ok(())
}

fn device(gpu: Option<&Gpu>) -> String {
    match gpu.map(Gpu::driver) {
        None if cfg!(feature = "cuda") => "cpu".to_owned(),
        None => "cpu (this build has no CUDA support)".to_owned(),
        Some(driver) => {
            let [free, total] = driver.memory().unwrap_or_default().map(|bytes| bytes >> 20);
            format!(
                "{}, compute capability {}, {} multiprocessors, {free} of {total} MiB free",
                driver.name(),
                driver.capability(),
                driver.multiprocessors()
            )
        }
    }
}
