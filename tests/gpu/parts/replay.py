"""Rows captured in bf16, replayed: where they were captured, and by trainers in f32 on the GPU and on the CPU.

The KL divergence between trainer and engine is the k3 estimate over the sampled tokens, mean of r - log r - 1 with
r = exp(log p of the trainer - log p of the engine) (prime-rl's `mismatch_kl`).
"""
import contextlib
import json
import random

import numpy as np

import rig as rigs


def run(rig):
    rig.note(models={})
    for name in ["bundled"] if rig.dry else ["bundled", "small"]:
        replay(rig, name, rigs.ROOT / "models/bundled" if name == "bundled" else rig.model(name))


def replay(rig, name, folder):
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    draw, rollouts, new = random.Random(name), rig.size(4, 32), rig.size(24, 96)
    prompts = [[draw.randrange(3, vocab) for _ in range(32)] for _ in range(rollouts)]
    trainers = ["cpu"] if rig.dry else ["cpu", rig.device]
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(rig.serve(folder))
        servers = {device: stack.enter_context(rig.serve(folder, device=device, dtype="float32")) for device in trainers}
        bodies = [rigs.ask(prompt, new, temperature=1.0, seed=index, ignore_eos=False) for index, prompt in enumerate(prompts)]
        choices = [reply["choices"][0] for reply in engine.together(bodies)]
        texts = [(prompt + choice["token_ids"], len(prompt), rigs.decode(choice), rigs.sampled(choice)) for prompt, choice in zip(prompts, choices)]
        own = exact = changed = 0
        for ids, start, rows, logprobs in texts:
            scored, back, reply = engine.score(ids, rows)
            own += scored[start - 1:] == logprobs
            exact += (back[:len(rows)] == rows).all()
            changed += reply["routed_experts_replay_stats"]["cells_changed"]
        rig.check(f"{name}: under their own rows, the log-probabilities of sampling", own == rollouts, f"{own} of {rollouts} rollouts, bit for bit")
        rig.check(f"{name}: rows come back as given, no cell changed", exact == rollouts and changed == 0, f"{changed} cells changed")
        found = {}
        for device, trainer in servers.items():
            ways = dict(free=lambda rows: None, replayed=lambda rows: rows, shifted=lambda rows: np.roll(rows, 1, 0))
            scores = {way: [trainer.score(ids, given(rows)) for ids, _, rows, _ in texts] for way, given in ways.items()}
            cells = sum(rows.shape[0] * rows.shape[1] for _, _, rows, _ in texts)
            differ = sum(int((np.sort(free, -1)[:len(rows)] != np.sort(rows, -1)).any(-1).sum())
                         for (_, free, _), (_, _, rows, _) in zip(scores["free"], texts))
            found[device] = dict({way: k3(scores[way], texts) for way in ways}, cells_differing=differ / cells,
                                 given=[logprobs[start - 1:] for (logprobs, _, _), (_, start, _, _) in zip(scores["replayed"], texts)])
    for device, kl in found.items():
        rig.check(f"{name}: trainer in f32 on {device}: replay brings it nearer, shifted rows do not",
                  kl["replayed"] <= kl["free"] * 1.01 and kl["shifted"] > kl["replayed"],
                  f"KL {kl['free']:.1e} free, {kl['replayed']:.1e} replayed, {kl['shifted']:.1e} shifted; {kl['cells_differing']:.2%} of cells differ")
    given = [np.concatenate(kl.pop("given")) for kl in found.values()]
    if len(given) > 1:
        far = float(np.abs(given[0] - given[1]).max())
        rig.check(f"{name}: both trainers agree under given rows", far <= 1e-3, f"|Δ log p| at most {far:.1e} (1e-3)")
    rig.note(models={**rig.found["models"], name: dict(tokens=sum(len(logprobs) for *_, logprobs in texts), rollouts=rollouts, trainers=found)})


def k3(scores, texts):
    """Over all sampled tokens."""
    log_ratio = np.concatenate([np.array(logp[start - 1:]) - np.array(own) for (logp, _, _), (_, start, _, own) in zip(scores, texts)])
    return float((np.exp(log_ratio) - log_ratio - 1).mean())
