//! Streams as queues, in any order that their events allow.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::thread::{self, ThreadId};

use moetrail_kernels::gpu::{Event, Graph, Stream};

/// Something to do, perhaps more than once.
pub(crate) type Op = Arc<dyn Fn() + Send + Sync>;

enum Step {
    Run(Op),
    Record(Event),
    Wait(Event),
}

pub(crate) struct Queues {
    /// Compute, copy, load.
    steps: [VecDeque<Step>; 3],
    /// Where each event is recorded.
    recorded_on: HashMap<Event, usize>,
    happened: HashSet<Event>,
    next: u64,
    /// Who records, and what was recorded.
    recording: Option<(ThreadId, Vec<Op>)>,
    graphs: HashMap<Graph, Vec<Op>>,
    chance: u64,
}

impl Queues {
    pub(crate) fn new(seed: u64) -> Queues {
        Queues {
            steps: Default::default(),
            recorded_on: HashMap::new(),
            happened: HashSet::new(),
            next: 1,
            recording: None,
            graphs: HashMap::new(),
            chance: seed,
        }
    }

    pub(crate) fn issue(&mut self, stream: Stream, op: Op) {
        if let (Some((thread, recording)), Stream::Compute) = (&mut self.recording, stream) {
            assert_eq!(*thread, thread::current().id(), "another thread's work within a recording");
            recording.push(op);
            return;
        }
        self.steps[index(stream)].push_back(Step::Run(op));
        self.advance_by_chance();
    }

    pub(crate) fn record(&mut self, stream: Stream) -> Event {
        self.must_not_record(stream);
        let event = Event(self.next);
        self.next += 1;
        self.recorded_on.insert(event, index(stream));
        self.steps[index(stream)].push_back(Step::Record(event));
        self.advance_by_chance();
        event
    }

    pub(crate) fn wait(&mut self, stream: Stream, event: Event) {
        self.must_not_record(stream);
        self.steps[index(stream)].push_back(Step::Wait(event));
    }

    pub(crate) fn has_happened(&mut self, event: Event) -> bool {
        self.advance_by_chance();
        self.happened.contains(&event)
    }

    pub(crate) fn finish(&mut self, event: Event) {
        while !self.happened.contains(&event) {
            let stream = self.recorded_on[&event];
            self.step(stream);
        }
    }

    pub(crate) fn run_all(&mut self) {
        for stream in 0..self.steps.len() {
            while !self.steps[stream].is_empty() {
                self.step(stream);
            }
        }
    }

    pub(crate) fn begin_graph(&mut self) {
        self.must_not_record(Stream::Compute);
        self.recording = Some((thread::current().id(), Vec::new()));
    }

    pub(crate) fn end_graph(&mut self) -> Graph {
        let graph = Graph(self.next);
        self.next += 1;
        let (thread, recording) = self.recording.take().expect("a recording was begun");
        assert_eq!(thread, thread::current().id(), "another thread's recording");
        self.graphs.insert(graph, recording);
        graph
    }

    pub(crate) fn launch_graph(&mut self, graph: Graph) {
        self.must_not_record(Stream::Compute);
        for op in self.graphs[&graph].clone() {
            self.issue(Stream::Compute, op);
        }
    }

    pub(crate) fn drop_graph(&mut self, graph: Graph) {
        self.graphs.remove(&graph);
    }

    fn must_not_record(&self, stream: Stream) {
        assert!(stream != Stream::Compute || self.recording.is_none(), "what cannot be recorded, within a recording");
    }

    /// Does the next thing of a stream, and first whatever it waits for.
    fn step(&mut self, stream: usize) {
        match self.steps[stream].pop_front().expect("an event that was recorded lies ahead") {
            Step::Run(op) => op(),
            Step::Record(event) => _ = self.happened.insert(event),
            Step::Wait(event) => self.finish(event),
        }
    }

    fn advance_by_chance(&mut self) {
        if self.chance == 0 {
            return;
        }
        // xorshift64
        for shift in [(13, 7), (17, 0)] {
            self.chance ^= self.chance << shift.0;
            self.chance ^= self.chance >> if shift.1 == 0 { 11 } else { shift.1 };
        }
        let stream = (self.chance >> 20) as usize % self.steps.len();
        for _ in 0..self.chance >> 30 & 3 {
            if !self.steps[stream].is_empty() {
                self.step(stream);
            }
        }
    }
}

fn index(stream: Stream) -> usize {
    match stream {
        Stream::Compute => 0,
        Stream::Copy => 1,
        Stream::Load => 2,
    }
}

impl fmt::Debug for Queues {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "Queues({:?} steps)", [0, 1, 2].map(|stream: usize| self.steps[stream].len()))
    }
}
