//! How the next token is chosen: vLLM's `SamplingParams`, resolved (no field is optional for want of a default).

/// Sampling settings of one request, already validated and with every default resolved.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Number of choices for the prompt, at least 1.
    pub n: usize,
    /// Tokens to generate at most, per choice; 0 scores the prompt alone.
    pub max_tokens: usize,
    /// EOS and stop tokens cannot be sampled before this many tokens.
    pub min_tokens: usize,
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus mass in `(0, 1]`; 1 is off.
    pub top_p: f32,
    /// Number of candidates kept; 0 is off.
    pub top_k: usize,
    /// Candidates below `min_p` times the best probability are dropped; 0 is off.
    pub min_p: f32,
    /// Seed of the counter-based generator; `None` draws one.
    pub seed: Option<u64>,
    /// Over prompt and output tokens; 1 is off.
    pub repetition_penalty: f32,
    /// Over output tokens; 0 is off.
    pub presence_penalty: f32,
    /// Over output tokens; 0 is off.
    pub frequency_penalty: f32,
    /// Added to the logits of the named tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// If set, only these tokens can be sampled.
    pub allowed_token_ids: Option<Vec<u32>>,
    /// Strings that end a choice; they cut its text only, never its tokens.
    pub stop: Vec<String>,
    /// Whether the stop string itself stays in the text.
    pub include_stop_str_in_output: bool,
    /// Tokens that end a choice besides the model's EOS tokens.
    pub stop_token_ids: Vec<u32>,
    /// Do not stop at the model's EOS tokens.
    pub ignore_eos: bool,
    /// Number of alternatives to report with each output token, besides the sampled one.
    pub logprobs: Option<usize>,
    /// Number of alternatives to report with each prompt token, besides the token itself.
    pub prompt_logprobs: Option<usize>,
    /// Whether text is produced at all; token ids always are.
    pub detokenize: bool,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: bool,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            n: 1,
            max_tokens: 16,
            min_tokens: 0,
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: None,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            allowed_token_ids: None,
            stop: Vec::new(),
            include_stop_str_in_output: false,
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            prompt_logprobs: None,
            detokenize: true,
            skip_special_tokens: true,
        }
    }
}
