#!/usr/bin/env python3
"""Compare a running server with transformers, token by token and row by row.

    python parity.py --url http://127.0.0.1:8000 --model FOLDER [--prompts N] [--seed S] [--max-tokens N]

Random prompts (lengths around block boundaries, up to 300) go to POST /inference/v1/generate at temperature 0; then
transformers (f32) is forced along the server's own tokens. Asked of every prompt: the chosen token is transformers'
best or within 1e-4 of it; log-probabilities of output and prompt agree within 1e-3; every (row, layer) cell holds the
same ids in the same order. A cell may differ where the relative gap of its router logits is under 1e-4, or where a
lower layer at this or an earlier row changed its set; a log-probability may differ behind a changed set. At most one
percent of all cells may be excused so; they are listed. Then the same tokens are scored under routing that is given:
their own rows, and rows moved by one position; log-probabilities agree with transformers forced to the same routing
within 1e-3, the rows come back as they were given, and moved rows change them. The last line is 'N passed, N failed'; the exit status is 1 on failure.
"""
import argparse
import base64
import json
import os
import random
import sys
import urllib.error
import urllib.request

import numpy as np
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "golden"))
from reference import Reference  # noqa: E402

LENGTHS = [1, 2, 15, 16, 17, 33, 64, 127, 300]
BEST, LOGPROB, GAP, EXCUSED = 1e-4, 1e-3, 1e-4, 0.01


