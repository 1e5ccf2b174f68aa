//! The hub's client against a stand-in on a local port.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::settings::HubSettings;
use super::{is_hub_id, is_revision, resolve_with};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const INDEX: &str =
    r#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;

/// A repository `org/name` served as the hub serves it.
struct StandIn {
    endpoint: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

#[derive(Debug, Clone)]
struct Request {
    path: String,
    authorization: Option<String>,
    range: Option<String>,
}

impl StandIn {
    fn start(files: &[(&str, &str)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let files: BTreeMap<String, String> = files.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let log = Arc::clone(&requests);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.unwrap(), &files, &log);
            }
        });
        Self { endpoint, requests }
    }

    fn paths(&self) -> Vec<String> {
        self.requests.lock().unwrap().iter().map(|request| request.path.clone()).collect()
    }
}

fn answer(stream: TcpStream, files: &BTreeMap<String, String>, log: &Mutex<Vec<Request>>) {
    let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut request = Request { path: path.clone(), authorization: None, range: None };
    for line in lines.take_while(|line| !line.is_empty()) {
        let (key, value) = line.split_once(": ").unwrap();
        match key.to_ascii_lowercase().as_str() {
            "authorization" => request.authorization = Some(value.to_owned()),
            "range" => request.range = Some(value.to_owned()),
            _ => {}
        }
    }
    let allowed = request.authorization.as_deref() == Some("Bearer secret");
    let range = request.range.clone();
    log.lock().unwrap().push(request);
    let file = path.strip_prefix(&format!("/org/name/resolve/{COMMIT}/")).and_then(|file| files.get(file));
    let (status, headers, body) = if !allowed {
        ("401 Unauthorized", String::new(), String::new())
    } else if path == "/api/models/org/name/revision/main" {
        let siblings: Vec<_> = files.keys().map(|file| serde_json::json!({ "rfilename": file })).collect();
        ("200 OK", String::new(), serde_json::json!({ "sha": COMMIT, "siblings": siblings }).to_string())
    } else if let Some(body) = file {
        let range = range.unwrap();
        let (from, to) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
        let from: usize = from.parse().unwrap();
        let to: usize = to.parse().unwrap_or(body.len() - 1);
        let headers = format!(
            "ETag: \"etag-{}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Range: bytes {from}-{to}/{}\r\n",
            path.rsplit('/').next().unwrap(),
            body.len()
        );
        ("206 Partial Content", headers, body[from..=to].to_owned())
    } else {
        ("404 Not Found", String::new(), String::new())
    };
    let length = body.len();
    write!(&stream, "HTTP/1.1 {status}\r\n{headers}Content-Length: {length}\r\nConnection: close\r\n\r\n{body}")
        .unwrap();
}

fn settings(cache: &Path, endpoint: &str, token: Option<&str>) -> HubSettings {
    HubSettings {
        cache: cache.to_owned(),
        token: token.map(str::to_owned),
        endpoint: endpoint.to_owned(),
        offline: false,
    }
}

#[test]
fn a_model_is_fetched_once_with_the_token_and_found_offline_after() {
    let hub = StandIn::start(&[
        ("config.json", "{\"a\": 1}"),
        ("tokenizer.json", "{}"),
        ("model.safetensors.index.json", INDEX),
        ("model-00001-of-00002.safetensors", "first shard"),
        ("model-00002-of-00002.safetensors", "second shard"),
        ("pytorch_model.bin", "not wanted"),
        ("README.md", "not wanted"),
    ]);
    let cache = tempfile::tempdir().unwrap();
    let mut settings = settings(cache.path(), &hub.endpoint, Some("secret"));
    let folder = resolve_with(&settings, "org/name", "main").unwrap();
    assert_eq!(std::fs::read_to_string(folder.join("config.json")).unwrap(), "{\"a\": 1}");
    assert_eq!(std::fs::read_to_string(folder.join("model-00002-of-00002.safetensors")).unwrap(), "second shard");
    assert!(hub.paths().iter().all(|path| !path.contains("pytorch_model") && !path.contains("README")));
    let refs = cache.path().join("models--org--name/refs");
    assert_eq!(std::fs::read_to_string(refs.join("main")).unwrap(), COMMIT);
    assert!(!refs.join(COMMIT).exists());

    // Again: one question for the commit, no file.
    let before = hub.paths().len();
    assert_eq!(resolve_with(&settings, "org/name", "main").unwrap(), folder);
    assert_eq!(hub.paths()[before..], ["/api/models/org/name/revision/main"]);

    // Offline, by branch and by commit: no question at all.
    settings.offline = true;
    assert_eq!(resolve_with(&settings, "org/name", "main").unwrap(), folder);
    assert_eq!(resolve_with(&settings, "org/name", COMMIT).unwrap(), folder);
    assert_eq!(hub.paths().len(), before + 1);

    // A file lost from the cache is named offline, and fetched again online.
    std::fs::remove_file(folder.join("model-00001-of-00002.safetensors")).unwrap();
    let error = resolve_with(&settings, "org/name", "main").unwrap_err().to_string();
    assert!(error.contains("HF_HUB_OFFLINE") && error.contains("model-00001-of-00002.safetensors"), "{error}");
    settings.offline = false;
    resolve_with(&settings, "org/name", "main").unwrap();
    assert!(folder.join("model-00001-of-00002.safetensors").is_file());
}

