"""What the parts share: the binary and where it runs, servers and requests to them, and what a part has found."""
import base64
import contextlib
import http.client
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlparse

ROOT = Path(__file__).resolve().parents[2]
CARRIED = ROOT / "target/gpu"
BUILT = ROOT / "target/release"
SCRATCH = ROOT / "target/gpu-scratch"
GENERATE = "/inference/v1/generate"
sys.path[:0] = [str(ROOT / "tests/golden"), str(ROOT / "tests/live")]

# A dry run takes what cargo built; on a GPU's machine there is no cargo, and `pack` has brought these along.
BINARIES = dict(moetrail=BUILT / "moetrail", gpu_bench=BUILT / "examples/gpu_bench", gpu_tests=BUILT / "deps")


class Skip(Exception):
    """A part that cannot run here, and why."""


class Rig:
    """One part's run: `found` is written to the file whenever something is added, so that a killed part leaves what it had."""

    def __init__(self, part, dry, file):
        self.part, self.dry, self.file = part, dry, Path(file)
        self.device = "cpu" if dry else "cuda"
        # Where moetrail computes. A dry run of the CUDA build, under a stand-in for the driver's library, names cuda.
        self.served = os.environ.get("MOETRAIL_DRY_DEVICE", "cpu") if dry else "cuda"
        self.found = dict(checks=[])
        self.lock = threading.Lock()

    def save(self):
        text = json.dumps(self.found)
        part = self.file.with_suffix(".part")
        part.write_text(text)
        part.replace(self.file)

    def note(self, **values):
        with self.lock:
            self.found.update(values)
            self.save()

    def check(self, name, ok, detail=""):
        with self.lock:
            self.found["checks"].append(dict(name=name, ok=bool(ok), detail=str(detail)))
            print(f"{'ok    ' if ok else 'FAILED'} {name}{': ' if detail else ''}{detail}", flush=True)
            self.save()
        return ok

    def size(self, dry, full):
        return dry if self.dry else full

    def binary(self, name):
        if not self.dry:
            path = CARRIED / name
        elif name == "gpu_tests":
            tests = [file for file in BINARIES[name].glob("gpu-*") if not file.suffix and os.access(file, os.X_OK)]
            path = max(tests, key=lambda file: file.stat().st_mtime, default=CARRIED / name)
        else:
            path = BINARIES[name]
        if not path.exists():
            raise Skip(f"there is no {path.relative_to(ROOT)}")
        return path

    def model(self, name):
        """A checkpoint's folder; in a dry run the goldens stand for those that are made on a GPU's machine."""
        folder = dict(tiny="qwen3_moe-a", small="qwen3_moe-b").get(name) if self.dry else None
        folder = ROOT / "tests/golden" / folder if folder else SCRATCH / name
        if not (folder / "config.json").exists():
            raise Skip(f"the checkpoint {name} was not made")
        return folder

    @contextlib.contextmanager
    def serve(self, model, *flags, device=None, dtype="bfloat16", blocks=None, deterministic=True):
        """A server, which gives a request the same bits in any company. Its pool has a size of its own, so that several
        share a GPU's memory."""
        device = device or self.served
        words = [self.binary("moetrail"), "serve", model, "--device", device, "--dtype", dtype, "--port", 0,
                 "--num-gpu-blocks-override", blocks or self.size(256, 2048), *flags]
        if deterministic:
            words.append("--deterministic")
        if device == "cpu" and not self.dry:
            words += ["--threads", 4]
        print("$", *words, flush=True)
        env = {**os.environ, "RUST_LOG": "warn"}
        with tempfile.TemporaryFile("w+") as said:
            server = subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, stderr=said, text=True, env=env)
            try:
                line = server.stdout.readline()
                if not line:
                    said.seek(0)
                    raise RuntimeError(f"the server did not start: {' '.join(said.read().split())[-300:]}")
                yield Server(line.split()[-1])
            finally:
                server.terminate()
                try:
                    server.wait(10)
                except subprocess.TimeoutExpired:
                    server.kill()
                said.seek(0)
                print(said.read(), end="", flush=True)


