#!/usr/bin/env python3
"""What replaying the rollout's routing is worth: an engine in bf16 against a trainer in f32, on one checkpoint.

    python benches/replay.py --out benches/results/NAME.json [--model FOLDER] [--binary target/release/moetrail]

The engine samples completions at temperature 1 in bf16 and returns the rows; transformers in f32, standing for the
trainer, scores the same tokens twice: routed by itself, and forced to the engine's rows. Reported are the share of
(layer, token) selections whose sets differ, the share of tokens with any such layer, and the k3 estimate of the KL
divergence between trainer and engine, mean of r - log r - 1 with r = exp(logp_trainer - logp_engine) over the sampled
tokens (prime-rl's `mismatch_kl`). Needs tests/golden/requirements.txt.
"""
import argparse
import base64
import json
import os
import random
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import torch

import machine

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests/golden"))
from reference import Reference  # noqa: E402


def serve(binary, model):
    child = subprocess.Popen([binary, "serve", model, "--port", "0", "--dtype", "bfloat16"], stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL, text=True, env={**os.environ, "RUST_LOG": "error"})
    return child, child.stdout.readline().split()[-1]


def generate(url, body):
    request = urllib.request.Request(url + "/inference/v1/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.loads(response.read())["choices"][0]


def k3(trainer, engine):
    log_ratio = np.array(trainer) - np.array(engine)
    return np.exp(log_ratio) - log_ratio - 1


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    ap.add_argument("--model", type=Path, default=ROOT / "models/bundled")
    ap.add_argument("--binary", type=Path, default=ROOT / "target/release/moetrail")
    ap.add_argument("--rollouts", type=int, default=64)
    ap.add_argument("--prompt-len", type=int, default=32)
    ap.add_argument("--max-tokens", type=int, default=128)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--out", type=Path, required=True)
    a = ap.parse_args()
    ref, draw = Reference(a.model, torch.float32), random.Random(a.seed)
    child, url = serve(a.binary, a.model)
    free, forced, differ, touched, counted = [], [], 0, 0, [0, 0]
    try:
        for index in range(a.rollouts):
            prompt = [draw.randrange(3, ref.model.config.vocab_size) for _ in range(a.prompt_len)]
            choice = generate(url, dict(token_ids=prompt, return_routed_experts=True, sampling_params=dict(
                temperature=1.0, seed=a.seed * 1000 + index, max_tokens=a.max_tokens, logprobs=1)))
            engine = [entry["logprob"] for entry in choice["logprobs"]["content"]]
            payload, ids = choice["routed_experts"], prompt + choice["token_ids"]
            kind = {"uint8": "u1", "uint16": "<u2"}[payload["dtype"]]
            rows = np.frombuffer(base64.b64decode(payload["data"]), kind).reshape(payload["shape"]).astype(np.int64)
            for given, into in ((None, free), (rows, forced)):
                logp = ref.forward(ids, given)
                into += list(k3([logp[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))], engine))
                if given is None:
                    own = ref.rows(len(rows))[0].numpy()[:, ref.moe_layers]
                    other = (np.sort(own, -1) != np.sort(rows[:, ref.moe_layers], -1)).any(-1)
                    differ, touched = differ + int(other.sum()), touched + int(other.any(-1).sum())
                    counted = [counted[0] + other.size, counted[1] + len(other)]
    finally:
        child.terminate()
        child.wait()
    result = dict(
        model=a.model.name, rollouts=a.rollouts, sampled_tokens=len(free), machine=machine.describe(), torch=torch.__version__,
        selections_differing=differ / counted[0], tokens_with_any_differing=touched / counted[1],
        k3_free=float(np.mean(free)), k3_replayed=float(np.mean(forced)),
        k3_free_largest=float(np.max(free)), k3_replayed_largest=float(np.max(forced)))
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        f"{result['sampled_tokens']} tokens of {a.rollouts} rollouts of `{a.model.name}`: engine in bf16, trainer in f32.", "",
        "| | routed by the trainer | engine's rows replayed |", "|---|---|---|",
        f"| (layer, token) selections that differ | {result['selections_differing']:.2%} | 0 |",
        f"| tokens with any differing layer | {result['tokens_with_any_differing']:.1%} | 0 |",
        f"| k3 KL, mean | {result['k3_free']:.2e} | {result['k3_replayed']:.2e} |",
        f"| k3 KL, largest token | {result['k3_free_largest']:.2e} | {result['k3_replayed_largest']:.2e} |"]
    table = "\n".join(lines) + "\n"
    a.out.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
