//! What happens when a connection or the server ends.

use std::net::SocketAddr;
use std::time::Duration;

use moetrail_engine::EngineConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::support::Server;

const PATIENCE: Duration = Duration::from_secs(60);
/// Enough choices that the answer takes far longer than a connection needs to close.
const LONG: &str = r#""n":64,"max_tokens":500,"ignore_eos":true"#;

async fn listen(server: &Server) -> (SocketAddr, oneshot::Sender<()>, JoinHandle<std::io::Result<()>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    let (stop, stopped) = oneshot::channel::<()>();
    let shutdown = async {
        let _ = stopped.await;
    };
    (address, stop, tokio::spawn(moetrail_server::serve(listener, server.state.clone(), shutdown)))
}

async fn send(address: SocketAddr, fields: &str) -> TcpStream {
    let body = format!(r#"{{"prompt":"a",{fields}}}"#);
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
    let mut connection = TcpStream::connect(address).await.expect("listening");
    connection.write_all((head + &body).as_bytes()).await.expect("open");
    connection
}

async fn until(mut done: impl AsyncFnMut() -> bool) {
    timeout(PATIENCE, async {
        while !done().await {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
    .expect("it happens in time");
}

/// A client that sends all of a body that is too large, and reads only then, still learns what was wrong.
#[tokio::test]
async fn a_body_too_large_is_answered_after_it_was_sent() {
    let server = Server::start();
    let small = Server { state: server.state.clone().with_body_limit(100), engine: server.engine.clone() };
    let (address, _stop, _serving) = listen(&small).await;
    // More than the buffers of a connection hold.
    let mut connection = send(address, &format!(r#""suffix":"{}""#, "x".repeat(32 << 20))).await;
    let mut answer = [0; 12];
    connection.read_exact(&mut answer).await.expect("answered");
    assert_eq!(&answer, b"HTTP/1.1 413");
}

/// The choices of `LONG` end by abort once its client is gone.
async fn is_cancelled(stream: bool) {
    let server = Server::with(EngineConfig { max_num_seqs: 64, ..EngineConfig::default() }, None);
    let (address, _stop, _serving) = listen(&server).await;
    let mut connection = send(address, &format!(r#"{LONG},"stream":{stream}"#)).await;
    until(async || server.engine.num_live() == 1).await;
    if stream {
        // The answer is under way.
        assert!(connection.read(&mut [0; 64]).await.expect("open") > 0);
    }
    drop(connection);
    until(async || server.engine.num_live() == 0).await;
    assert!(server.aborted().await > 0.0);
}

#[tokio::test]
async fn a_stream_is_cancelled_when_its_client_goes() {
    is_cancelled(true).await;
}

#[tokio::test]
async fn an_answer_in_one_piece_is_cancelled_when_its_client_goes() {
    is_cancelled(false).await;
}

#[tokio::test]
async fn shutdown_finishes_what_runs_and_takes_nothing_new() {
    let server = Server::start();
    let (address, stop, serving) = listen(&server).await;
    // A pause holds the request until the shutdown, which ends pauses.
    server.post("/pause?mode=keep", "").await.json();
    let mut connection = send(address, r#""n":8,"max_tokens":400,"ignore_eos":true,"stream":true"#).await;
    until(async || server.engine.num_live() == 1).await;
    stop.send(()).expect("still serving");
    let mut text = String::new();
    timeout(PATIENCE, connection.read_to_string(&mut text)).await.expect("it ends").expect("UTF-8");
    assert!(text.contains("data: [DONE]"), "{}", &text[text.len().saturating_sub(200)..]);
    assert_eq!(text.matches(r#""finish_reason":"length""#).count(), 8);
    timeout(PATIENCE, serving).await.expect("it returns").expect("no panic").expect("no error");
    assert!(TcpStream::connect(address).await.is_err());
}
