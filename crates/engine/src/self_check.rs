//! At start: does the router write every cell of every row, and do the ids make sense?

use moetrail_capture::{CaptureRing, Cells, RingLayout};
use moetrail_kernels::{RingCells, SeqSpan};
use moetrail_models::{Decoder, Ring, StepInput};

/// Tokens forwarded by the check.
const NUM_TOKENS: usize = 48;

/// Why capture cannot be trusted with this model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SelfCheckError {
    /// The forward itself failed.
    #[error("self-check: the forward pass failed: {0}")]
    Forward(String),
    /// A cell kept what was in the ring before.
    #[error("self-check: layer {layer} does not write the routed experts of token {token}")]
    NotWritten {
        /// Decoder index of the layer.
        layer: usize,
        /// Row of the check.
        token: usize,
    },
    /// An id is out of range.
    #[error("self-check: layer {layer} routes token {token} to expert {id}, there are {num_experts}")]
    OutOfRange {
        /// Decoder index of the layer.
        layer: usize,
        /// Row of the check.
        token: usize,
        /// The id.
        id: u16,
        /// Number of experts.
        num_experts: usize,
    },
    /// An id occurs twice in one cell.
    #[error("self-check: layer {layer} routes token {token} to {ids:?}: an expert occurs twice")]
    Repeated {
        /// Decoder index of the layer.
        layer: usize,
        /// Row of the check.
        token: usize,
        /// The ids.
        ids: Vec<u16>,
    },
    /// No layer's routing depends on the token.
    #[error("self-check: every layer routes all {NUM_TOKENS} tokens alike; the router's input or weights are broken")]
    Constant,
}

/// Forwards the same tokens twice over scratch KV and a ring filled with two different patterns.
///
/// Equal rows mean that every cell was written. Returns the layers that route all tokens alike (worth a warning).
///
/// # Errors
/// [`SelfCheckError`] if rows could be wrong.
pub(crate) fn self_check(decoder: &Decoder, layout: &RingLayout) -> Result<Vec<usize>, SelfCheckError> {
    let rows = forward(decoder, layout, 0)?;
    let other = forward(decoder, layout, u16::MAX)?;
    check(layout, &rows, &other, decoder.config().num_experts)
}

fn check(layout: &RingLayout, rows: &[u16], other: &[u16], num_experts: usize) -> Result<Vec<usize>, SelfCheckError> {
    let (top_k, moe_layers) = (layout.top_k(), layout.moe_layers());
    let row_len = top_k * moe_layers.len();
    let mut constant = Vec::new();
    for (index, &layer) in moe_layers.iter().enumerate() {
        let cell = |rows: &[u16], token: usize| -> Vec<u16> {
            let first = token * row_len + index * top_k;
            rows[first..first + top_k].to_vec()
        };
        for token in 0..rows.len() / row_len {
            let ids = cell(rows, token);
            if ids != cell(other, token) {
                return Err(SelfCheckError::NotWritten { layer, token });
            }
            if let Some(&id) = ids.iter().find(|id| usize::from(**id) >= num_experts) {
                return Err(SelfCheckError::OutOfRange { layer, token, id, num_experts });
            }
            if (1..top_k).any(|k| ids[..k].contains(&ids[k])) {
                return Err(SelfCheckError::Repeated { layer, token, ids });
            }
        }
        // As sets: with all experts chosen, a set says nothing.
        let set = |token| {
            let mut ids = cell(rows, token);
            ids.sort_unstable();
            ids
        };
        if (1..rows.len() / row_len).all(|token| set(token) == set(0)) {
            constant.push(layer);
        }
    }
    if top_k < num_experts && !moe_layers.is_empty() && constant.len() == moe_layers.len() {
        return Err(SelfCheckError::Constant);
    }
    Ok(constant)
}

