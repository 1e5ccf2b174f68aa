"""Every kernel by itself: time, bytes and operations a second, and the share of what the device copies."""
import json
import subprocess


def run(rig):
    words = [rig.binary("gpu_bench"), *rig.size(["emulation", "--tiny"], ["cuda"])]
    done = subprocess.run([str(word) for word in words], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"gpu_bench ended with {done.returncode}")
    report = json.loads(done.stdout)
    rig.note(**report)
    for line in report["lines"]:
        if "error" in line:
            raise RuntimeError(f"{line['op']}: {line['error']}")
