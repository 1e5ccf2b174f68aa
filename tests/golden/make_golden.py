#!/usr/bin/env python3
"""Write the golden checkpoints and what transformers computes on them.

    python make_golden.py [--out DIR] [NAME ...]

For each checkpoint below: a folder in Hugging Face format and golden.json (README.md names its fields).
Seeded and single-threaded: a second run on one machine with the same versions gives the same bytes.
"""
import argparse
import base64
import json
import os
import random

import numpy as np
import torch
import transformers

from make_moe import plan, write_checkpoint
from reference import Reference

HERE = os.path.dirname(os.path.abspath(__file__))
BASE = dict(V=384, ctx=512)
# Old and new config spellings, rope scalings, tied and untied heads, fused and sharded files: each appears once.
CHECKPOINTS = {
    "qwen3_moe-a": dict(dims=dict(L=3, H=32, nh=4, nkv=2, hd=16, E=8, K=2, I=32), extra=dict(
        rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=128))),
    "qwen3_moe-b": dict(dims=dict(L=4, H=32, nh=2, nkv=1, hd=32, E=16, K=4, I=16, D=64, tie=True, dense=[1]), fused=True, extra=dict(
        num_experts=None, num_local_experts=16, rope_theta=None, torch_dtype=None, dtype="bfloat16",
        rope_parameters=dict(rope_theta=1e6, rope_type="default"))),
    "olmoe-a": dict(dims=dict(L=3, H=32, nh=2, nkv=2, hd=16, E=8, K=2, I=32), extra={}),
    "olmoe-b": dict(dims=dict(L=2, H=64, nh=2, nkv=1, hd=32, E=12, K=4, I=16, tie=True), extra=dict(
        clip_qkv=0.8, norm_topk_prob=True, rope_scaling=dict(type="linear", factor=2.0))),
    "mixtral-a": dict(dims=dict(L=3, H=32, nh=4, nkv=2, hd=16, E=8, K=2, I=32), extra=dict(
        rope_theta=10000.0, rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                              original_max_position_embeddings=64))),
    "mixtral-b": dict(dims=dict(L=2, H=64, nh=4, nkv=1, hd=16, E=6, K=3, I=16), shard_bytes=100_000, extra=dict(
        head_dim=None, sliding_window=32, rope_theta=None, torch_dtype=None, dtype="bfloat16",
        rope_parameters=dict(rope_theta=1e6, rope_type="default"))),
}
# (prompt tokens, generated tokens): around block boundaries, through the sliding window, one token alone.
LENGTHS = [(1, 24), (2, 1), (15, 8), (16, 16), (17, 24), (33, 7), (64, 24), (127, 12), (300, 24)]
TOP = 5


def array(t, dtype):
    x = np.ascontiguousarray(t.numpy().astype(dtype))
    return dict(dtype={"<f4": "f32", "<u2": "u16", "u1": "u8"}[dtype], shape=list(x.shape), data=base64.b64encode(x.tobytes()).decode())


def scored(logp, prompt, output):
    """(logprobs of the output ids [C], of prompt ids 1.. [P-1])"""
    ids = torch.tensor(prompt + output)
    every = logp[:-1].gather(-1, ids[1:, None])[:, 0]
    return every[len(prompt) - 1:], every[:len(prompt) - 1]


def spread(parts):
    x = torch.cat(parts)
    return dict(mean=round(x.mean().item(), 5), p99=round(x.quantile(0.99).item(), 5), max=round(x.max().item(), 5))


def golden(folder, name):
    f32, bf16 = Reference(folder), Reference(folder, torch.bfloat16)
    cases, cells, same, low, drift, still = [], 0, 0, 0, [], []
    for n, (p, c) in enumerate(LENGTHS):
        r = random.Random(f"golden {name} {n}")
        prompt = [r.randrange(3, BASE["V"]) for _ in range(p)]
        output = f32.greedy(prompt, c)
        count = p + len(output) - 1
        logp = f32.forward(prompt + output)
        out, pre = scored(logp, prompt, output)
        top = logp[p - 1:count].topk(TOP, -1)
        ids, gaps = f32.rows(count)
        logp16 = bf16.forward(prompt + output)
        out16, pre16 = scored(logp16, prompt, output)
        ids16, _ = bf16.rows(count)
        moe = f32.moe_layers
        equal = (ids[:, moe].sort(-1).values == ids16[:, moe].sort(-1).values).all(-1)
        cells, same, low = cells + equal.numel(), same + equal.sum().item(), low + (gaps < 1e-4).sum().item()
        far = (torch.cat([pre, out]) - torch.cat([pre16, out16])).abs()  # [T-1], row i scores token i+1
        drift.append(far)
        still.append(far[equal.all(-1)])
        cases.append(dict(
            prompt_ids=prompt, output_ids=output, logprobs=array(out, "<f4"), prompt_logprobs=array(pre, "<f4"),
            top_ids=array(top.indices, "<u2"), top_logprobs=array(top.values, "<f4"), routed_experts=array(ids, "u1"), gaps=array(gaps, "<f4"),
            bf16=dict(logprobs=array(out16, "<f4"), prompt_logprobs=array(pre16, "<f4"), routed_experts=array(ids16, "u1"))))
    summary = dict(cells=cells, gaps_below_1e_4=low, bf16_sets_equal=same, bf16_logprob_difference=spread(drift), where_sets_are_equal=spread(still))
    return dict(model=name, transformers=transformers.__version__, torch=torch.__version__.split("+")[0], num_experts=f32.num_experts,
                top_k=f32.top_k, num_layers=f32.num_layers, moe_layers=f32.moe_layers, summary=summary, cases=cases)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CHECKPOINTS)}; default all")
    ap.add_argument("--out", default=HERE)
    a = ap.parse_args()
    torch.set_num_threads(1)
    for seed, (name, s) in enumerate(CHECKPOINTS.items()):
        if a.names and name not in a.names:
            continue
        folder, arch = os.path.join(a.out, name), name.rpartition("-")[0]
        write_checkpoint(folder, arch, plan(arch, "nano", **BASE, **s["dims"]), seed=seed, head_scale=1.0, fused=s.get("fused", False),
                         shard_bytes=s.get("shard_bytes", 1 << 30), extra=s["extra"])
        g = golden(folder, name)
        with open(os.path.join(folder, "golden.json"), "w") as f:
            json.dump(g, f, separators=(",", ":"))
            f.write("\n")
        print(name, g["summary"], flush=True)


if __name__ == "__main__":
    main()