#[test]
fn refusals_say_what_to_do() {
    let hub = StandIn::start(&[("config.json", "{}"), ("pytorch_model.bin", "old")]);
    let cache = tempfile::tempdir().unwrap();
    let check = |model: &str, revision: &str, token: Option<&str>, expected: &[&str]| {
        let error = resolve_with(&settings(cache.path(), &hub.endpoint, token), model, revision).unwrap_err();
        let error = error.to_string();
        for part in expected {
            assert!(error.contains(part), "{error:?} lacks {part:?}");
        }
    };
    check("org/name", "main", None, &["org/name", "401", "set HF_TOKEN"]);
    check("org/name", "main", Some("wrong"), &["401", "another token"]);
    check("org/other", "main", Some("secret"), &["org/other", "404", "no such model"]);
    check("org/name", "v2", Some("secret"), &["404", "\"v2\""]);
    check("org/name", "main", Some("secret"), &["model.safetensors", "found neither"]);
    check("no-such-folder", "main", None, &["no-such-folder", "org/name"]);
    check("org/name", "../../etc", None, &["not a branch"]);
}

#[test]
fn a_hub_out_of_reach_falls_back_to_the_cache() {
    // Bound and dropped: nothing listens there.
    let endpoint = format!("http://{}", TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
    let cache = tempfile::tempdir().unwrap();
    let settings = settings(cache.path(), &endpoint, None);
    let error = resolve_with(&settings, "org/name", "main").unwrap_err().to_string();
    assert!(error.contains("did not give the model"), "{error}");
    let repo = cache.path().join("models--org--name");
    let folder = repo.join("snapshots").join(COMMIT);
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::create_dir_all(repo.join("refs")).unwrap();
    std::fs::write(repo.join("refs/main"), COMMIT).unwrap();
    std::fs::write(folder.join("config.json"), "{}").unwrap();
    resolve_with(&settings, "org/name", "main").unwrap_err();
    std::fs::write(folder.join("model.safetensors"), "").unwrap();
    assert_eq!(resolve_with(&settings, "org/name", "main").unwrap(), folder);
}

#[test]
fn settings_follow_the_variables_of_hugging_face() {
    let read = |vars: &[(&str, &str)]| {
        HubSettings::from_env(&|key| vars.iter().find(|(k, _)| *k == key).map(|(_, v)| v.to_string()))
    };
    assert_eq!(read(&[]), None);
    let home = read(&[("HOME", "/h")]).unwrap();
    assert_eq!(home.cache, Path::new("/h/.cache/huggingface/hub"));
    assert_eq!((home.endpoint.as_str(), home.offline, home.token), ("https://huggingface.co", false, None));
    assert_eq!(read(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]).unwrap().cache, Path::new("/x/huggingface/hub"));
    assert_eq!(read(&[("HOME", "/h"), ("HF_HOME", "/f")]).unwrap().cache, Path::new("/f/hub"));
    let all = read(&[
        ("HF_HOME", "/f"),
        ("HF_HUB_CACHE", "/c"),
        ("HF_TOKEN", " t\n"),
        ("HF_ENDPOINT", "http://mirror/"),
        ("HF_HUB_OFFLINE", "1"),
    ]);
    let all = all.unwrap();
    assert_eq!(all.cache, Path::new("/c"));
    assert_eq!((all.endpoint.as_str(), all.offline, all.token.as_deref()), ("http://mirror", true, Some("t")));
    assert!(!read(&[("HF_HOME", "/f"), ("HF_HUB_OFFLINE", "0")]).unwrap().offline);
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("token"), "login\n").unwrap();
    let login = read(&[("HF_HOME", folder.path().to_str().unwrap())]).unwrap();
    assert_eq!(login.token.as_deref(), Some("login"));
}

#[test]
fn ids_and_revisions_cannot_leave_the_cache() {
    for good in ["Qwen/Qwen3-30B-A3B", "a/b.c_d-e"] {
        assert!(is_hub_id(good), "{good}");
    }
    for bad in ["gpt2", "a/b/c", "../b", "a/..", "/a/b", "a/", "a b/c", "./model"] {
        assert!(!is_hub_id(bad), "{bad}");
    }
    for good in ["main", "refs/pr/1", "v1.0"] {
        assert!(is_revision(good), "{good}");
    }
    for bad in ["", "..", "a/../b", "/etc", "a//b", "a\\b"] {
        assert!(!is_revision(bad), "{bad}");
    }
}
