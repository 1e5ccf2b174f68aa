//! The real binary as a child process, spoken to over HTTP.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::golden_folder;

/// A running `moetrail serve`; killed when dropped.
pub struct Server {
    child: Child,
    url: String,
    agent: ureq::Agent,
}

/// Status and body of an answer.
pub struct Answer {
    pub status: u16,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
}

impl Server {
    /// Serves a golden checkpoint on a free port and waits for the ready line.
    pub fn start(model: &str, flags: &[&str]) -> Self {
        let folder = golden_folder(model);
        Self::spawn(Command::new(env!("CARGO_BIN_EXE_moetrail")).arg("serve").arg(folder).args(flags))
    }

    /// Serves the bundled model.
    pub fn bundled(flags: &[&str]) -> Self {
        Self::spawn(Command::new(env!("CARGO_BIN_EXE_moetrail")).arg("serve").args(flags))
    }

    pub fn spawn(command: &mut Command) -> Self {
        let command = command.args(["--port", "0"]).env("RUST_LOG", "warn").stdout(Stdio::piped());
        let mut child = command.spawn().expect("the binary starts");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("stdout is piped");
        BufReader::new(stdout).read_line(&mut line).expect("stdout is text");
        let url = line.trim().strip_prefix("listening on ").unwrap_or_else(|| panic!("not the ready line: {line:?}"));
        let config = ureq::Agent::config_builder().http_status_as_error(false).build();
        Self { child, url: url.to_owned(), agent: config.into() }
    }

    pub fn get(&self, path: &str) -> Answer {
        let mut response = self.agent.get(format!("{}{path}", self.url)).call().expect("the server answers");
        let status = response.status().as_u16();
        Answer { status, body: response.body_mut().read_to_string().expect("the body is text") }
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_text(path, &body.to_string())
    }

    pub fn post_text(&self, path: &str, body: &str) -> Answer {
        let request = self.agent.post(format!("{}{path}", self.url)).content_type("application/json");
        let mut response = request.send(body).expect("the server answers");
        let status = response.status().as_u16();
        Answer { status, body: response.body_mut().read_to_string().expect("the body is text") }
    }

    /// Sends a request and drops the connection after the first bytes of the answer.
    pub fn post_and_hang_up(&self, path: &str, body: &Value) {
        let request = self.agent.post(format!("{}{path}", self.url)).content_type("application/json");
        let mut response = request.send(body.to_string()).expect("the server answers");
        let mut first = [0u8; 16];
        response.body_mut().as_reader().read_exact(&mut first).expect("the answer begins");
    }

    /// The value of a metric, over all labels.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").body;
        let lines = text.lines().filter(|line| line.starts_with(name) && line[name.len()..].starts_with(['{', ' ']));
        let values = lines.map(|line| line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok()));
        let sum = values.map(|value| value.expect("a metric is a number")).reduce(|a, b| a + b);
        sum.unwrap_or_else(|| panic!("no {name} in\n{text}"))
    }

    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args([name, &self.child.id().to_string()]).status().expect("kill runs");
        assert!(status.success());
    }

    /// Waits for the process to end by itself.
    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(status) = self.child.try_wait().expect("the child can be waited for") {
                return status;
            }
            assert!(Instant::now() < deadline, "the server did not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
