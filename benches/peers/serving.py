"""The server under many requests at once, against the engine's own rate of the same requests without HTTP."""
import asyncio
import json
import os
import subprocess
import time
from urllib.parse import urlparse

import machine
from engines import SERVED
from prompts import prompt


def request(index, vocab):
    """As in `moetrail bench --mixed`: 32 to 511 tokens of prompt, 16 to 127 to generate."""
    return dict(prompt=prompt(32 + index * 97 % 480, 1000 + index, vocab), max_tokens=16 + index * 53 % 112, temperature=0, ignore_eos=True,
                stream=True, stream_options=dict(include_usage=True))


async def stream(address, body, start):
    """Sends one request once all are connected. Returns when its tokens came, from the start, and how many there were."""
    reader, writer = await asyncio.open_connection(*address)
    text = json.dumps(body)
    await start.wait()
    began, lines = time.perf_counter(), []
    writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nConnection: close\r\n"
                 f"Content-Length: {len(text)}\r\n\r\n{text}".encode())
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            lines.append((time.perf_counter() - began, line))  # parsed afterwards: the engine wants the processors
    writer.close()
    events = [(at, json.loads(line[6:])) for at, line in lines]
    if not events or not (usage := events[-1][1].get("usage")):
        raise RuntimeError(f"no answer, or no usage at its end: {events[-1:]}")
    return [at for at, event in events if event["choices"]], usage["completion_tokens"]


async def burst(address, bodies):
    """All requests at once: tokens per second until the last one, and the times of every token."""
    start = asyncio.Event()
    tasks = [asyncio.create_task(stream(address, body, start)) for body in bodies]
    await asyncio.sleep(0.2)
    start.set()
    began = time.perf_counter()
    answers = await asyncio.gather(*tasks)
    seconds = time.perf_counter() - began
    gaps = [b - a for times, _ in answers for a, b in zip(times, times[1:])]
    tokens = sum(tokens for _, tokens in answers)
    return dict(tokens_per_second=tokens / seconds, tokens=tokens, events=sum(len(times) for times, _ in answers),
                ttft_ms=percentiles([times[0] for times, _ in answers]), itl_ms=percentiles(gaps))


def percentiles(seconds):
    ordered = sorted(seconds)
    return {f"p{percent}": round(ordered[min(len(ordered) * percent // 100, len(ordered) - 1)] * 1e3, 2) for percent in (50, 90, 99)}


def serve(engines, size, bodies, reps):
    """`reps` bursts against a fresh server, after one that is not counted."""
    words = [*engines.moetrail("serve", size, "bf16"), "--port", 0, "--max-model-len", SERVED + 1, "--max-num-seqs", len(bodies),
             "--no-enable-prefix-caching"]
    env = {**os.environ, "RUST_LOG": "error"}
    server = subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
    try:
        line = server.stdout.readline()
        if not line:
            return dict(error="the server did not start")
        url = urlparse(line.split()[-1])
        asyncio.run(burst((url.hostname, url.port), bodies))
        usage, own = machine.Usage(server.pid), time.process_time()
        bursts = [asyncio.run(burst((url.hostname, url.port), bodies)) for _ in range(reps)]
        return dict(bursts=bursts, client_cpu_seconds=round(time.process_time() - own, 3), **usage.found())
    finally:
        server.terminate()
        server.wait()


def servings(engines, size, requests, count, reps, say):
    """`count` rounds of the server and of the engine alone, alternately first."""
    vocab = json.loads((engines.checkpoint(size) / "config.json").read_text())["vocab_size"]
    bodies, found = [request(index, vocab) for index in range(requests)], []
    runs = dict(served=lambda: engines.again(lambda: serve(engines, size, bodies, reps)),
                offline=lambda: engines.run("moetrail", size, "bf16", {}, mixed=requests, reps=reps))
    for index in range(count):
        round_ = {}
        for name in list(runs)[::1 if index % 2 == 0 else -1]:
            say(f"round {index + 1} of {count}: {requests} requests, {name}")
            round_[name] = runs[name]()
        found.append(round_)
    return found
