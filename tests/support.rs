//! Engines over the golden checkpoints, and what a request to them gave.

use std::path::{Path, PathBuf};

use moetrail_engine::{
    ChoiceDelta, Engine, EngineConfig, EngineHandle, Event, Finish, GenerateRequest, PromptOutput, SamplingParams,
    TokenLogprobs,
};
use moetrail_models::{Checkpoint, DtypeChoice};

/// The folder of a golden checkpoint.
pub fn golden_folder(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(model)
}

/// An engine over a golden checkpoint, without a tokenizer.
pub fn engine(model: &str, dtype: DtypeChoice, config: EngineConfig) -> Engine {
    let checkpoint = Checkpoint::open_folder(&golden_folder(model), model).expect("the golden checkpoint opens");
    let decoder = checkpoint.load(dtype, false).expect("the golden checkpoint loads");
    Engine::start(decoder, None, checkpoint.eos_token_ids(), config).expect("the engine starts")
}

/// A greedy request that wants all rows.
pub fn greedy(prompt: &[u32], max_tokens: usize) -> GenerateRequest {
    GenerateRequest {
        prompt: prompt.into(),
        sampling: SamplingParams {
            max_tokens,
            temperature: 0.0,
            logprobs: Some(5),
            prompt_logprobs: Some(0),
            detokenize: false,
            ..SamplingParams::default()
        },
        routed_experts_start: Some(0),
        ..GenerateRequest::default()
    }
}

/// Everything that came of a request with one choice.
pub struct Reply {
    pub prompt: PromptOutput,
    pub tokens: Vec<u32>,
    pub logprobs: Vec<TokenLogprobs>,
    pub finish: Finish,
}

/// Runs a request of one choice to its end.
pub fn run(handle: &EngineHandle, request: GenerateRequest) -> Reply {
    let mut stream = handle.submit(request).expect("the request is valid");
    let (mut prompt, mut tokens, mut logprobs) = (PromptOutput::default(), Vec::new(), Vec::new());
    loop {
        match stream.blocking_next().expect("a request ends with a finish or a failure") {
            Event::Prompt(output) => prompt = output,
            Event::Failed(error) => panic!("the request failed: {error}"),
            Event::Choice(ChoiceDelta { token_ids, logprobs: new, finish, .. }) => {
                tokens.extend(token_ids);
                logprobs.extend(new);
                if let Some(finish) = finish {
                    return Reply { prompt, tokens, logprobs, finish };
                }
            }
        }
    }
}
