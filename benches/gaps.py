#!/usr/bin/env python3
"""Whether a long reply of rows holds up the tokens of others.

    python benches/gaps.py --checkpoint FOLDER --out benches/results/NAME.json

One stream decodes all the time. In turn, requests for the same cached prompt of 32769 tokens come with and without 32768
of its rows: both compute the same one token, one also drains, formats and sends its rows. Compared are the gaps between two
tokens of the stream while such a request is answered, and a little after: the largest, which is the step that computes
that token, and the largest of the others, in which the rows are drained, formatted and sent.
"""
import argparse
import http.client
import json
import os
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlparse

import machine

ROOT = Path(__file__).resolve().parent.parent
PROMPT = 32768


def longer(checkpoint, folder):
    """The same weights for longer sequences."""
    for file in checkpoint.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    config = json.loads((checkpoint / "config.json").read_text())
    config["max_position_embeddings"] = PROMPT + 4096
    (folder / "config.json").write_text(json.dumps(config))


def post(address, path, body):
    connection = http.client.HTTPConnection(*address, timeout=3600)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(response.read().decode()[:500])
    return response


class Stream(threading.Thread):
    """A stream that notes when its tokens come."""

    def __init__(self, address):
        super().__init__(daemon=True)
        self.address, self.times = address, []

    def run(self):
        body = dict(token_ids=[7 + i for i in range(16)], stream=True, sampling_params=dict(
            temperature=0, max_tokens=PROMPT, ignore_eos=True, detokenize=False))
        response = post(self.address, "/inference/v1/generate", body)
        while line := response.readline():
            if line.startswith(b"data: {"):
                self.times.append(time.perf_counter())

    def largest_gaps(self, begin, end):
        """The largest gap and the largest of the others, in milliseconds."""
        times = [t for t in self.times if begin - 0.2 <= t <= end]
        return sorted(((b - a) * 1e3 for a, b in zip(times, times[1:])), reverse=True)[:2]


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    ap.add_argument("--checkpoint", type=Path, default=ROOT / "target/bench/qwen3_moe-1b")
    ap.add_argument("--binary", type=Path, default=ROOT / "target/release/moetrail")
    ap.add_argument("--pairs", type=int, default=15)
    ap.add_argument("--out", type=Path, required=True)
    a = ap.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        longer(a.checkpoint, Path(folder))
        child = subprocess.Popen(
            [a.binary, "serve", folder, "--port", "0", "--num-gpu-blocks-override", str(2 * PROMPT // 16 + 64)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "RUST_LOG": "error"})
        try:
            url = urlparse(child.stdout.readline().split()[-1])
            measure(a, (url.hostname, url.port))
        finally:
            child.kill()
            child.wait()


def measure(a, address):
    vocab = json.loads((a.checkpoint / "config.json").read_text())["vocab_size"]
    # One token behind the last full block is all that a hit leaves to compute.
    prompt = [3 + (i * 7919) % (vocab - 3) for i in range(PROMPT + 1)]

    def probe(rows):
        body = dict(token_ids=prompt, return_routed_experts=rows, routed_experts_prompt_start=1,
                    sampling_params=dict(temperature=0, max_tokens=1))
        response = post(address, "/inference/v1/generate", body)
        return len(response.read())

    began = time.perf_counter()
    probe(False)
    print(f"the prompt was computed in {time.perf_counter() - began:.0f} s", flush=True)
    stream = Stream(address)
    stream.start()
    time.sleep(3)
    results = {True: [], False: [], None: []}
    size = 0
    for index in range(a.pairs):
        for rows in (True, False, None) if index % 2 else (None, False, True):
            time.sleep(0.5)
            begin = time.perf_counter()
            if rows is not None:
                size = max(size, probe(rows))
            time.sleep(0.3)
            results[rows].append(stream.largest_gaps(begin, time.perf_counter()))
    grown = [[w - o for w, o in zip(with_rows, without)] for with_rows, without in zip(results[True], results[False])]
    report = dict(checkpoint=a.checkpoint.name, machine=machine.describe(), prompt_tokens=PROMPT, reply_bytes=size,
                  gap_ms_alone=results[None], gap_ms_without_rows=results[False], gap_ms_with_rows=results[True],
                  grown_ms_median=[statistics.median(pair[i] for pair in grown) for i in (0, 1)])
    a.out.write_text(json.dumps(report, indent=1) + "\n")
    for name, key in (("alone", None), ("a request without rows", False), ("a request with rows", True)):
        for index, which in enumerate(("largest gap", "largest of the others")):
            values = sorted(pair[index] for pair in results[key])
            print(f"{which}, {name}: median {statistics.median(values):.2f} ms, {values[0]:.2f} to {values[-1]:.2f}")
    first, others = report["grown_ms_median"]
    print(f"with rows they grow by {first:.2f} and {others:.2f} ms (medians of {len(grown)} pairs); the reply has {size} bytes")


if __name__ == "__main__":
    main()
