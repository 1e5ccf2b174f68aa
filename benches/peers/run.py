#!/usr/bin/env python3
"""moetrail against llama.cpp, vLLM and transformers in one run, and what else has a bar.

    python benches/peers/run.py --out benches/results/peers.json

Installs the peers under target/peers and makes checkpoints under target/bench unless they are there. Writes raw results and,
beside them, a table. --quick tries everything on a small checkpoint in some minutes and measures nothing.
"""
import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))

import checkpoints  # noqa: E402
import machine  # noqa: E402
import table  # noqa: E402
import venvs  # noqa: E402
from engines import Engines  # noqa: E402
from neighbour import neighbours  # noqa: E402
from rounds import rounds, scores  # noqa: E402
from rows import ROWS, find, quick  # noqa: E402
from search import search, settings  # noqa: E402
from serving import servings  # noqa: E402
from summary import summary  # noqa: E402
from weights import Weights  # noqa: E402

PARTS = ("rows", "neighbour", "capture", "serving")


def arguments():
    ap = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--binary", type=Path, default=ROOT / "target/release/moetrail")
    ap.add_argument("--checkpoints", type=Path, default=ROOT / "target/bench", help="folder of qwen3_moe-1b, qwen3_moe-small and their GGUF files")
    ap.add_argument("--venvs", type=Path, default=ROOT / "target/peers", help="where the peers are installed")
    ap.add_argument("--venv", action="append", default=[], metavar="PEER=PATH", help="a virtual environment that has llama_cpp, vllm or transformers")
    ap.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--reps", type=int, default=3, help="repetitions of each measure in a run")
    ap.add_argument("--gen-len", type=int, default=33)
    ap.add_argument("--pairs", type=int, default=150, help="pairs of measures with and without capture")
    ap.add_argument("--requests", type=int, default=64, help="requests at once over HTTP")
    ap.add_argument("--lull", type=float, default=10, help="seconds to wait at most, before each run, for others to be idle")
    ap.add_argument("--retries", type=int, default=3, help="of a run during which others used the machine")
    ap.add_argument("--search-compile", action="store_true", help="try vLLM compiled too; each trial may take very long")
    ap.add_argument("--only", default=",".join(PARTS), help=f"parts ({', '.join(PARTS)}) or names of rows, joined by commas [all]")
    ap.add_argument("--quick", action="store_true")
    a = ap.parse_args()
    a.only, a.venv = a.only.split(","), dict(word.split("=", 1) for word in a.venv)
    if a.quick:
        a.rounds, a.reps, a.gen_len, a.pairs, a.requests, a.lull, a.retries = 1, 1, 9, 2, 8, 1, 0
    return a


def prepare(engines, sizes):
    """Makes the checkpoints. Returns what their headers tell."""
    weights = {}
    for size in sizes:
        made = checkpoints.make(engines.checkpoint(size), size, engines.pythons["transformers"])
        for kind in ("bf16", "q8_0"):
            checkpoints.make_gguf(made, kind, engines.pythons["llama_cpp"])
        weights[size] = Weights(made)
    return weights


def measure(a, engines, rows, known, result, say):
    """Every part that is asked for, between looks at the limits. What is there so far is written after each."""
    prefill, decode = find(known, "prefill", 512), find(known, "decode", 1)
    chosen = lambda engine, row: {} if engine == "moetrail" else settings(result["search"], engine, row, a.threads)
    captured = lambda: engines.run("moetrail", prefill.size, "bf16", {}, prompt_len=[128], batch=[1, 8], gen_len=9, reps=0, capture_pairs=a.pairs)
    parts = dict(
        search=lambda: search(engines, rows, a.search_compile, a.quick, say),
        scores=lambda: scores(engines, rows, chosen, 512, say),
        rounds=lambda: rounds(engines, rows, a.rounds, chosen, a.reps, a.gen_len, say, lambda: limits(a, result, say)),
        neighbour=lambda: neighbours(engines, [prefill, decode], a.rounds, chosen, 1, a.gen_len, say),
        capture=lambda: say(f"{a.pairs} pairs with capture and without") or captured(),
        serving=lambda: servings(engines, prefill.size, a.requests, a.rounds, 1, say))
    limits(a, result, say)
    for name, part in parts.items():
        if name in a.only or name in ("search", "scores", "rounds") and rows:
            result[name] = part()
            write(a.out, result)
    limits(a, result, say)


def limits(a, result, say):
    say("limits of the machine")
    machine.wait_for_lull(a.lull)
    result["limits"].append(machine.limits(a.threads))


def write(out, result):
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


def main():
    a = arguments()
    began = time.monotonic()
    say = lambda text: print(f"[{time.monotonic() - began:5.0f} s] {text}", file=sys.stderr, flush=True)
    known = quick(ROWS) if a.quick else ROWS
    names = [*PARTS, *(row.name for row in known)]
    if unknown := set(a.only) - set(names):
        raise SystemExit(f"--only knows {', '.join(names)}; not {', '.join(unknown)}")
    rows = [row for row in known if "rows" in a.only or row.name in a.only]
    pythons = venvs.pythons(a.venvs, a.venv, say)
    with tempfile.TemporaryDirectory() as folder:
        # One binary for the whole run, whatever is built meanwhile.
        engines = Engines(Path(shutil.copy2(a.binary, folder)), pythons, a.checkpoints, a.threads, a.lull, a.retries)
        say("checkpoints")
        weights = prepare(engines, dict.fromkeys([known[0].size, *(row.size for row in rows)]))
        result = dict(date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), quick=a.quick, threads=a.threads, round_count=a.rounds,
                      retries=a.retries, machine=machine.describe(), versions=machine.versions(engines.binary),
                      checkpoints=[each.summary() for each in weights.values()],
                      limits=[], search={}, scores={}, rounds=[], neighbour=[], capture={}, serving=[])
        measure(a, engines, rows, known, result, say)
    reports = {engine: run["report"] for each in result["rounds"] for engine, run in each["runs"].items() if "report" in run}
    result.update(seconds=round(time.monotonic() - began), kernels=reports.get("moetrail", {}).get("kernels", "unknown"),
                  peers={engine: report["version"] for engine, report in reports.items() if "version" in report})
    result["summary"] = summary(result, known, weights)
    write(a.out, result)
    markdown = table.markdown(result)
    a.out.with_suffix(".md").write_text(markdown)
    print(markdown)


if __name__ == "__main__":
    main()
