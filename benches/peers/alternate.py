#!/usr/bin/env python3
"""Decoding at batch 1 by moetrail and llama.cpp in turn, many short runs, each between two looks at what memory gives.

    python benches/peers/alternate.py --settings '{"threads": 2, "flash_attn": 1}' --out benches/results/alternate.json

Where a host moves its guests about, memory's speed may double between two runs of `run.py`; here it is known for each run. The
peer's settings are those that `run.py` found.
"""
import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))

import machine  # noqa: E402
import venvs  # noqa: E402
from engines import Engines  # noqa: E402
from weights import Weights  # noqa: E402

ENGINES = ("moetrail", "llama_cpp")


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--settings", type=json.loads, default={"threads": 2, "flash_attn": 1}, help="llama.cpp's, as JSON")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--pairs", type=int, default=10)
    ap.add_argument("--gen-len", type=int, default=65)
    a = ap.parse_args()
    say = lambda text: print(text, file=sys.stderr, flush=True)
    pythons = venvs.pythons(ROOT / "target/peers", {}, say)
    found = []
    with tempfile.TemporaryDirectory() as folder, machine.limits_binary() as limits:
        binary = Path(shutil.copy2(ROOT / "target/release/moetrail", folder))
        engines = Engines(binary, pythons, ROOT / "target/bench", a.threads, 10, 3)
        gigabytes = (weights := Weights(ROOT / "target/bench/qwen3_moe-1b")).step_bytes(weights.top_k) / 1e9
        read = lambda: machine.look(limits, a.threads, rounds=5)["read_gb_s"]
        for pair in range(a.pairs):
            runs = {}
            for engine in ENGINES if pair % 2 == 0 else reversed(ENGINES):
                before = read()
                run = engines.run(engine, "1b", "bf16", a.settings if engine == "llama_cpp" else {}, batch=[1], gen_len=a.gen_len, reps=3)
                rates = run["report"]["results"][-1]["tokens_per_second"]
                runs[engine] = dict(rates=rates, read_before=before, read_after=read(), others_share=run["others_share"], void=run["void"])
            found.append(dict(runs, ratio=statistics.median(runs["moetrail"]["rates"]) / statistics.median(runs["llama_cpp"]["rates"])))
            say(f"pair {pair + 1}: " + ", ".join(f"{e} {statistics.median(r['rates']):.1f} ({r['read_before']:.0f}, {r['read_after']:.0f} GB/s)" for e, r in runs.items()))
    result = dict(date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), machine=machine.describe(), settings=a.settings,
                  gigabytes_a_step=gigabytes, ratio=statistics.median(pair["ratio"] for pair in found), pairs=found)
    say(f"ratio {result['ratio']:.2f}")
    a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
