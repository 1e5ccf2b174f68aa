//! What a checkpoint's files hold, without loading them.

use crate::checkpoint::Checkpoint;

/// The tensors of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contents {
    /// How many there are.
    pub tensors: usize,
    /// Their bytes.
    pub bytes: u64,
    /// What they are stored as, sorted, each once.
    pub types: Vec<String>,
    /// Numbers in them.
    pub parameters: u64,
    /// Those that a token is computed with: of the experts, the chosen ones.
    pub active_parameters: u64,
}

impl Checkpoint {
    /// Counts what the files hold. Of dummy weights there are none.
    pub fn contents(&self) -> Contents {
        let shards = self.shards();
        let stored = || shards.names().filter_map(|name| shards.get(name));
        let parameters: u64 =
            stored().map(|tensor| tensor.shape().iter().map(|size| *size as u64).product::<u64>()).sum();
        let config = self.config();
        let expert = 3 * config.hidden_size as u64 * config.moe_intermediate_size as u64;
        let idle = config.num_experts.saturating_sub(config.num_experts_per_tok) * config.moe_layers.len();
        let mut types: Vec<String> = stored().map(|tensor| tensor.dtype().to_string()).collect();
        types.sort();
        types.dedup();
        Contents {
            tensors: stored().count(),
            bytes: shards.bytes(),
            types,
            parameters,
            active_parameters: parameters.saturating_sub(idle as u64 * expert),
        }
    }
}
