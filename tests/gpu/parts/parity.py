"""The same tokens scored by the engine on the GPU, on the CPU and by transformers: log-probabilities and rows.

In f32 the bounds are those of tests/live/parity.py: log-probabilities within 1e-3, every cell the same ids in the same order,
unless its router logits lie within a relative 1e-4 of each other or a lower layer changed before (at most one percent of
the cells). In bf16 the yardstick is transformers in bf16: in the median the engine may be half as far again from transformers in f32
as that is, in the mean, which few changed sets make, three times; and two percent more of the cells may have another set.
"""
import contextlib
import json
import random

import numpy as np

import rig as rigs

LENGTHS = [1, 2, 17, 64, 127, 300]
LONG = 1500  # beyond a split of attention (512), and in chunks
NEW = 8
MEDIAN, MEAN, SETS = (1.5, 1e-4), (3, 1e-2), 0.02


def run(rig):
    missing = rigs.why_no_transformers()
    rig.note(models={}, transformers=missing or "compared")
    names = ["tiny", "ids16"] if rig.dry else ["tiny", "olmoe", "mixtral", "ids16", "small", "small-olmoe", "small-mixtral", "wide"]
    for name in names:
        try:
            folder = rig.model(name)
        except rigs.Skip as reason:
            rig.check(f"{name}: made", missing is not None, reason)
            continue
        try:
            compare(rig, name, folder, missing)
        except Exception as error:
            # The other checkpoints may say more.
            rig.check(f"{name}: compared", False, f"{type(error).__name__}: {error}")
    if missing is None:
        saved(rig)


def compare(rig, name, folder, missing):
    config = json.loads((folder / "config.json").read_text())
    lengths = LENGTHS[:3] + LENGTHS[-1:] if rig.dry else LENGTHS + [LONG] * (config["max_position_embeddings"] > LONG + NEW)
    draw = random.Random(name)
    prompts = [[draw.randrange(3, config["vocab_size"]) for _ in range(length)] for length in lengths]
    chunks = ("--max-num-batched-tokens", 512)
    with contextlib.ExitStack() as stack:
        start = lambda device, dtype: stack.enter_context(rig.serve(folder, *chunks, device=device, dtype=dtype, deterministic=False))
        gpu, cpu, half = start(rig.served, "float32"), start("cpu", "float32"), start(rig.served, "bfloat16")
        texts = [prompt + gpu.generate(rigs.ask(prompt, NEW))["choices"][0]["token_ids"] for prompt in prompts]
        scores = {key: [server.score(ids)[:2] for ids in texts] for key, server in (("gpu", gpu), ("cpu", cpu), ("bf16", half))}
    if missing is None:
        given, gaps, best = references(rig, folder, texts, [len(prompt) for prompt in prompts])
        scores |= given
        rig.check(f"{name}: the sampled tokens are transformers' best", best <= 1e-4, f"at most {best:.1e} below it (1e-4)")
    else:
        # Unknown gaps excuse any cell, within the one percent.
        gaps = [np.zeros(rows.shape[:2]) for _, rows in scores["gpu"]]
    found = {}
    for pair in [("gpu", "cpu"), ("gpu", "transformers"), ("bf16", "transformers"), ("transformers bf16", "transformers"), ("bf16", "transformers bf16")]:
        if all(key in scores for key in pair):
            found[" | ".join(pair)] = distance(*(scores[key] for key in pair), gaps)
    rig.note(models={**rig.found["models"], name: found})
    for other in ("cpu", "transformers"):
        if d := found.get(f"gpu | {other}"):
            ok = not d["problems"] and d["before_change_max"] <= 1e-3 and d["excused"] <= 0.01 * d["cells"]
            rig.check(f"{name}: f32 against {other}", ok, f"|Δ log p| at most {d['before_change_max']:.1e} (1e-3), {d['cells'] - d['differ']} of "
                      f"{d['cells']} cells equal, {d['excused']} excused {d['problems'][:2] or ''}")
    if (ours := found.get("bf16 | transformers")) and (theirs := found.get("transformers bf16 | transformers")):
        within = lambda kind, bound: ours[kind] <= bound[0] * theirs[kind] + bound[1]
        ok = within("median", MEDIAN) and within("mean", MEAN) and ours["sets_equal"] >= theirs["sets_equal"] - SETS
        told = lambda d: f"median {d['median']:.1e}, mean {d['mean']:.1e}, sets equal {d['sets_equal']:.2%}"
        rig.check(f"{name}: bf16 against f32", ok, f"|Δ log p| {told(ours)} (transformers in bf16: {told(theirs)})")


def references(rig, folder, texts, starts):
    """What transformers finds in f32 and bf16 on the same device; the gaps in f32; how far a sampled token is below the best."""
    import torch
    from reference import Reference
    torch.set_num_threads(rig.size(1, 4))
    scores, gaps, worst = {}, [], 0.0
    for key, dtype in (("transformers", torch.float32), ("transformers bf16", torch.bfloat16)):
        ref = Reference(folder, dtype, rig.device)
        scores[key] = []
        for ids, start in zip(texts, starts):
            logp = ref.forward(ids)
            rows, gap = ref.rows(len(ids))
            picked = logp[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
            scores[key].append((picked.tolist(), rows.numpy()))
            if dtype == torch.float32:
                gaps.append(gap.numpy())
                worst = max(worst, (logp[:-1].max(-1).values - picked)[start - 1:].max().item())
        del ref
    return scores, gaps, worst


def distance(some, other, gaps):
    """How far two scorings of the same texts are from each other."""
    from parity import Check  # of tests/live
    check, far, before, differ, sets = Check(), [], [0.0], 0, 0
    for (logp, rows), (logp_too, rows_too), gap in zip(some, other, gaps):
        first = check.rows(rows, rows_too, gap, 0)
        away = np.abs(np.array(logp) - np.array(logp_too))
        far.append(away)
        before += away[:int(min(first, len(away)))].tolist()
        differ += int((rows != rows_too).any(-1).sum())
        sets += int((np.sort(rows, -1) == np.sort(rows_too, -1)).all(-1).sum())
    far = np.concatenate(far)
    return dict(tokens=len(far), median=float(np.median(far)), mean=float(far.mean()), p99=float(np.quantile(far, 0.99)), max=float(far.max()), before_change_max=max(before),
                cells=check.cells, differ=differ, sets_equal=sets / check.cells, excused=len(check.excused), problems=check.problems[:20])


def saved(rig):
    """Transformers' own files hold the same model as ours."""
    with rig.serve(rig.model("tiny"), dtype="float32") as one, rig.serve(rig.model("saved"), dtype="float32") as other:
        ids = list(range(3, 90))
        a, b = one.score(ids), other.score(ids)
        rig.check("a checkpoint that transformers saved gives the same bits", a[0] == b[0] and (a[1] == b[1]).all())
