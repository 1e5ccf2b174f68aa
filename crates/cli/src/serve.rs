//! `moetrail serve`: the HTTP server.

use std::io::Write;

use anyhow::{Context, Result};
use moetrail_api::{DefaultSampling, RowsFormat};
use moetrail_engine::EngineConfig;
use moetrail_models::Checkpoint;

use crate::args::ServeArgs;
use crate::load::start;

/// Serves until SIGTERM or ctrl-c, then lets running requests finish.
pub fn serve(args: &ServeArgs) -> Result<()> {
    let rows_format = args
        .routed_experts_format
        .as_deref()
        .map(|name| RowsFormat::from_name(name).with_context(|| format!("--routed-experts-format is {name:?}")))
        .transpose()?;
    // Binding first: a port in use is known before the model is loaded.
    let listener = std::net::TcpListener::bind((args.host, args.port))
        .with_context(|| format!("cannot listen on {}:{}", args.host, args.port))?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let config = EngineConfig {
        served_model_names: args.served_model_name.clone(),
        max_num_seqs: args.max_num_seqs,
        max_num_batched_tokens: args.max_num_batched_tokens,
        block_size: args.block_size,
        num_blocks: args.num_gpu_blocks_override,
        enable_prefix_caching: !args.no_enable_prefix_caching,
        swap_space: (args.swap_space * f64::from(1 << 30)) as usize,
        reprefill_routing: args.reprefill_routing,
        verify_reprefill: args.verify_reprefill,
        expert_load_metrics: args.expert_load_metrics,
        return_routed_experts: args.enable_return_routed_experts,
        max_queued_requests: args.max_queued_requests,
        max_logprobs: args.max_logprobs,
        ..EngineConfig::default()
    };
    let loaded = start(&args.model, config)?;
    let state = moetrail_server::AppState::new(
        loaded.engine.handle(),
        default_sampling(&loaded.checkpoint),
        rows_format,
        args.api_key.clone(),
    );
    // The engine thread computes; two workers are plenty for parsing and sending.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        println!("listening on http://{address}");
        std::io::stdout().flush()?;
        moetrail_server::serve(listener, state, shutdown_signal()).await
    })?;
    loaded.engine.shutdown();
    Ok(())
}

/// The checkpoint's own sampling defaults.
pub fn default_sampling(checkpoint: &Checkpoint) -> DefaultSampling {
    let (generation, plain) = (checkpoint.generation(), DefaultSampling::default());
    let or = |value: Option<f64>, default: f32| value.map_or(default, |value| value as f32);
    DefaultSampling {
        temperature: or(generation.temperature, plain.temperature),
        top_p: or(generation.top_p, plain.top_p),
        top_k: generation.top_k.unwrap_or(plain.top_k),
        min_p: or(generation.min_p, plain.min_p),
        repetition_penalty: or(generation.repetition_penalty, plain.repetition_penalty),
    }
}

async fn shutdown_signal() {
    let interrupt = async { tokio::signal::ctrl_c().await.ok() };
    #[cfg(unix)]
    let terminate = async {
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(mut signal) => signal.recv().await,
            Err(_) => std::future::pending().await,
        }
    };
    #[cfg(not(unix))]
    let terminate = std::future::pending::<Option<()>>();
    tokio::select! {
        _ = interrupt => {}
        _ = terminate => {}
    }
    tracing::info!("shutting down: running requests finish, new ones are refused");
}
