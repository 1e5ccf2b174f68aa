//! The async side of the engine: submit a request, read its events, cancel by dropping.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use moetrail_kernels::gpu::Gpu;
use moetrail_models::{Decoder, ModelConfig, WeightChoice};
use moetrail_sched::RequestKey;
use tokio::sync::mpsc as tokio_mpsc;

use crate::control::Control;
use crate::info::EngineInfo;
use crate::request::{Event, GenerateRequest, SubmitError};
use crate::stats::EngineStats;

/// A message to the engine thread.
pub(crate) enum Command {
    Submit(RequestKey, Box<GenerateRequest>, tokio_mpsc::UnboundedSender<Event>),
    Abort(RequestKey),
    Control(Control),
    Shutdown,
}

/// What handles and the engine thread share besides the command queue.
pub(crate) struct Shared {
    /// The architecture that serves; weights come and go, it stays.
    pub(crate) model: ModelConfig,
    /// What the weights are packed as.
    pub(crate) weights: WeightChoice,
    /// Where they are, if not on the host.
    pub(crate) gpu: Option<Gpu>,
    /// Requests accepted and not yet finished.
    pub(crate) live: AtomicUsize,
    /// Set once no new request is taken.
    pub(crate) closed: AtomicBool,
    /// Set from the call that pauses to the end of the pause.
    pub(crate) paused: AtomicBool,
    /// Set while a pause refuses new requests.
    pub(crate) refusing: AtomicBool,
    /// Locked by operators alone, never on the step path.
    pub(crate) weight_version: Mutex<Arc<str>>,
    /// Names requests in order of arrival; the names that clients give may repeat.
    next_key: AtomicU64,
}

impl Shared {
    pub(crate) fn new(decoder: &Decoder) -> Self {
        Self {
            model: decoder.config().clone(),
            weights: decoder.weight_choice(),
            gpu: decoder.gpu().cloned(),
            live: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            paused: AtomicBool::new(false),
            refusing: AtomicBool::new(false),
            weight_version: Mutex::new("0".into()),
            next_key: AtomicU64::new(0),
        }
    }
}

/// A cheap, clonable way to reach the engine thread.
#[derive(Clone)]
pub struct EngineHandle {
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) info: Arc<EngineInfo>,
    pub(crate) stats: Arc<EngineStats>,
}

/// The events of one request; dropping it cancels the request.
pub struct EventStream {
    events: tokio_mpsc::UnboundedReceiver<Event>,
    key: RequestKey,
    commands: mpsc::Sender<Command>,
}

impl EngineHandle {
    /// What is being served.
    pub fn info(&self) -> &Arc<EngineInfo> {
        &self.info
    }

    /// Counters and histograms of the engine.
    pub fn stats(&self) -> &Arc<EngineStats> {
        &self.stats
    }

    /// Whether no new request is taken: shutdown has begun, or the engine thread has ended.
    pub fn is_closed(&self) -> bool {
        self.shared.closed.load(Ordering::Acquire)
    }

    /// Requests accepted and not yet finished.
    pub fn num_live(&self) -> usize {
        self.shared.live.load(Ordering::Acquire)
    }

    /// Queues a request.
    ///
    /// # Errors
    /// [`SubmitError::Invalid`] for a value out of range, [`SubmitError::Full`] if too many requests wait,
    /// [`SubmitError::Paused`] during a pause that refuses, [`SubmitError::Closed`] once shutdown has begun.
    pub fn submit(&self, request: GenerateRequest) -> Result<EventStream, SubmitError> {
        if self.is_closed() {
            return Err(SubmitError::Closed);
        }
        if self.shared.refusing.load(Ordering::Acquire) {
            return Err(SubmitError::Paused);
        }
        self.info.check(&request)?;
        let limit = self.info.max_live_requests;
        if self.shared.live.fetch_add(1, Ordering::AcqRel) >= limit {
            self.shared.live.fetch_sub(1, Ordering::AcqRel);
            return Err(SubmitError::Full { limit });
        }
        let key = RequestKey(self.shared.next_key.fetch_add(1, Ordering::Relaxed));
        let (sender, events) = tokio_mpsc::unbounded_channel();
        if self.commands.send(Command::Submit(key, Box::new(request), sender)).is_err() {
            self.shared.live.fetch_sub(1, Ordering::AcqRel);
            return Err(SubmitError::Closed);
        }
        Ok(EventStream { events, key, commands: self.commands.clone() })
    }

    /// Takes no new request, lets the running ones finish, then ends the engine thread.
    pub fn shutdown(&self) {
        self.shared.closed.store(true, Ordering::Release);
        // A closed channel means that the thread has ended already.
        let _ = self.commands.send(Command::Shutdown);
    }
}

impl EventStream {
    /// The next event, `None` after the last.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// The next event, blocking; for callers without a runtime.
    pub fn blocking_next(&mut self) -> Option<Event> {
        self.events.blocking_recv()
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        // Harmless if the request has ended: the engine ignores ids that it does not know.
        let _ = self.commands.send(Command::Abort(self.key));
    }
}
