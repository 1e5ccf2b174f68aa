"""Every kernel by itself: time, bytes and operations a second, and the share of what the device copies."""
import json

import rig as rigs


def run(rig):
    words = [rig.binary("gpu_bench"), *rig.size(["emulation", "--tiny"], ["cuda"])]
    # The first line is the copy.
    heard = lambda lines: rig.note(copy_gb_s=lines[0].get("gb_s"), tiny=rig.dry, lines=lines)
    report = json.loads(rigs.watch(words, heard))
    rig.note(**report)
    for line in report["lines"]:
        if "error" in line:
            raise RuntimeError(f"{line['op']}: {line['error']}")
