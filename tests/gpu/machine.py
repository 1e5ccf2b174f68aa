"""The machine and what runs on it."""
import json
import os
import platform
import subprocess
from pathlib import Path

from rig import CARRIED, ROOT

ASKED = ["name", "driver_version", "memory.total", "compute_cap", "clocks.max.sm", "clocks.max.mem", "power.limit"]


def describe(dry):
    info = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        info.setdefault(key.strip(), value.strip())
    about = dict(cpu=info.get("model name", platform.machine()), processors=len(os.sched_getaffinity(0)), python=platform.python_version())
    if not dry:
        about["gpu"] = gpu()
    packed = CARRIED / "packed.json"
    if not dry and packed.exists():
        about["packed"] = json.loads(packed.read_text())
    else:
        about["commit"] = said("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    return about


def gpu():
    """The first card as nvidia-smi tells of it."""
    line = said("nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader", "-i", "0")
    values = [value.strip() for value in (line or "").split(",")]
    return dict(zip(ASKED, values)) if len(values) == len(ASKED) else dict(name=line or "nvidia-smi does not say")


def said(*words):
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None
