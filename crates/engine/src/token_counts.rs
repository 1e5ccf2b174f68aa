//! What a choice has said so far: the state that penalties read.

use rustc_hash::{FxHashMap, FxHashSet};

use crate::sampling::SamplingParams;

/// Prompt tokens as a set, output tokens counted. Empty while no penalty is set.
#[derive(Debug, Clone, Default)]
pub(crate) struct TokenCounts {
    prompt: FxHashSet<u32>,
    output: FxHashMap<u32, u32>,
    active: bool,
}

/// Whether a penalty is set.
pub(crate) fn penalises(params: &SamplingParams) -> bool {
    params.repetition_penalty != 1.0 || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0
}

impl TokenCounts {
    pub(crate) fn new(params: &SamplingParams, prompt: &[u32]) -> Self {
        let repetition = params.repetition_penalty != 1.0;
        let prompt = if repetition { prompt.iter().copied().collect() } else { FxHashSet::default() };
        Self { prompt, output: FxHashMap::default(), active: penalises(params) }
    }

    /// Whether a penalty is set.
    pub(crate) fn is_active(&self) -> bool {
        self.active
    }

    pub(crate) fn push(&mut self, token: u32) {
        if self.active {
            *self.output.entry(token).or_default() += 1;
        }
    }

    /// Applies the three penalties as vLLM does: repetition over prompt and output, the others over output.
    pub(crate) fn penalise(&self, params: &SamplingParams, logits: &mut [f32]) {
        if !self.active {
            return;
        }
        let repeat = |logit: &mut f32| {
            *logit = if *logit > 0.0 { *logit / params.repetition_penalty } else { *logit * params.repetition_penalty };
        };
        for token in self.prompt.iter().filter(|token| !self.output.contains_key(token)) {
            repeat(&mut logits[*token as usize]);
        }
        for (token, count) in &self.output {
            let logit = &mut logits[*token as usize];
            repeat(logit);
            *logit -= params.frequency_penalty * *count as f32 + params.presence_penalty;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn penalties_as_in_vllm() {
        let params = SamplingParams {
            repetition_penalty: 2.0,
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            ..SamplingParams::default()
        };
        let mut counts = TokenCounts::new(&params, &[0, 1]);
        [1, 2, 2].iter().for_each(|token| counts.push(*token));
        let mut logits = [4.0, -4.0, 2.0, 1.0];
        counts.penalise(&params, &mut logits);
        assert_eq!(logits, [2.0, -8.0 - 0.75, 1.0 - 1.0, 1.0]);
    }
}
