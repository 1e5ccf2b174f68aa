//! What operators do to a running engine, and what clients see of it.

use std::path::Path;
use std::time::{Duration, Instant};

use moetrail_kernels::gpu::Gpu;
use moetrail_routes::{ExpertRows, TokenSpan};
use moetrail_synthetic::{Layout, Synthetic};
use serde_json::json;
use tempfile::TempDir;

use crate::{
    ControlError, Engine, EngineConfig, EngineHandle, Event, EventStream, Finish, FinishReason, GenerateRequest,
    PauseMode, SamplingParams, SubmitError,
};

fn written(synthetic: &Synthetic) -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    synthetic.write(folder.path(), Layout::EachExpert);
    folder
}

fn start(folder: &Path) -> Engine {
    start_on(None, folder)
}

fn start_on(gpu: Option<&Gpu>, folder: &Path) -> Engine {
    let config = EngineConfig { num_blocks: Some(64), block_size: 4, ..EngineConfig::default() };
    crate::gpu_tests::start(gpu, folder, config)
}

pub(crate) fn request(prompt: &[u32], max_tokens: usize) -> GenerateRequest {
    GenerateRequest {
        names: vec![format!("{prompt:?}")],
        prompt: prompt.into(),
        sampling: SamplingParams {
            max_tokens,
            temperature: 0.0,
            ignore_eos: true,
            detokenize: false,
            ..SamplingParams::default()
        },
        routed_experts_start: Some(0),
        ..GenerateRequest::default()
    }
}

/// What is left of a stream.
pub(crate) fn rest(mut stream: EventStream) -> (Vec<u32>, Finish) {
    let (mut tokens, mut end) = (Vec::new(), None);
    while let Some(event) = stream.blocking_next() {
        match event {
            Event::Choice(delta) => {
                tokens.extend(delta.token_ids);
                end = delta.finish.or(end);
            }
            Event::Failed(error) => panic!("{error}"),
            Event::Prompt(_) => {}
        }
    }
    (tokens, end.expect("every choice ends"))
}

fn run(handle: &EngineHandle, request: GenerateRequest) -> (Vec<u32>, Finish) {
    rest(handle.submit(request).expect("the request is valid"))
}

/// Waits until `count` tokens have come, and returns them.
fn tokens(stream: &mut EventStream, count: usize) -> Vec<u32> {
    let mut tokens = Vec::new();
    while tokens.len() < count {
        if let Event::Choice(delta) = stream.blocking_next().expect("the stream goes on") {
            tokens.extend(delta.token_ids);
        }
    }
    tokens
}

/// An order meets a request midway only if it comes in time; the machine may be busy.
fn in_time<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    (0..200).find_map(|_| attempt()).expect("no order came in time")
}

fn rows(end: &Finish) -> &ExpertRows {
    end.routed_experts.as_ref().expect("rows were asked for").as_ref().expect("no row is lost")
}

fn order<T>(order: impl Future<Output = Result<T, ControlError>>) -> Result<T, ControlError> {
    tokio::runtime::Builder::new_current_thread().build().expect("a runtime").block_on(order)
}

#[test]
fn rows_keep_the_version_that_computed_them() {
    check_versions(None);
}

/// The new weights are packed while the old ones compute, on streams of one device.
#[test]
fn rows_keep_their_version_on_a_gpu() {
    for seed in [0, 5] {
        let Some(gpu) = moetrail_emulation::gpu(seed, 1 << 30) else { return };
        check_versions(Some(&gpu));
    }
}

fn check_versions(gpu: Option<&Gpu>) {
    let start = |folder: &Path| start_on(gpu, folder);
    let (old, new) = (written(&Synthetic::new("qwen3_moe")), written(&Synthetic::new("qwen3_moe").seed(7)));
    let engine = start(old.path());
    let handle = engine.handle();
    assert_eq!(&*handle.weight_version(), "0");
    let prompt: Vec<u32> = (1..20).collect();
    let (old_tokens, old_end) = run(&handle, request(&prompt, 100));
    assert_eq!(old_end.recomputed, None);

    let (said, end) = in_time(|| {
        order(handle.update_weights(old.path().to_owned(), Some("step-0".into()))).expect("it loads");
        let mut stream = handle.submit(request(&prompt, 100)).expect("the request is valid");
        let mut said = tokens(&mut stream, 2);
        let version = order(handle.update_weights(new.path().to_owned(), Some("step-1".into()))).expect("it loads");
        assert_eq!((&*version, &*handle.weight_version()), ("step-1", "step-1"));
        let (more, end) = rest(stream);
        said.extend(more);
        end.recomputed.is_some().then_some((said, end))
    });
    let versions = end.recomputed.clone().expect("computed state was dropped");
    let names: Vec<&str> = versions.iter().map(|span| &*span.version).collect();
    assert_eq!(names, ["step-0", "step-1"]);
    // Where the update struck: the last row of the old weights belongs to the last token but one that they sampled.
    let switch = versions[0].span.end;
    assert_eq!((versions[0].span, versions[1].span), (TokenSpan::new(0, switch), TokenSpan::new(switch, 118)));
    let num_old = switch + 1 - prompt.len();
    assert!((2..100).contains(&num_old), "{num_old} tokens of the old weights");
    assert_eq!(said[..num_old], old_tokens[..num_old]);
    assert_eq!(rows(&end).slice(versions[0].span), rows(&old_end).slice(versions[0].span));
    // From there on it is what the new weights make of the same text.
    let so_far = [&prompt, &said[..num_old]].concat();
    let (new_tokens, new_end) = run(&handle, request(&so_far, 100 - num_old));
    assert_eq!(said[num_old..], new_tokens);
    assert_eq!(rows(&end).slice(versions[1].span), rows(&new_end).slice(versions[1].span));
    assert_ne!(rows(&new_end).slice(versions[0].span), rows(&old_end).slice(versions[0].span));
    // Nothing of the old weights is found in the cache.
    let fresh = start(new.path());
    assert_eq!(run(&handle, request(&prompt, 40)).0, run(&fresh.handle(), request(&prompt, 40)).0);
    fresh.shutdown();
    engine.shutdown();
}

