//! Decode steps as CUDA graphs: recorded once for a bucket of batch sizes and contexts, then launched with other numbers.

use std::collections::HashMap;
use std::sync::Arc;

use moetrail_kernels::gpu::{
    Address, AttentionLaunches, AttentionPlan, DecodeBucket, DeviceKv, DeviceRing, DeviceRows, Gpu, GpuError, Graph,
    Upload, attention_splits,
};

use crate::awaited::Awaited;
use crate::backend::GpuBackend;
use crate::backend::gpu_step::GpuStep;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::network::Network;
use crate::pending::PendingMarks;
use crate::replay::Replay;
use crate::step::StepInput;

/// Larger batches are launched one kernel after another: they have work enough for the device meanwhile.
const MOST_ROWS: usize = 256;

/// Recordings that are kept; each has some thousand nodes.
const MOST_RECORDINGS: usize = 96;

/// Contexts are rounded up to a power of two of at least this.
const LEAST_CONTEXT: usize = 512;

/// A slot that nothing is written to.
const NO_SLOT: u32 = u32::MAX;

/// The recorded steps of a decoder, by all that their launches depend on.
#[derive(Debug, Default)]
pub(crate) struct Recordings {
    entries: HashMap<Key, Entry>,
}

impl Recordings {
    /// How many steps are recorded.
    #[cfg(test)]
    pub(crate) fn recorded(&self) -> usize {
        self.entries.values().filter(|entry| matches!(entry, Entry::Recorded(_))).count()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    attention: AttentionLaunches,
    replay: bool,
    /// Address, blocks and slots of a block.
    kv: (Address, usize, usize),
    /// Address and slots.
    ring: Option<(Address, usize)>,
}

#[derive(Debug)]
enum Entry {
    /// Its bucket was met once.
    Met,
    Recorded(Box<Recording>),
}

#[derive(Debug)]
struct Recording {
    gpu: Gpu,
    graph: Graph,
    /// Where the graph reads a step's numbers: recordings do not share it, since it may move when it grows.
    upload: Upload,
    marks: Arc<moetrail_kernels::gpu::Scratch>,
    hidden: DeviceRows,
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.gpu.driver().drop_graph(self.graph);
    }
}

/// A decode step with rows that pad its bucket: they are computed, and written nowhere.
struct Padded {
    token_ids: Vec<u32>,
    positions: Vec<u32>,
    slots: Vec<u32>,
    logit_rows: Vec<u32>,
    replay: Option<(Vec<u32>, Vec<u16>)>,
    sources: Vec<u32>,
}

impl Network<GpuBackend> {
    /// As [`Network::hidden`], from a recording if the step has one row a sequence and wants the logits of all, in
    /// any order.
    pub(crate) fn hidden_recorded(
        &self,
        config: &ModelConfig,
        input: &StepInput<'_>,
        kv: &mut DeviceKv,
        ring: Option<&DeviceRing>,
    ) -> Result<(DeviceRows, PendingMarks)> {
        let num_rows = input.token_ids.len();
        let single = input.seqs.iter().all(|seq| seq.rows.len() == 1);
        let all = input.logit_rows.len() == num_rows;
        if !single || !all || num_rows > MOST_ROWS || input.seqs.len() != num_rows {
            return self.hidden(config, input, kv, ring);
        }
        let shape = config.attention_shape();
        let contexts = || input.seqs.iter().map(|seq| seq.first_position as usize + 1);
        let seqs = bucket(num_rows);
        let splits: usize =
            contexts().map(|context| attention_splits(&shape, context)).sum::<usize>() + seqs - num_rows;
        let context = contexts().max().unwrap_or(1).next_power_of_two().max(LEAST_CONTEXT);
        let splits = splits.next_power_of_two().max(seqs);
        let plan = AttentionPlan::decode(&shape, kv, input.seqs, &DecodeBucket { seqs, context, splits })?;
        let key = Key {
            attention: plan.launches(),
            replay: input.replay.is_some(),
            kv: (kv.k(0), kv.num_blocks(), kv.block_size()),
            ring: ring.map(|ring| (ring.address(), ring.num_slots())),
        };
        let mut recordings = self.backend.recordings.lock().unwrap_or_else(|poison| poison.into_inner());
        if !recordings.entries.contains_key(&key) {
            if recordings.entries.len() >= MOST_RECORDINGS {
                recordings.entries.clear();
            }
            recordings.entries.insert(key, Entry::Met);
            return self.hidden(config, input, kv, ring);
        }
        let padded = Padded::new(input, seqs, config);
        let input = padded.input(input);
        let entry = recordings.entries.get_mut(&key).expect("it was there");
        if let Entry::Met = entry {
            *entry = Entry::Recorded(Box::new(self.record(config, &input, kv, ring, plan.clone())?));
        }
        let Entry::Recorded(recording) = entry else { unreachable!("it was recorded") };
        let step = recording.step(&input, plan, ring, config)?;
        recording.gpu.driver().launch_graph(recording.graph)?;
        Ok((recording.hidden.slice(0, num_rows), PendingMarks::Device(step.marks(num_rows))))
    }

