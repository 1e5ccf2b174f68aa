#!/usr/bin/env python3
"""How much routing changes with the weights' format: the same texts through a model in bf16 and in other formats.

    python benches/selections.py --out NAME.json FOLDER int8="FOLDER --quantization int8" q4_k=FILE.gguf ...

Each variant is a name and the words that follow `moetrail serve`; the first argument is the model that it is compared with.
Counted over all (layer, token) cells of the prompts: the share whose sets of experts differ, and the share of single
selections that the other model did not make. The router itself is never quantised: what changes comes from its input.
"""
import argparse
import base64
import json
import math
import os
import shlex
import subprocess
import urllib.request
from pathlib import Path

import machine
from peers.prompts import prompt

ROOT = Path(__file__).resolve().parent.parent


def arguments():
    ap = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    ap.add_argument("model", help="served in bf16; every variant is compared with it")
    ap.add_argument("variants", nargs="+", metavar="NAME=WORDS")
    ap.add_argument("--binary", type=Path, default=ROOT / "target/release/moetrail")
    ap.add_argument("--prompts", type=int, default=8)
    ap.add_argument("--prompt-len", type=int, default=256)
    ap.add_argument("--out", type=Path, required=True)
    return ap.parse_args()


def scored(a, words):
    """(rows of expert ids by layer, log-probabilities) of every prompt."""
    command = [a.binary, "serve", *shlex.split(words), "--dtype", "bfloat16", "--port", "0", "--max-model-len", str(a.prompt_len + 2)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "RUST_LOG": "error"})
    try:
        url = child.stdout.readline().split()[-1]
        with urllib.request.urlopen(url + "/v1/models") as answer:
            name = json.loads(answer.read())["data"][0]["id"]
        return [scored_prompt(url, name, prompt(a.prompt_len, salt, 4096)) for salt in range(a.prompts)]
    finally:
        child.terminate()
        child.wait()


def scored_prompt(url, name, ids):
    body = dict(model=name, token_ids=ids, sampling_params=dict(max_tokens=1, temperature=0, prompt_logprobs=0), routed_experts_prompt_start=0)
    request = urllib.request.Request(url + "/inference/v1/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        reply = json.loads(response.read())
    found = reply["choices"][0]["routed_experts"]
    rows, layers, top_k = found["shape"]
    size = 2 if found["dtype"] == "uint16" else 1
    flat = memoryview(base64.b64decode(found["data"])).cast("H" if size == 2 else "B")
    cells = [frozenset(flat[at:at + top_k]) for at in range(0, rows * layers * top_k, top_k)]
    entries = reply["prompt_logprobs"][1:]
    return cells, [entry[str(token)]["logprob"] for entry, token in zip(entries, ids[1:])]


def compared(expected, found):
    cells = [(a, b) for (ours, _), (theirs, _) in zip(expected, found) for a, b in zip(ours, theirs)]
    shift = [abs(a - b) for (_, ours), (_, theirs) in zip(expected, found) for a, b in zip(ours, theirs)]
    score = lambda runs: math.exp(-sum(sum(each) for _, each in runs) / sum(len(each) for _, each in runs))
    return dict(cells=len(cells), sets_changed=sum(a != b for a, b in cells) / len(cells),
                selections_changed=sum(len(a - b) for a, b in cells) / sum(len(a) for a, _ in cells),
                mean_logprob_shift=sum(shift) / len(shift), perplexity_ratio=score(found) / score(expected))


def main():
    a = arguments()
    expected = scored(a, a.model)
    variants = dict(word.split("=", 1) for word in a.variants)
    result = dict(machine=machine.describe(), prompts=a.prompts, prompt_len=a.prompt_len,
                  variants={name: compared(expected, scored(a, words)) for name, words in variants.items()})
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, found in result["variants"].items():
        print(f"{name:<10} sets {found['sets_changed']:7.2%}  selections {found['selections_changed']:7.2%}  "
              f"|shift of log-probabilities| {found['mean_logprob_shift']:.4f}  perplexity x {found['perplexity_ratio']:.4f}")


if __name__ == "__main__":
    main()
