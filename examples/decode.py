#!/usr/bin/env python3
"""Two turns of a conversation, and the routing of all of it as one writable array.

    moetrail serve &          # the bundled model, capture on
    python examples/decode.py [URL]

Needs numpy; torch if it is there. A trainer replays `rows[i]` when token `i` is the input of a forward pass; the last
token was sampled and never forwarded, so it has no row.
"""
import base64
import json
import sys
import urllib.request

import numpy as np

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"


def generate(token_ids, start):
    body = dict(token_ids=token_ids, routed_experts_prompt_start=start, sampling_params=dict(max_tokens=24, seed=1))
    request = urllib.request.Request(URL + "/inference/v1/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)["choices"][0]


def decode(payload):
    """The rows, [rows, layers, top_k], in memory that is their own and may be written (frombuffer on bytes is read-only)."""
    data = bytearray(base64.b64decode(payload["data"]))
    return np.frombuffer(data, payload["dtype"]).reshape(payload["shape"])


first = generate([11, 12, 13, 14, 15], start=0)
tokens = [11, 12, 13, 14, 15] + first["token_ids"]
rows = decode(first["routed_experts"])
assert len(rows) == len(tokens) - 1

# The next turn asks only for rows that are missing: from the last token of the turn before, which is forwarded now.
prompt = tokens + [16, 17, 18]
second = generate(prompt, start=len(tokens) - 1)
assert second["routed_experts"]["start"] == len(rows)  # The honoured start is always said.
tokens = prompt + second["token_ids"]
rows = np.concatenate([rows, decode(second["routed_experts"])])
assert len(rows) == len(tokens) - 1 and rows.flags.writeable and rows.flags.owndata
print(f"{len(tokens)} tokens, rows {rows.shape} of {rows.dtype}; layer 0 of the first token: {rows[0, 0].tolist()}")

try:
    import torch
except ImportError:
    sys.exit()
# For Megatron-Core's RouterReplay: one [tokens, top_k] int64 tensor a layer.
layers = [layer.contiguous() for layer in torch.from_numpy(rows).long().unbind(1)]
print(f"{len(layers)} tensors of {tuple(layers[0].shape)}, {layers[0].dtype}")
