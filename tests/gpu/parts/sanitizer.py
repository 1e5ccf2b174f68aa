"""compute-sanitizer over small shapes of every kernel, and over the engine itself."""
import os
import re
import shutil
import subprocess

import rig as rigs

PLACES = ["/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin"]
SUMMARY = re.compile(r"(ERROR SUMMARY|RACECHECK SUMMARY): (.*)")
# What the tool says where it cannot work, rather than of the program.
UNABLE = re.compile(r"Device not supported|not supported on this|Unable to|Failed to initialize|Internal Sanitizer Error", re.I)


def run(rig):
    if rig.dry:
        raise rigs.Skip("a dry run has no device")
    places = os.pathsep.join([os.environ.get("PATH", ""), *PLACES])
    tool = shutil.which("compute-sanitizer", path=places)
    if tool is None:
        raise rigs.Skip("there is no compute-sanitizer")
    bench, moetrail = rig.binary("gpu_bench"), rig.binary("moetrail")
    engine = [moetrail, "bench", rigs.ROOT / "tests/golden/qwen3_moe-b", "--device", "cuda", "--prompt-len", 70, "--batch", 3, "--context", 20,
              "--gen-len", 4, "--reps", 1]
    tests = [rig.binary("gpu_tests"), "--test-threads", 1, "norm::", "ring::rows_are_gathered"]
    rig.note(runs={})
    for check, words, seconds in [("memcheck", [bench, "cuda", "--tiny"], 40), ("racecheck", [bench, "cuda", "--tiny"], 60),
                                  ("memcheck", [*engine, "--dtype", "bfloat16"], 40), ("memcheck", [*engine, "--dtype", "float32"], 40),
                                  ("memcheck", tests, 60)]:
        name = f"{check} {words[0].name}{' ' + str(words[-1]) if words[0] == moetrail else ''}"
        try:
            # Whether a call of the interface was refused is the tests' to judge.
            quiet = ["--report-api-errors", "no"] if check == "memcheck" else []
            done = subprocess.run([tool, "--tool", check, *quiet, *map(str, words)], capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            rig.note(runs={**rig.found["runs"], name: f"killed after {seconds} s"})
            continue
        text = done.stdout + done.stderr
        summary = [found for _, found in SUMMARY.findall(text)]
        said = [line for line in text.splitlines() if line.startswith("=========") and "Host Frame" not in line and line.strip("= ")]
        if not summary and UNABLE.search(text):
            raise rigs.Skip(f"compute-sanitizer does not work here: {UNABLE.search(text)[0]}")
        # A warning of racecheck is no race that was seen.
        ok = done.returncode == 0 and bool(summary) and all(re.search(r"\b0 errors", line) for line in summary)
        rig.note(runs={**rig.found["runs"], name: "; ".join(summary) or f"status {done.returncode}"})
        rig.check(name, ok, "; ".join(summary + [line.strip("= ") for line in said[1:4]] * (not ok)) or text[-300:])
        if not ok:
            print("\n".join(said[:60]))
