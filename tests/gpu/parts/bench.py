"""`moetrail bench` on random weights: prefill, decode, and capture on against capture off."""
import json

import rig as rigs
import shapes


def run(rig):
    rig.note(models={})
    failures = []
    for name, shape in shapes.of(rig.dry).items():
        try:
            rig.note(models={**rig.found["models"], name: bench(rig, name, shape)})
        except RuntimeError as error:
            failures.append(f"{name}: {error}")
    if failures:
        raise RuntimeError("; ".join(failures))


def bench(rig, name, shape):
    folder = shapes.write(name, shape)
    lengths, batches = rig.size(([16], [1, 2]), (shapes.PREFILLS, shapes.BATCHES))
    words = [rig.binary("moetrail"), "bench", folder, "--load-format", "dummy", "--device", rig.device, "--dtype", "bfloat16",
             "--prompt-len", ",".join(map(str, lengths)), "--batch", ",".join(map(str, batches)), "--context", shapes.CONTEXT,
             "--gen-len", rig.size(3, shapes.GENERATED), "--reps", rig.size(1, 3), "--capture-pairs", rig.size(1, 3),
             "--max-num-batched-tokens", rig.size(16, 8192), "--max-model-len", rig.size(128, 8448)]
    # Whoever is killed has what was measured until then.
    heard = lambda results: rig.note(models={**rig.found["models"], name: dict(results=results)})
    return json.loads(rigs.watch(words, heard))
