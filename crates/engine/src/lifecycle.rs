//! Carrying out an operator's orders, between two steps.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use moetrail_models::Decoder;
use moetrail_sched::RequestKey;
use tokio::sync::oneshot;

use crate::control::{Control, PauseMode};
use crate::engine::EngineThread;

/// Whether the engine computes.
#[derive(Default)]
pub(crate) enum Pause {
    /// It does.
    #[default]
    Running,
    /// It finishes what is live, then stands still and tells those who wait for it.
    Finishing(Vec<FinishingPause>),
    /// It does not.
    Still,
}

/// Somebody waits for the live requests to finish.
pub(crate) struct FinishingPause {
    clear_cache: bool,
    done: oneshot::Sender<()>,
}

impl EngineThread {
    pub(crate) fn control(&mut self, order: Control) {
        self.settle();
        // Whoever gave an order may have gone before it was carried out.
        match order {
            Control::Pause { mode, clear_cache, done } => self.pause(mode, clear_cache, done),
            Control::Resume { done } => {
                self.resume();
                let _ = done.send(());
            }
            Control::ResetCache { done } => {
                self.reset_cache();
                let _ = done.send(());
            }
            Control::UpdateWeights { decoder, version, done } => {
                let _ = done.send(self.update_weights(*decoder, version));
            }
            Control::Abort { names, done } => {
                let _ = done.send(self.abort_named(names.as_deref()));
            }
        }
    }

    /// Whether nothing is computed until the engine is resumed.
    pub(crate) fn is_still(&self) -> bool {
        matches!(self.pause, Pause::Still)
    }

    fn pause(&mut self, mode: PauseMode, clear_cache: bool, done: oneshot::Sender<()>) {
        match mode {
            PauseMode::Abort => {
                self.abort_named(None);
            }
            PauseMode::Keep => {}
            PauseMode::Wait if self.live.is_empty() => {}
            PauseMode::Wait => {
                let waiting = FinishingPause { clear_cache, done };
                match &mut self.pause {
                    Pause::Finishing(others) => others.push(waiting),
                    _ => self.pause = Pause::Finishing(vec![waiting]),
                }
                return;
            }
        }
        self.stand_still(clear_cache);
        let _ = done.send(());
    }

    fn stand_still(&mut self, clear_cache: bool) {
        if clear_cache {
            self.reset_cache();
        }
        self.close_all();
        self.end_waits(clear_cache);
        self.pause = Pause::Still;
    }

    /// Ends a pause that waits for the live requests, once there are none.
    pub(crate) fn finish_pause(&mut self) {
        if matches!(self.pause, Pause::Finishing(_)) && self.live.is_empty() {
            self.settle();
        }
        if let (Pause::Finishing(waits), true) = (&self.pause, self.live.is_empty()) {
            let clear_cache = waits.iter().any(|wait| wait.clear_cache);
            self.stand_still(clear_cache);
        }
    }

    fn end_waits(&mut self, cleared: bool) {
        if let Pause::Finishing(waits) = std::mem::take(&mut self.pause) {
            if !cleared && waits.iter().any(|wait| wait.clear_cache) {
                self.reset_cache();
            }
            for wait in waits {
                let _ = wait.done.send(());
            }
        }
    }

    pub(crate) fn resume(&mut self) {
        self.end_waits(false);
        self.pause = Pause::Running;
        self.shared.refusing.store(false, Ordering::Release);
        self.shared.paused.store(false, Ordering::Release);
    }

    /// Drains every live sequence, takes its blocks, and leaves no block that could be matched. No step is on its way.
    fn reset_cache(&mut self) {
        // Choices that have ended need their blocks for a moment only.
        self.close_all();
        let (capture, choices, settings) = (&self.capture, &mut self.choices, &self.settings);
        self.scheduler.reset_cache(&mut |sequence, pool, release| {
            if let Some(choice) = choices.get_mut(&sequence.id()) {
                choice.lose_blocks(sequence, pool, release, capture, settings.reprefill_routing);
            }
        });
        for (seq, choice) in &mut self.choices {
            // Also those that wait for their turn to be computed again, or whose blocks were in the swap space.
            choice.recomputed |= self.scheduler.get(*seq).is_some_and(|sequence| sequence.max_computed_tokens() > 0);
        }
    }

    fn update_weights(&mut self, decoder: Decoder, version: Option<String>) -> Arc<str> {
        self.reset_cache();
        self.decoder = decoder;
        self.num_updates += 1;
        let version: Arc<str> = version.unwrap_or_else(|| self.num_updates.to_string()).into();
        self.capture.set_weight_version(version.clone());
        *self.shared.weight_version.lock().unwrap_or_else(|poison| poison.into_inner()) = version.clone();
        tracing::info!(%version, "the weights were updated");
        version
    }

    fn abort_named(&mut self, names: Option<&[String]>) -> usize {
        let named = |live: &[String]| names.is_none_or(|names| live.iter().any(|name| names.contains(name)));
        let keys: Vec<RequestKey> =
            self.live.iter().filter(|(_, live)| named(&live.request.names)).map(|(key, _)| *key).collect();
        keys.iter().for_each(|key| self.abort(*key));
        keys.len()
    }
}