#[test]
fn an_update_that_cannot_be_made_changes_nothing() {
    let folder = written(&Synthetic::new("olmoe"));
    let engine = start(folder.path());
    let handle = engine.handle();
    let prompt: Vec<u32> = (1..20).collect();
    let before = run(&handle, request(&prompt, 20)).0;
    let running = handle.submit(request(&prompt, 100)).expect("the request is valid");
    let refused = |path: &Path, part: &str| {
        let error = order(handle.update_weights(path.to_owned(), None)).expect_err(part).to_string();
        assert!(error.contains(part), "{error}");
    };
    refused(Path::new("/nonexistent/weights"), "/nonexistent/weights");
    let wider = written(&Synthetic::new("olmoe").set("intermediate_size", json!(48)));
    refused(wider.path(), "another architecture");
    refused(written(&Synthetic::new("mixtral")).path(), "architecture is \"MixtralForCausalLM\" there");
    let broken = written(&Synthetic::new("olmoe"));
    std::fs::write(broken.path().join("model.safetensors"), b"not tensors").expect("it can be written");
    refused(broken.path(), "model.safetensors");
    assert_eq!(&*handle.weight_version(), "0");
    let (tokens, end) = rest(running);
    assert_eq!((tokens.len(), end.recomputed), (100, None));
    assert_eq!(run(&handle, request(&prompt, 20)).0, before);
    // An update without a name is counted.
    assert_eq!(order(handle.update_weights(folder.path().to_owned(), None)).as_deref(), Ok("1"));
    assert_eq!(run(&handle, request(&prompt, 20)).0, before);
    engine.shutdown();
}

#[test]
fn a_pause_keeps_waits_or_aborts() {
    let folder = written(&Synthetic::new("mixtral"));
    let engine = start(folder.path());
    let handle = engine.handle();
    let long = request(&[1, 2, 3], 100);
    let undisturbed = run(&handle, long.clone());

    // keep: nothing moves, new ones wait, and nothing is lost.
    let (mut said, stream) = in_time(|| {
        let mut stream = handle.submit(long.clone()).expect("the request is valid");
        let said = tokens(&mut stream, 2);
        order(handle.pause(PauseMode::Keep, true)).expect("it pauses");
        assert!(handle.is_paused());
        if handle.num_live() == 0 {
            order(handle.resume()).expect("it resumes");
            return None;
        }
        Some((said, stream))
    });
    let waiting = handle.submit(request(&[4, 5], 3)).expect("a pause that keeps takes requests");
    let value = |name: &str| {
        let text = handle.stats().encode();
        let line = text.lines().find(|line| line.starts_with(name)).expect(name);
        line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok()).expect("a number")
    };
    let steps = value("moetrail_iterations_total");
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(value("moetrail_iterations_total"), steps);
    order(handle.resume()).expect("it resumes");
    assert!(!handle.is_paused());
    let (more, end) = rest(stream);
    said.extend(more);
    assert_eq!((&said, rows(&end)), (&undisturbed.0, rows(&undisturbed.1)));
    assert_eq!(end.recomputed.map(|spans| spans.len()), Some(1), "one version, computed twice");
    assert_eq!(rest(waiting).0.len(), 3);

    // wait: what runs ends as ever, what comes is refused.
    let running = handle.submit(long.clone()).expect("the request is valid");
    order(handle.pause(PauseMode::Wait, false)).expect("it pauses");
    assert_eq!(handle.num_live(), 0);
    assert_eq!(handle.submit(long.clone()).err(), Some(SubmitError::Paused));
    assert_eq!(rest(running).0, undisturbed.0);
    order(handle.resume()).expect("it resumes");

    // abort: what runs ends at once, with the rows that it has.
    let (said, end) = in_time(|| {
        let mut running = handle.submit(long.clone()).expect("the request is valid");
        let mut said = tokens(&mut running, 2);
        order(handle.pause(PauseMode::Abort, true)).expect("it pauses");
        let (more, end) = rest(running);
        said.extend(more);
        if end.reason != FinishReason::Abort {
            order(handle.resume()).expect("it resumes");
            return None;
        }
        Some((said, end))
    });
    assert_eq!(rows(&end), &rows(&undisturbed.1).slice(TokenSpan::new(0, 2 + said.len())));
    assert_eq!(handle.submit(long.clone()).err(), Some(SubmitError::Paused));
    order(handle.resume()).expect("it resumes");
    assert_eq!(run(&handle, long).0, undisturbed.0);
    engine.shutdown();
}

