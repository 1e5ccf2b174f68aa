//! Streamed answers: server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use futures::stream::{self, SelectAll, Stream, StreamExt};
use moetrail_api::{ApiError, Reply, event_weight};
use moetrail_engine::{Event, EventStream};

use crate::generation::{LARGE_ANSWER, Running, ended_early, off_the_workers_if};

/// Without a word for so long, a comment keeps proxies from closing the connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

type NumberedEvents = Pin<Box<dyn Stream<Item = (usize, Event)> + Send>>;

/// A streamed answer on its way. Dropping it cancels every prompt.
struct Answer {
    events: SelectAll<NumberedEvents>,
    /// Absent only while a chunk is being written.
    reply: Option<Box<dyn Reply>>,
    /// Choices that have not ended.
    open_choices: usize,
    /// Frames that are ready.
    ready: VecDeque<Bytes>,
    ended: bool,
    keep_alive: Duration,
}

/// Streams the events of a request as they come.
pub(crate) fn response(running: Running) -> Response {
    let requests = &running.accepted.requests;
    let answer = Answer {
        open_choices: requests.iter().map(|request| request.sampling.n).sum(),
        events: stream::select_all(running.events.into_iter().enumerate().map(numbered)),
        reply: Some(running.accepted.reply),
        ready: VecDeque::new(),
        ended: false,
        keep_alive: KEEP_ALIVE,
    };
    let frames = stream::unfold(answer, |mut answer| async move {
        let frame = answer.next_frame().await?;
        Some((Ok::<_, Infallible>(frame), answer))
    });
    let mut response = Response::new(Body::from_stream(frames));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Nginx would collect the chunks otherwise.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

fn numbered((prompt, events): (usize, EventStream)) -> NumberedEvents {
    Box::pin(stream::unfold(events, move |mut events| async move {
        let event = events.next().await?;
        Some(((prompt, event), events))
    }))
}

impl Answer {
    async fn next_frame(&mut self) -> Option<Bytes> {
        loop {
            if let Some(frame) = self.ready.pop_front() {
                return Some(frame);
            }
            if self.ended {
                return None;
            }
            match tokio::time::timeout(self.keep_alive, self.events.next()).await {
                Err(_) => return Some(Bytes::from_static(b": keep-alive\n\n")),
                Ok(Some((prompt, event))) => {
                    if let Err(error) = self.take(prompt, event).await {
                        self.fail(&error);
                    }
                }
                Ok(None) if self.open_choices > 0 => self.fail(&ended_early()),
                Ok(None) => self.close(),
            }
        }
    }

    async fn take(&mut self, prompt: usize, event: Event) -> Result<(), ApiError> {
        match &event {
            Event::Failed(error) => return Err(error.clone().into()),
            Event::Choice(delta) if delta.finish.is_some() => self.open_choices = self.open_choices.saturating_sub(1),
            Event::Choice(_) | Event::Prompt(_) => {}
        }
        let large = event_weight(&event) > LARGE_ANSWER;
        // Lost only if writing an earlier chunk panicked.
        let mut reply = self.reply.take().ok_or_else(ended_early)?;
        let (reply, chunks) = off_the_workers_if(large, move || {
            let chunks = reply.chunks(prompt, event);
            (reply, chunks)
        })
        .await?;
        self.reply = Some(reply);
        self.ready.extend(chunks.into_iter().flat_map(frames));
        Ok(())
    }

    /// The status line has been sent, so a failure can only be told in the stream.
    fn fail(&mut self, error: &ApiError) {
        tracing::warn!(message = error.message, "a streamed request failed");
        self.ready.extend(frames(error.to_json()));
        self.end();
    }

    fn close(&mut self) {
        if let Some(reply) = &mut self.reply {
            self.ready.extend(reply.closing_chunks().into_iter().flat_map(frames));
        }
        self.end();
    }

    fn end(&mut self) {
        self.ready.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
        self.ended = true;
        // Cancels what may still run.
        self.events.clear();
    }
}

/// One event of the stream, in pieces where a copy would be long; compact JSON has no line breaks.
fn frames(chunk: Vec<u8>) -> Vec<Bytes> {
    let (head, tail) = (&b"data: "[..], &b"\n\n"[..]);
    if chunk.len() > LARGE_ANSWER {
        return vec![Bytes::from_static(head), chunk.into(), Bytes::from_static(tail)];
    }
    vec![[head, &chunk, tail].concat().into()]
}

#[cfg(test)]
mod tests {
    use moetrail_api::RequestOutput;
    use moetrail_engine::{ChoiceDelta, Finish, FinishReason, RequestError};

    use super::*;

    /// Writes the text of each delta, and an end.
    struct Plain;

    impl Reply for Plain {
        fn body(&mut self, _outputs: Vec<RequestOutput>) -> Vec<u8> {
            Vec::new()
        }

        fn chunks(&mut self, prompt: usize, event: Event) -> Vec<Vec<u8>> {
            match event {
                Event::Choice(delta) => vec![format!("{prompt}:{}", delta.text).into_bytes()],
                _ => Vec::new(),
            }
        }

        fn closing_chunks(&mut self) -> Vec<Vec<u8>> {
            vec![b"end".to_vec()]
        }
    }

    fn said(text: &str, last: bool) -> Event {
        let finish = last.then_some(Finish {
            reason: FinishReason::Stop,
            stop_reason: None,
            routed_experts: None,
            recomputed: None,
        });
        Event::Choice(ChoiceDelta {
            index: 0,
            token_ids: vec![1],
            text: text.into(),
            logprobs: Vec::new(),
            routed_experts: None,
            finish,
        })
    }

    fn answer(prompts: Vec<NumberedEvents>) -> Answer {
        Answer {
            open_choices: prompts.len(),
            events: stream::select_all(prompts),
            reply: Some(Box::new(Plain)),
            ready: VecDeque::new(),
            ended: false,
            keep_alive: KEEP_ALIVE,
        }
    }

    fn scripted(prompt: usize, events: Vec<Event>) -> NumberedEvents {
        Box::pin(stream::iter(events).map(move |event| (prompt, event)))
    }

    async fn all_frames(mut answer: Answer) -> Vec<String> {
        let mut frames = Vec::new();
        while let Some(frame) = answer.next_frame().await {
            frames.push(String::from_utf8(frame.to_vec()).expect("UTF-8"));
        }
        frames
    }

    #[tokio::test]
    async fn a_finished_answer_ends_with_its_closing_chunks_and_done() {
        let frames = all_frames(answer(vec![scripted(0, vec![said("a", false), said("b", true)])])).await;
        assert_eq!(frames, ["data: 0:a\n\n", "data: 0:b\n\n", "data: end\n\n", "data: [DONE]\n\n"]);
    }

    #[tokio::test]
    async fn a_failure_is_told_in_the_stream_and_ends_it() {
        let failed = Event::Failed(RequestError::Engine("out of order".into()));
        let never: NumberedEvents = Box::pin(stream::pending());
        let frames = all_frames(answer(vec![scripted(0, vec![said("a", false), failed]), never])).await;
        assert_eq!((frames.len(), frames[0].as_str(), frames[2].as_str()), (3, "data: 0:a\n\n", "data: [DONE]\n\n"));
        let expect =
            r#"data: {"error":{"message":"out of order","type":"InternalServerError","param":null,"code":500}}"#;
        assert_eq!(frames[1].trim_end(), expect);
    }

    #[tokio::test]
    async fn an_engine_that_stops_is_a_failure() {
        let frames = all_frames(answer(vec![scripted(0, vec![said("a", false)])])).await;
        assert!(frames[1].contains("the engine stopped before"), "{frames:?}");
        assert_eq!(frames[2], "data: [DONE]\n\n");
    }

    #[test]
    fn a_long_chunk_is_one_event_too() {
        for length in [0, 1, LARGE_ANSWER, LARGE_ANSWER + 1] {
            let event = frames(vec![b'x'; length]).concat();
            assert_eq!(event, format!("data: {}\n\n", "x".repeat(length)).into_bytes());
        }
    }

    #[tokio::test]
    async fn silence_is_broken_by_comments() {
        let mut silent = answer(vec![Box::pin(stream::pending())]);
        silent.keep_alive = Duration::from_millis(1);
        assert_eq!(silent.next_frame().await.as_deref(), Some(&b": keep-alive\n\n"[..]));
    }
}