    fn record(
        &self,
        config: &ModelConfig,
        input: &StepInput<'_>,
        kv: &mut DeviceKv,
        ring: Option<&DeviceRing>,
        plan: AttentionPlan,
    ) -> Result<Recording> {
        let gpu = self.backend.gpu().clone();
        // As large as it will ever be, so that it stays where it is.
        let bytes = 8 * 16 + 4 * (6 * input.token_ids.len() + plan.words().len());
        let ids =
            input.replay.map_or(0, |_| input.token_ids.len() * config.moe_layers.len() * config.num_experts_per_tok);
        let mut upload = Upload::new(&gpu, bytes + 2 * ids)?;
        let marks = Arc::new(self.backend.arena.take(2 * input.token_ids.len() * 4)?);
        let mut step = GpuStep::new(&mut upload, marks.clone(), input, plan, ring, config.moe_layers.len())?;
        gpu.driver().begin_graph()?;
        let hidden = self.layers(&mut step, kv);
        // Also ended where a launch was refused.
        let graph = gpu.driver().end_graph()?;
        match hidden {
            Ok(hidden) => Ok(Recording { gpu, graph, upload, marks, hidden }),
            Err(error) => {
                gpu.driver().drop_graph(graph);
                Err(error)
            }
        }
    }
}

impl Recording {
    /// Issues the copy of a step's numbers to where the graph reads them.
    fn step<'a>(
        &mut self,
        input: &StepInput<'_>,
        plan: AttentionPlan,
        ring: Option<&'a DeviceRing>,
        config: &ModelConfig,
    ) -> Result<GpuStep<'a>> {
        let before = self.upload.address();
        let step = GpuStep::new(&mut self.upload, self.marks.clone(), input, plan, ring, config.moe_layers.len())?;
        match self.upload.address() == before {
            true => Ok(step),
            false => Err(GpuError::new("launch a recorded step", "its numbers have moved").into()),
        }
    }
}

impl Padded {
    fn new(input: &StepInput<'_>, rows: usize, config: &ModelConfig) -> Self {
        let extended = |values: &[u32], padding: u32| {
            let mut values = values.to_vec();
            values.resize(rows, padding);
            values
        };
        let row_len = config.moe_layers.len() * config.num_experts_per_tok;
        let replay = input.replay.map(|replay| {
            let mut ids = replay.ids.to_vec();
            ids.resize(rows * row_len, 0);
            (extended(replay.row_of, Replay::FREE), ids)
        });
        Self {
            token_ids: extended(input.token_ids, 0),
            positions: extended(input.positions, 0),
            slots: extended(input.slot_mapping, NO_SLOT),
            logit_rows: input.logit_rows.iter().copied().chain(input.token_ids.len() as u32..rows as u32).collect(),
            replay,
            sources: input.awaited.map_or(Vec::new(), |awaited| extended(awaited.sources, Awaited::KNOWN)),
        }
    }

    fn input<'a>(&'a self, input: &StepInput<'a>) -> StepInput<'a> {
        StepInput {
            token_ids: &self.token_ids,
            positions: &self.positions,
            slot_mapping: &self.slots,
            seqs: input.seqs,
            logit_rows: &self.logit_rows,
            replay: self.replay.as_ref().map(|(row_of, ids)| Replay { row_of, ids }),
            awaited: input.awaited.map(|awaited| Awaited { sources: &self.sources, ..awaited }),
        }
    }
}

/// Rows of the recording that serves a batch: every size up to 16, then multiples of 8.
fn bucket(rows: usize) -> usize {
    if rows <= 16 { rows } else { rows.next_multiple_of(8) }
}
