#!/usr/bin/env python3
"""moetrail against transformers on one checkpoint, in one run, and capture on against capture off.

    python benches/compare.py --out benches/results/NAME.json

Writes raw results to NAME.json and a table to NAME.md. Needs a C compiler, target/release/moetrail, and for the peer (and for
making the checkpoint, where there is none yet) an interpreter with tests/golden/requirements.txt: --python.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import capture
import checkpoints
import machine
import report
from weights import Weights

ROOT = Path(__file__).resolve().parent.parent
BUSY = 0.10  # of the machine, used by others: such a run is marked


def arguments():
    ap = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    ap.add_argument("--checkpoint", type=Path, help="qwen3_moe folder; made there if absent [target/bench/qwen3_moe-1b]")
    ap.add_argument("--binary", type=Path, default=ROOT / "target/release/moetrail")
    ap.add_argument("--python", default=sys.executable, help="interpreter that has transformers")
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    ap.add_argument("--rounds", type=int, default=3, help="runs of each engine, in turn")
    ap.add_argument("--reps", type=int, default=3, help="repetitions of each measure in a run")
    ap.add_argument("--prompt-len", type=int, default=512)
    ap.add_argument("--batch", default="1,8")
    ap.add_argument("--gen-len", type=int, default=33)
    ap.add_argument("--pairs", type=int, default=60, help="pairs of measures with and without capture")
    ap.add_argument("--pair-prompt-len", type=int, default=128)
    ap.add_argument("--pair-gen-len", type=int, default=17)
    ap.add_argument("--lull", type=float, default=3, help="seconds to wait at most, before each run, for others to be idle")
    ap.add_argument("--quick", action="store_true", help="a small checkpoint, few runs: tries the script, measures nothing")
    a = ap.parse_args()
    a.size = "1b"
    if a.quick:
        a.size, a.rounds, a.reps, a.gen_len, a.pair_gen_len, a.pairs, a.lull = "small", 1, 1, 9, 9, 2, 1
    a.checkpoint = a.checkpoint or ROOT / f"target/bench/qwen3_moe-{a.size}"
    return a


def logged(stderr, field):
    """The last value of a `field=number` on moetrail's log."""
    values = re.findall(rf"\b{field}=(\d+)", stderr)
    return int(values[-1]) if values else None


def watched(a, command):
    machine.wait_for_lull(a.lull)
    run = machine.watch(command, env={"NO_COLOR": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(a.threads)})
    run["busy"] = run["others_share"] > BUSY
    run["report"] = json.loads(run.pop("stdout").splitlines()[-1])
    run["report"].pop("model", None)  # a path of this machine; the checkpoint is told once, above
    return run


def moetrail(a, prompt_len, gen_len, reps, pairs=0):
    # A short context keeps the KV pool small, so that the bound on memory means something.
    longest = max(prompt_len, 32 + gen_len) + 1
    command = [a.binary, "bench", a.checkpoint, "--dtype", "bfloat16", "--threads", a.threads, "--max-model-len", longest,
               "--prompt-len", prompt_len, "--batch", a.batch, "--gen-len", gen_len, "--reps", reps, "--capture-pairs", pairs]
    run = watched(a, command)
    stderr = run.pop("stderr")
    return dict(run, engine="moetrail", **{field: logged(stderr, field) for field in ("packed_mib", "kv_mib", "ring_kib")})


def transformers(a):
    threads = ",".join(map(str, sorted({1, a.threads})))
    command = [a.python, ROOT / "benches/peers/transformers_worker.py", a.checkpoint, "--threads", threads, "--prompt-len", a.prompt_len, "--batch", a.batch, "--gen-len", a.gen_len, "--reps", a.reps]
    run = watched(a, command)
    run.pop("stderr")
    return dict(run, engine="transformers")


def main():
    a = arguments()
    began = time.monotonic()
    say = lambda text: print(f"[{time.monotonic() - began:5.0f} s] {text}", file=sys.stderr, flush=True)
    checkpoints.make(a.checkpoint, a.size, a.python)
    say("limits of the machine")
    machine.wait_for_lull(a.lull)
    result = dict(date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), quick=a.quick, threads=a.threads, machine=machine.describe(),
                  versions=machine.versions(a.binary), checkpoint=Weights(a.checkpoint).summary(), limits=[machine.limits(a.threads)], rounds=[])
    for index in range(a.rounds):
        say(f"round {index + 1} of {a.rounds}")
        runs = [lambda: moetrail(a, a.prompt_len, a.gen_len, a.reps), lambda: transformers(a)]
        # Whoever runs second may find a warmer or a slower machine: the order alternates.
        found = [run() for run in (runs if index % 2 == 0 else runs[::-1])]
        result["rounds"].append({run["engine"]: run for run in found})
    say(f"{a.pairs} pairs with capture and without")
    result["pairs"] = moetrail(a, a.pair_prompt_len, a.pair_gen_len, reps=0, pairs=a.pairs)
    # Once more at the end, should the machine have been busy or slow at the start.
    machine.wait_for_lull(a.lull)
    result["limits"].append(machine.limits(a.threads))
    result["seconds"] = round(time.monotonic() - began)
    result["summary"] = report.summary(result, Weights(a.checkpoint), capture.summary(result["pairs"]))
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    table = report.markdown(result)
    a.out.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
