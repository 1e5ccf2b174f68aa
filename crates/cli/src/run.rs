//! `moetrail run`: one generation on the terminal.

use std::io::Write;

use anyhow::{Context, Result, bail};
use moetrail_engine::{EngineConfig, Event, GenerateRequest, SamplingParams};
use moetrail_text::{ChatPrompt, Tokenizer};
use serde_json::json;

use crate::args::RunArgs;
use crate::load::start;
use crate::serve::default_sampling;
use crate::summary;

/// Prints the continuation as it comes, then how it was routed.
pub fn run(args: &RunArgs) -> Result<()> {
    let config = EngineConfig { max_num_seqs: 1, ..EngineConfig::default() };
    let loaded = start(&args.model, config)?;
    let handle = loaded.engine.handle();
    let info = handle.info().clone();
    let tokenizer = info.tokenizer.as_ref().context("run needs a tokenizer, and the checkpoint has none")?;
    let prompt = encode(tokenizer, args)?;
    let defaults = default_sampling(&loaded.checkpoint);
    let room = info.max_model_len.saturating_sub(prompt.len());
    let request = GenerateRequest {
        sampling: SamplingParams {
            max_tokens: args.max_tokens.min(room),
            temperature: args.temperature.unwrap_or(defaults.temperature),
            top_p: defaults.top_p,
            top_k: defaults.top_k,
            min_p: defaults.min_p,
            repetition_penalty: defaults.repetition_penalty,
            seed: args.model.seed,
            ..SamplingParams::default()
        },
        prompt: prompt.into(),
        routed_experts_start: info.row_layout.map(|_| 0),
        ..GenerateRequest::default()
    };
    let prompt_len = request.prompt.len();
    let mut stream = handle.submit(request)?;
    let mut stdout = std::io::stdout();
    while let Some(event) = stream.blocking_next() {
        match event {
            Event::Prompt(_) => {}
            Event::Failed(error) => bail!(error),
            Event::Choice(delta) => {
                write!(stdout, "{}", delta.text)?;
                stdout.flush()?;
                let Some(finish) = delta.finish else { continue };
                writeln!(stdout)?;
                if let Some(rows) = finish.routed_experts {
                    let rows = rows?;
                    let model = loaded.checkpoint.config();
                    let [n, layers, top_k] = rows.shape();
                    println!(
                        "\n{n} rows of {layers} layers, top-{top_k} of {} experts ({prompt_len} prompt tokens; finish: {})",
                        model.num_experts,
                        finish.reason.as_str()
                    );
                    print!("{}", summary::table(&rows, model.num_experts, &model.moe_layers));
                }
            }
        }
    }
    drop(stream);
    loaded.engine.shutdown();
    Ok(())
}

fn encode(tokenizer: &Tokenizer, args: &RunArgs) -> Result<Vec<u32>> {
    if !args.raw
        && let Ok(template) = tokenizer.chat_template()
    {
        let messages = [json!({"role": "user", "content": args.prompt})];
        let chat = ChatPrompt { messages: &messages, add_generation_prompt: true, ..ChatPrompt::default() };
        // The template writes the special tokens itself.
        return Ok(tokenizer.encode(&template.render(&chat)?, false)?);
    }
    Ok(tokenizer.encode(&args.prompt, true)?)
}
