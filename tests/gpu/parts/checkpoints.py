"""Makes the checkpoints that other parts serve: small ones with random weights, of three families."""
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import rig as rigs

# `wide` has the router, the heads and the hidden size of Qwen3-30B-A3B, `ids16` expert ids of two bytes and a dense layer.
MADE = {
    "tiny": ("qwen3_moe", "nano", {}),
    "olmoe": ("olmoe", "nano", {}),
    "mixtral": ("mixtral", "nano", {}),
    "ids16": ("qwen3_moe", "nano", dict(E=300, K=5, I=16, dense=[1])),
    "small": ("qwen3_moe", "small", dict(V=2048)),
    "small-olmoe": ("olmoe", "small", dict(V=2048)),
    "small-mixtral": ("mixtral", "small", dict(V=2048)),
    "wide": ("qwen3_moe", "small", dict(L=2, H=2048, nh=32, nkv=4, hd=128, E=128, K=8, I=128, V=2048)),
}
DRY = ["ids16"]


def run(rig):
    if missing := rigs.why_no_transformers():
        raise rigs.Skip(missing)
    names = DRY if rig.dry else list(MADE)
    # Numbers are drawn on one thread.
    with ProcessPoolExecutor(rig.size(1, len(names)), multiprocessing.get_context("fork")) as pool:
        for name in pool.map(make, names):
            rig.check(f"made {name}", True)
    # The same weights as transformers itself writes them down.
    import torch
    from transformers import AutoModelForCausalLM
    source = rig.model("tiny")
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).save_pretrained(rigs.SCRATCH / "saved")
    rig.check("saved by transformers", True, source.name)


def make(name):
    import torch
    from make_moe import plan, write_checkpoint
    torch.set_num_threads(1)
    arch, size, over = MADE[name]
    write_checkpoint(rigs.SCRATCH / name, arch, plan(arch, size, **over), seed=len(name))
    return name