/// The rows of `NUM_TOKENS` tokens spread over the vocabulary, `[tokens, moe_layers, top_k]`.
fn forward(decoder: &Decoder, layout: &RingLayout, pattern: u16) -> Result<Vec<u16>, SelfCheckError> {
    let failed = |error: &dyn std::fmt::Display| SelfCheckError::Forward(error.to_string());
    let config = decoder.config();
    let num_tokens = NUM_TOKENS.min(decoder.max_positions());
    let mut ring = match decoder.gpu() {
        None => CaptureRing::new(layout.clone(), 1, num_tokens),
        Some(gpu) => {
            let staging = 2 * num_tokens * (layout.row_bytes() + 8) + 1024;
            CaptureRing::on_device(gpu, layout.clone(), 1, num_tokens, staging).map_err(|error| failed(&error))?
        }
    };
    match ring.cells_mut() {
        Cells::U8(cells) => cells.fill(pattern as u8),
        Cells::U16(cells) => cells.fill(pattern),
        Cells::Device(cells) => cells.ring().fill(pattern as u8).map_err(|error| failed(&error))?,
    }
    let mut kv = decoder.new_kv(1, num_tokens).map_err(|error| failed(&error))?;
    let stride = (config.vocab_size / num_tokens).max(1);
    let token_ids: Vec<u32> = (0..num_tokens).map(|i| (i * stride % config.vocab_size) as u32).collect();
    let positions: Vec<u32> = (0..num_tokens as u32).collect();
    let input = StepInput {
        token_ids: &token_ids,
        positions: &positions,
        slot_mapping: &positions,
        seqs: &[SeqSpan { rows: 0..num_tokens, first_position: 0, block_table: &[0] }],
        logit_rows: &[],
        replay: None,
        awaited: None,
    };
    decoder.forward(&input, &mut kv, Some(ring_cells(&mut ring))).map_err(|error| failed(&error))?;
    ring.ids(0..num_tokens).map_err(|error| failed(&error))
}

/// The ring as the decoder takes it.
pub(crate) fn ring_cells(ring: &mut CaptureRing) -> Ring<'_> {
    match ring.cells_mut() {
        Cells::U8(cells) => Ring::Host(RingCells::U8(cells)),
        Cells::U16(cells) => Ring::Host(RingCells::U16(cells)),
        Cells::Device(cells) => Ring::Device(cells.ring()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(rows: &[u16], other: &[u16], num_experts: usize) -> String {
        let layout = RingLayout::new(3, vec![0, 2], 2, num_experts);
        check(&layout, rows, other, num_experts).map_or_else(|error| error.to_string(), |layers| format!("{layers:?}"))
    }

    #[test]
    fn every_fault_is_named() {
        let good = [0, 1, 2, 3, 1, 2, 3, 0];
        assert_eq!(message(&good, &good, 4), "[]");
        let mut unwritten = good;
        unwritten[7] = 9;
        let text = message(&good, &unwritten, 4);
        assert_eq!(text, "self-check: layer 2 does not write the routed experts of token 1");
        assert_eq!(message(&good, &good, 3), "self-check: layer 2 routes token 0 to expert 3, there are 3");
        let twice = [0, 1, 2, 3, 1, 1, 3, 0];
        assert_eq!(message(&twice, &twice, 4), "self-check: layer 0 routes token 1 to [1, 1]: an expert occurs twice");
    }

    #[test]
    fn one_constant_layer_is_a_warning_all_are_an_error() {
        let one = [0, 1, 2, 3, 1, 0, 3, 0];
        assert_eq!(message(&one, &one, 4), "[0]");
        let all = [0, 1, 2, 3, 1, 0, 3, 2];
        assert!(message(&all, &all, 4).starts_with("self-check: every layer routes all"));
        // Where all experts are chosen, routing cannot vary.
        let full = [0, 1, 0, 1, 1, 0, 1, 0];
        assert_eq!(message(&full, &full, 2), "[0, 2]");
    }
}
