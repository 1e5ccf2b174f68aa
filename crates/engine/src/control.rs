//! What an operator does to a running engine: pause, resume, reset the cache, update the weights, abort.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use moetrail_models::{Checkpoint, Decoder};
use tokio::sync::oneshot;

use crate::handle::{Command, EngineHandle, Shared};

/// What becomes of requests when the engine is paused (vLLM's modes).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PauseMode {
    /// Live requests end with `abort`; new ones are refused.
    Abort,
    /// Live requests finish first; new ones are refused.
    Wait,
    /// Live requests stand still and new ones wait, until the engine is resumed.
    Keep,
}

impl PauseMode {
    /// The mode of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "abort" => Some(Self::Abort),
            "wait" => Some(Self::Wait),
            "keep" => Some(Self::Keep),
            _ => None,
        }
    }
}

/// Why the engine did not do what an operator asked for. It goes on as before.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// The checkpoint cannot take the place of the present weights.
    #[error("{0}")]
    Checkpoint(String),
    /// The engine is shutting down or has stopped.
    #[error("the engine is shutting down")]
    Closed,
}

/// An order to the engine thread, answered once it has been carried out.
pub(crate) enum Control {
    Pause { mode: PauseMode, clear_cache: bool, done: oneshot::Sender<()> },
    Resume { done: oneshot::Sender<()> },
    ResetCache { done: oneshot::Sender<()> },
    UpdateWeights { decoder: Box<Decoder>, version: Option<String>, done: oneshot::Sender<Arc<str>> },
    Abort { names: Option<Vec<String>>, done: oneshot::Sender<usize> },
}

impl EngineHandle {
    /// Pauses the engine and, if asked to, resets its cache; returns when nothing runs any more.
    ///
    /// # Errors
    /// [`ControlError::Closed`].
    pub async fn pause(&self, mode: PauseMode, clear_cache: bool) -> Result<(), ControlError> {
        // Refused from now on, not from whenever the thread reads the order.
        self.shared.refusing.store(mode != PauseMode::Keep, Ordering::Release);
        self.shared.paused.store(true, Ordering::Release);
        self.order(|done| Control::Pause { mode, clear_cache, done }).await
    }

    /// Ends a pause; without one, nothing happens.
    ///
    /// # Errors
    /// [`ControlError::Closed`].
    pub async fn resume(&self) -> Result<(), ControlError> {
        self.order(|done| Control::Resume { done }).await
    }

    /// Whether the engine is paused, or about to be.
    pub fn is_paused(&self) -> bool {
        self.shared.paused.load(Ordering::Acquire)
    }

    /// Forgets all cached KV. Live sequences keep the rows they have and are computed again.
    ///
    /// # Errors
    /// [`ControlError::Closed`].
    pub async fn reset_prefix_cache(&self) -> Result<(), ControlError> {
        self.order(|done| Control::ResetCache { done }).await
    }

    /// Ends live requests by the names they were given, or all of them; returns how many.
    ///
    /// # Errors
    /// [`ControlError::Closed`].
    pub async fn abort(&self, names: Option<Vec<String>>) -> Result<usize, ControlError> {
        self.order(|done| Control::Abort { names, done }).await
    }

    /// The version of the weights that serve: `0`, then what updates call it.
    pub fn weight_version(&self) -> Arc<str> {
        self.shared.weight_version.lock().unwrap_or_else(|poison| poison.into_inner()).clone()
    }

    /// Serves the weights in `folder` from the next step on; returns their version: `version`, or a count of updates.
    ///
    /// The folder is read and packed beside the weights that serve, so both are in memory for a while; nothing changes
    /// before the new ones are complete. Live sequences keep the rows they have and are computed again.
    ///
    /// # Errors
    /// [`ControlError::Checkpoint`] if the folder cannot be loaded or holds another architecture.
    pub async fn update_weights(&self, folder: PathBuf, version: Option<String>) -> Result<Arc<str>, ControlError> {
        let (shared, max_model_len) = (self.shared.clone(), self.info.max_model_len);
        let (loaded, decoder) = oneshot::channel();
        let load = move || {
            // The caller may have gone; then nothing is updated.
            let _ = loaded.send(load_like(&folder, &shared, max_model_len));
        };
        let started = std::thread::Builder::new().name("load-weights".into()).spawn(load);
        started.map_err(|error| ControlError::Checkpoint(format!("the weights cannot be loaded: {error}")))?;
        let decoder = decoder.await.map_err(|_| ControlError::Checkpoint("loading the weights panicked".into()))??;
        self.order(|done| Control::UpdateWeights { decoder: Box::new(decoder), version, done }).await
    }

    async fn order<T>(&self, order: impl FnOnce(oneshot::Sender<T>) -> Control) -> Result<T, ControlError> {
        let (done, answer) = oneshot::channel();
        self.commands.send(Command::Control(order(done))).map_err(|_| ControlError::Closed)?;
        answer.await.map_err(|_| ControlError::Closed)
    }
}

/// Loads a folder whose weights can take the place of those that serve.
fn load_like(folder: &Path, served: &Shared, max_model_len: usize) -> Result<Decoder, ControlError> {
    let name = folder.display().to_string();
    let refuse = |error: &dyn std::fmt::Display| ControlError::Checkpoint(error.to_string());
    let checkpoint = Checkpoint::open_folder(folder, &name).map_err(|error| refuse(&error))?;
    if let Some(difference) = served.model.difference(checkpoint.config()) {
        return Err(refuse(&format_args!("{name} holds another architecture: {difference}")));
    }
    let checkpoint = checkpoint.with_max_positions(max_model_len);
    checkpoint.load_on(served.gpu.as_ref(), served.weights, false).map_err(|error| refuse(&error))
}