def watch(words, heard):
    """Runs a command that tells on standard error, in lines of JSON, what it has measured so far. Returns its standard output."""
    print("$", *words, flush=True)
    process = subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said, measures = [], []

    def listen():
        for line in process.stderr:
            print(line, end="", flush=True)
            said.append(line.strip())
            if line.startswith("{"):
                measures.append(json.loads(line))
                heard(measures)

    listener = threading.Thread(target=listen)
    listener.start()
    text = process.stdout.read()
    listener.join()
    if process.wait() != 0:
        raise RuntimeError(f"{Path(words[0]).name} ended with {process.returncode}: {' '.join(said[-2:])}")
    return text


class Server:
    def __init__(self, url):
        self.url = urlparse(url)

    def ask(self, method, path, body=None):
        connection = http.client.HTTPConnection(self.url.hostname, self.url.port, timeout=120)
        try:
            connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"})
            reply = connection.getresponse()
            text = reply.read().decode()
            if reply.status != 200:
                raise RuntimeError(f"HTTP {reply.status} of {path}: {text[:500]}")
            return text
        finally:
            connection.close()

    def generate(self, body):
        return json.loads(self.ask("POST", GENERATE, body))

    def together(self, bodies):
        """Answers to requests that begin at once: a small model would have answered the first before the last one came."""
        self.ask("POST", "/pause?mode=keep")
        with ThreadPoolExecutor(len(bodies)) as pool:
            answers = [pool.submit(self.generate, body) for body in bodies]
            end = time.monotonic() + 10
            while self.metric("vllm:num_requests_waiting") < len(bodies) and time.monotonic() < end:
                time.sleep(0.01)
            self.ask("POST", "/resume")
            return [answer.result() for answer in answers]

    def stream(self, body):
        """The chunks of an answer in pieces."""
        lines = self.ask("POST", GENERATE, dict(body, stream=True)).splitlines()
        data = [line[6:] for line in lines if line.startswith("data: ")]
        if data[-1] != "[DONE]":
            raise RuntimeError(f"the stream ends with {data[-1]!r}")
        return [json.loads(line) for line in data[:-1]]

    def metric(self, name, label=""):
        lines = self.ask("GET", "/metrics").splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{") and label in line)

    def score(self, ids, rows=None):
        """Log-probabilities of ids 1 and later, the rows of all, and the whole reply; under given routing or free."""
        body = dict(token_ids=ids, return_routed_experts=True, sampling_params=dict(max_tokens=0, prompt_logprobs=0))
        if rows is not None:
            body["routed_experts_replay"] = encode(rows)
        reply = self.generate(body)
        logprobs = [entry[str(token)]["logprob"] for token, entry in zip(ids[1:], reply["prompt_logprobs"][1:])]
        return logprobs, decode(reply["choices"][0]), reply


def ask(prompt, max_tokens, start=0, **sampling):
    """A request for tokens, their log-probabilities and rows; greedy unless a temperature is given."""
    sampling = dict(dict(temperature=0, ignore_eos=True, logprobs=1), max_tokens=max_tokens, **sampling)
    return dict(token_ids=prompt, return_routed_experts=True, routed_experts_prompt_start=start, sampling_params=sampling)


def decode(choice):
    """Rows of the object form as int64 [rows, layers, top_k]."""
    import numpy as np  # not needed by the parts that measure
    rows = choice.get("routed_experts")
    if rows is None:
        raise RuntimeError(f"no rows: {choice.get('routed_experts_error')}")
    kind = {"uint8": "u1", "uint16": "<u2"}[rows["dtype"]]
    return np.frombuffer(base64.b64decode(rows["data"]), kind).reshape(rows["shape"]).astype(np.int64)


def encode(rows):
    wide = rows.max() > 255
    data = base64.b64encode(rows.astype("<u2" if wide else "u1").tobytes()).decode()
    return dict(data=data, shape=list(rows.shape), start=0, dtype="uint16" if wide else "uint8")


def sampled(choice):
    return [entry["logprob"] for entry in choice["logprobs"]["content"]]


def row_bytes(model):
    """Bytes of a row in the ring: layers with experts alone."""
    c = json.loads((Path(model) / "config.json").read_text())
    experts = c.get("num_experts") or c.get("num_local_experts")
    layers = c["num_hidden_layers"] - len(c.get("mlp_only_layers") or [])
    return layers * c["num_experts_per_tok"] * (1 if experts <= 256 else 2)


def why_no_transformers():
    """None where torch and transformers can be imported, else what is missing."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    return f"python has no {' and no '.join(missing)}" if missing else None
