//! A server on a golden checkpoint, called in process.

use std::path::Path;
use std::sync::Arc;

use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Method, Request, StatusCode};
use moetrail_api::DefaultSampling;
use moetrail_engine::{Engine, EngineConfig, EngineHandle};
use moetrail_models::{Checkpoint, DtypeChoice};
use moetrail_server::AppState;
use moetrail_text::Tokenizer;
use serde_json::Value;
use tower::ServiceExt;

/// Layers and experts per token of the checkpoint.
pub const SHAPE: (usize, usize) = (3, 2);

/// An engine of its own and the server over it.
pub struct Server {
    pub engine: EngineHandle,
    pub state: AppState,
}

/// What came back.
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub text: String,
}

impl Server {
    pub fn start() -> Self {
        Self::with(EngineConfig::default(), None)
    }

    pub fn with(config: EngineConfig, api_key: Option<&str>) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/mixtral-a");
        let checkpoint = Checkpoint::open_folder(&folder, "toy").expect("the golden checkpoint opens");
        let tokenizer = Tokenizer::from_dir(&folder).expect("its tokenizer loads").map(Arc::new);
        let decoder = checkpoint.load(DtypeChoice::Auto, false).expect("it loads");
        let config = EngineConfig { served_model_names: vec!["org/toy".into()], num_blocks: Some(4096), ..config };
        let engine = Engine::start(decoder, tokenizer, checkpoint.eos_token_ids(), config).expect("it starts").handle();
        let state = AppState::new(engine.clone(), DefaultSampling::default(), None, api_key.map(str::to_owned));
        Self { engine, state }
    }

    pub async fn call(&self, request: Request<Body>) -> Answer {
        let response = moetrail_server::app(self.state.clone()).oneshot(request).await.expect("the service answers");
        let (status, headers) = (response.status(), response.headers().clone());
        let body = to_bytes(response.into_body(), 64 << 20).await.expect("the body ends");
        Answer { status, headers, text: String::from_utf8(body.to_vec()).expect("UTF-8") }
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.call(request(Method::GET, path, "")).await
    }

    pub async fn post(&self, path: &str, body: &str) -> Answer {
        self.call(request(Method::POST, path, body)).await
    }

    /// The value of a metric, its labels included in the name.
    pub async fn metric(&self, start: &str) -> f64 {
        let text = self.get("/metrics").await.text;
        let line = text.lines().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("{start} in\n{text}"));
        line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number")
    }

    /// Requests ended by their client.
    pub async fn aborted(&self) -> f64 {
        self.metric(r#"vllm:request_success_total{model_name="org/toy",engine="0",finished_reason="abort"}"#).await
    }
}

impl Answer {
    #[track_caller]
    pub fn json(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text);
        serde_json::from_str(&self.text).expect("JSON")
    }

    /// The chunks of a stream, which must end with the mark of its end.
    #[track_caller]
    pub fn chunks(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.text);
        assert!(self.headers["content-type"].as_bytes().starts_with(b"text/event-stream"));
        let events = self.text.strip_suffix("data: [DONE]\n\n").expect("the mark of the end");
        let data = events.split_terminator("\n\n").map(|event| event.strip_prefix("data: ").expect("data"));
        data.map(|json| serde_json::from_str(json).expect("JSON")).collect()
    }

    /// Checks an error's status, param and a part of its message.
    #[track_caller]
    pub fn refused(&self, status: u16, param: Option<&str>, part: &str) {
        assert_eq!(self.status, status, "{}", self.text);
        let body: Value = serde_json::from_str(&self.text).expect("JSON");
        let error = &body["error"];
        assert_eq!((error["param"].as_str(), error["code"].as_u64()), (param, Some(status.into())), "{error}");
        assert!(error["message"].as_str().is_some_and(|message| message.contains(part)), "{error}");
        assert!(error["type"].is_string());
    }
}

pub fn request(method: Method, path: &str, body: &str) -> Request<Body> {
    Request::builder().method(method).uri(path).body(Body::from(body.to_owned())).expect("a valid request")
}