def post(url, body):
    request = urllib.request.Request(url + "/inference/v1/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as r:
            return json.loads(r.read())
    except urllib.error.HTTPError as e:
        raise SystemExit(f"HTTP {e.code}: {e.read().decode(errors='replace')[:500]}")


def decode(rows):
    kind = {"uint8": "u1", "uint16": "<u2"}[rows["dtype"]]
    return np.frombuffer(base64.b64decode(rows["data"]), kind).reshape(rows["shape"]).astype(np.int64)


class Check:
    """What one prompt got wrong, and what was excused."""

    def __init__(self):
        self.problems, self.excused, self.cells = [], [], 0

    def need(self, ok, text):
        if not ok:
            self.problems.append(text)

    def rows(self, got, want, gaps, start):
        """Compare cells [rows, L, K]; return the first absolute row with a changed set (or infinity)."""
        self.cells += got.shape[0] * got.shape[1]
        differ = (got != want).any(-1)
        sets = (np.sort(got, -1) != np.sort(want, -1)).any(-1)
        lowest = got.shape[1]  # the lowest layer with a changed set at this row or an earlier one
        first = float("inf")
        for r, l in zip(*np.nonzero(differ)):
            where = f"row {r + start} layer {l}: {got[r, l].tolist()} not {want[r, l].tolist()}, gap {gaps[r, l]:.1e}"
            if gaps[r, l] < GAP or lowest < l:
                self.excused.append(where)
            else:
                self.problems.append(where)
            if sets[r, l]:
                lowest, first = min(lowest, l), min(first, r + start)
        return first


def compare(ref, prompt, choice, prompt_logprobs, start):
    c = Check()
    out = choice["token_ids"]
    logp = ref.forward(prompt + out)
    count = len(prompt) + len(out) - 1
    want, gaps = ref.rows(count)
    rows = choice.get("routed_experts")
    c.need(rows is not None, f"no rows: {choice.get('routed_experts_error')}")
    first = float("inf")
    if rows is not None:
        c.need(rows["start"] == start, f"start {rows['start']}, asked {start}")
        shape = [count - start, ref.num_layers, ref.top_k]
        c.need(rows["shape"] == shape, f"shape {rows['shape']}, expected {shape}")
        if rows["shape"] == shape and rows["start"] == start:
            first = c.rows(decode(rows), want[start:].numpy().astype(np.int64), gaps[start:].numpy(), start)
    content = choice["logprobs"]["content"]
    c.need(len(content) == len(out), f"{len(content)} logprobs for {len(out)} tokens")
    for j, (token, entry) in enumerate(zip(out, content)):
        row = len(prompt) - 1 + j  # the row whose forward scored this token
        c.need(entry["token"] == f"token_id:{token}", f"output {j}: entry names {entry['token']}, token is {token}")
        if row >= first:
            continue
        here, best = logp[row, token].item(), logp[row].max().item()
        c.need(best - here <= BEST, f"output {j}: token {token} is {best - here:.1e} below the best")
        c.need(abs(here - entry["logprob"]) <= LOGPROB, f"output {j}: logprob {entry['logprob']:.6f}, expected {here:.6f}")
    c.need(len(prompt_logprobs) == len(prompt), f"{len(prompt_logprobs)} prompt logprobs for {len(prompt)} tokens")
    for i, entry in enumerate(prompt_logprobs[1:], 1):
        if i - 1 >= first:
            break
        here, got = logp[i - 1, prompt[i]].item(), (entry or {}).get(str(prompt[i]), {}).get("logprob", float("nan"))
        c.need(abs(here - got) <= LOGPROB, f"prompt {i}: logprob {got}, expected {here:.6f}")
    return c


def encode(rows, dtype):
    return dict(data=base64.b64encode(rows.astype({"uint8": "u1", "uint16": "<u2"}[dtype]).tobytes()).decode(),
                shape=list(rows.shape), start=0, dtype=dtype)


def replayed(url, ref, ids, rows, dtype, model):
    """Scores `ids` under given routing, here and there: the engine's prompt log-probabilities, its statistics, problems."""
    c = Check()
    body = dict(token_ids=ids, routed_experts_replay=encode(rows, dtype), routed_experts_prompt_start=0,
                sampling_params=dict(max_tokens=0, prompt_logprobs=0), **model)
    reply = post(url, body)
    logp = ref.forward(ids, rows)
    want = [logp[i - 1, ids[i]].item() for i in range(1, len(ids))]
    got = [entry[str(token)]["logprob"] for token, entry in zip(ids[1:], reply["prompt_logprobs"][1:])]
    for i, (w, g) in enumerate(zip(want, got), 1):
        c.need(abs(w - g) <= LOGPROB, f"replay {i}: logprob {g:.6f}, expected {w:.6f}")
    sparse = ref.moe_layers
    back = decode(reply["choices"][0]["routed_experts"])
    c.need((back[:len(rows)][:, sparse] == rows[:, sparse]).all(), "rows do not come back as they were given")
    stats = reply["routed_experts_replay_stats"]
    c.need(stats["rows"] == len(rows) and stats["cells"] == len(rows) * len(sparse), f"stats {stats}")
    return np.array(got), stats, c


def replay(url, ref, prompt, choice, model):
    """The sampled tokens under their own rows, then under rows moved by one."""
    ids, dtype = prompt + choice["token_ids"], choice["routed_experts"]["dtype"]
    rows = decode(choice["routed_experts"])
    own, stats, c = replayed(url, ref, ids, rows, dtype, model)
    c.need(stats["cells_changed"] == 0, f"own rows change {stats['cells_changed']} cells")
    sampled = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    c.need(list(own[len(prompt) - 1:]) == sampled, "log-probabilities under own rows are not those of the sampling")
    if len(rows) > 8:
        moved, stats, other = replayed(url, ref, ids, np.roll(rows, 1, 0), dtype, model)
        c.problems += other.problems
        c.need(stats["cells_changed"] > 0 and (moved != own).any(), "moved rows change nothing")
    return c.problems


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--url", required=True)
    ap.add_argument("--model", required=True, help="the checkpoint folder that the server loaded")
    ap.add_argument("--served-model-name", help="sent as `model` when given")
    ap.add_argument("--prompts", type=int, default=18)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--max-tokens", type=int, default=24)
    a = ap.parse_args()
    torch.set_num_threads(1)
    ref = Reference(a.model)
    r = random.Random(a.seed)
    limit = ref.model.config.max_position_embeddings
    passed = failed = cells = 0
    excused = []
    for n in range(a.prompts):
        length = min(LENGTHS[n] if n < len(LENGTHS) else r.randint(1, 300), limit - a.max_tokens)
        prompt = [r.randrange(3, ref.model.config.vocab_size) for _ in range(length)]
        # The second half also asks for a trimmed reply; the rows that come back must be the same ones.
        start = 0 if n < len(LENGTHS) else r.randint(0, length)
        body = dict(token_ids=prompt, return_routed_experts=True, routed_experts_prompt_start=start,
                    sampling_params=dict(temperature=0, max_tokens=r.randint(1, a.max_tokens), logprobs=1, prompt_logprobs=0))
        if a.served_model_name:
            body["model"] = a.served_model_name
        reply = post(a.url, body)
        c = compare(ref, prompt, reply["choices"][0], reply.get("prompt_logprobs") or [], start)
        if start == 0 and not c.problems:
            c.problems += replay(a.url, ref, prompt, reply["choices"][0], {k: body[k] for k in ("model",) if k in body})
        cells += c.cells
        excused += [f"prompt {n}: {e}" for e in c.excused]
        passed, failed = passed + (not c.problems), failed + bool(c.problems)
        if c.problems:
            print(f"prompt {n} ({length} tokens, start {start}): {len(c.problems)} problems")
            for p in c.problems[:8]:
                print("  " + p)
    for e in excused:
        print("excused: " + e)
    print(f"{cells} cells, {len(excused)} excused ({len(excused) / max(1, cells):.3%})")
    if len(excused) > EXCUSED * cells:
        print(f"more than {EXCUSED:.0%} of the cells needed an excuse")
        failed += 1
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