#[test]
fn requests_are_aborted_by_name() {
    let folder = written(&Synthetic::new("mixtral"));
    let engine = start(folder.path());
    let handle = engine.handle();
    let named = |name: &str| GenerateRequest { names: vec![name.into()], ..request(&[1, 2, 3], 100) };
    order(handle.pause(PauseMode::Keep, false)).expect("it pauses");
    let streams: Vec<EventStream> =
        ["a", "b", "a", "c"].iter().map(|name| handle.submit(named(name)).expect("it is valid")).collect();
    let ended = order(handle.abort(Some(vec!["a".into(), "unknown".into()])));
    assert_eq!(ended, Ok(2));
    order(handle.resume()).expect("it resumes");
    let ends: Vec<(usize, FinishReason, bool)> = streams
        .into_iter()
        .map(|stream| {
            let (tokens, end) = rest(stream);
            (tokens.len(), end.reason, end.routed_experts.is_some())
        })
        .collect();
    // Aborted before any forward: no rows, not even an empty list.
    let (gone, whole) = ((0, FinishReason::Abort, false), (100, FinishReason::Length, true));
    assert_eq!(ends, [gone, whole, gone, whole]);
    assert_eq!(order(handle.abort(None)), Ok(0));
    engine.shutdown();
    assert_eq!(order(handle.resume()), Err(ControlError::Closed));
}

#[test]
fn every_choice_ends_also_before_there_are_any() {
    let folder = written(&Synthetic::new("mixtral"));
    let engine = start(folder.path());
    let handle = engine.handle();
    let mut three = request(&[1, 2, 3], 20);
    three.sampling.n = 3;
    order(handle.pause(PauseMode::Keep, false)).expect("it pauses");
    let mut stream = handle.submit(three).expect("the request is valid");
    assert_eq!(order(handle.abort(None)), Ok(1));
    order(handle.resume()).expect("it resumes");
    let mut ends = Vec::new();
    while let Some(event) = stream.blocking_next() {
        if let Event::Choice(delta) = event {
            ends.push((delta.index, delta.finish.map(|finish| finish.reason)));
        }
    }
    ends.sort_by_key(|end| end.0);
    assert_eq!(ends, [0, 1, 2].map(|index| (index, Some(FinishReason::Abort))));
    engine.shutdown();
}

#[test]
fn an_abort_in_a_pause_waits_for_nothing() {
    let folder = written(&Synthetic::new("mixtral"));
    let engine = start(folder.path());
    let handle = engine.handle();
    // More rows than one slice of a drain brings.
    let prompt: Vec<u32> = (0..60).map(|i| 1 + i % 9).collect();
    let long = request(&prompt, 60);
    let undisturbed = run(&handle, long.clone());
    let (said, end) = in_time(|| {
        let mut stream = handle.submit(long.clone()).expect("the request is valid");
        let mut said = tokens(&mut stream, 1);
        order(handle.pause(PauseMode::Keep, false)).expect("it pauses");
        let aborted = order(handle.abort(None)).expect("it aborts");
        assert_eq!(handle.num_live(), 0);
        order(handle.resume()).expect("it resumes");
        let (more, end) = rest(stream);
        said.extend(more);
        (aborted == 1).then_some((said, end))
    });
    assert_eq!(end.reason, FinishReason::Abort);
    assert_eq!(rows(&end), &rows(&undisturbed.1).slice(TokenSpan::new(0, 59 + said.len())));
    engine.shutdown();
}

#[test]
fn a_shutdown_ends_a_pause() {
    let folder = written(&Synthetic::new("mixtral"));
    let engine = start(folder.path());
    let handle = engine.handle();
    order(handle.pause(PauseMode::Keep, false)).expect("it pauses");
    let stream = handle.submit(request(&[1, 2, 3], 10)).expect("it is valid");
    let began = Instant::now();
    engine.shutdown();
    assert_eq!(rest(stream).0.len(), 10);
    assert!(began.elapsed() < Duration::from_secs(20));
}
