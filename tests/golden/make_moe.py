#!/usr/bin/env python3
"""Write a seeded random-weight MoE checkpoint in Hugging Face format.

    python make_moe.py OUT --arch qwen3_moe --size nano [--dtype f32|bf16] [--seed N] [--E 16 --K 4 ...]

Tensor names, shapes and config keys are those of the published checkpoints of each family, one matrix per
expert (--fused: stacked, as transformers 5 keeps them in memory), so an engine that loads the real ones loads these.

Every tensor is drawn from its own generator, seeded by (seed, tensor name): a value depends neither on the order
of writing nor on the number of layers. f32 checkpoints hold bf16-representable values, so that the f32 and
the bf16 checkpoint of one seed are the same model. The tokenizer is trained on seeded made-up words: it is the
same on every machine.

Scales: matrices N(0, 1/fan_in), residual outputs shrunk by 1/sqrt(2 layers), so that the residual stream neither
dies nor blows up; router rows by --router-scale, so that the top-k varies by token and the gaps between experts
are far above rounding except by chance; head rows by --head-scale.
"""
import argparse
import hashlib
import json
import math
import os
import random

import torch
from safetensors.torch import save_file

ARCHS = ["qwen3_moe", "olmoe", "mixtral"]
CLASSES = dict(qwen3_moe="Qwen3MoeForCausalLM", olmoe="OlmoeForCausalLM", mixtral="MixtralForCausalLM")
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# L layers, H hidden, nh/nkv heads, hd head dim, E experts, K top-k, I expert width, D dense width, V vocabulary
SIZES = {
    "nano": dict(L=3, H=64, nh=4, nkv=2, hd=16, E=8, K=2, I=32, D=96, V=512, ctx=512),
    "small": dict(L=8, H=512, nh=8, nkv=2, hd=64, E=32, K=4, I=256, D=1024, V=8192, ctx=4096),
    "1b": dict(L=20, H=1024, nh=8, nkv=2, hd=128, E=64, K=8, I=256, D=2048, V=32768, ctx=8192),
}


def plan(arch, size, **over):
    """The dimensions of a family at a size; `over` wins."""
    d = dict(SIZES[size], tie=False, dense=[])
    if arch == "olmoe":
        d.update(nkv=d["nh"], hd=d["H"] // d["nh"])
    if arch == "mixtral":
        d.update(E=8, K=2, I={"nano": 32, "small": 1024, "1b": 2048}[size])
    d.update({k: v for k, v in over.items() if v is not None})
    return d


def config(arch, d, dtype, extra):
    """config.json with the keys of the published checkpoints (transformers 4 spelling); `extra` replaces, None removes."""
    c = dict(architectures=[CLASSES[arch]], model_type=arch, torch_dtype=dict(f32="float32", bf16="bfloat16")[dtype],
             hidden_size=d["H"], num_hidden_layers=d["L"], num_attention_heads=d["nh"], num_key_value_heads=d["nkv"],
             vocab_size=d["V"], max_position_embeddings=d["ctx"], hidden_act="silu", attention_dropout=0.0,
             tie_word_embeddings=d["tie"], use_cache=True, initializer_range=0.02, bos_token_id=0, eos_token_id=2,
             pad_token_id=0, num_experts_per_tok=d["K"], output_router_logits=False)
    if arch == "qwen3_moe":
        c.update(head_dim=d["hd"], num_experts=d["E"], moe_intermediate_size=d["I"], intermediate_size=d["D"], norm_topk_prob=True,
                 decoder_sparse_step=1, mlp_only_layers=d["dense"], attention_bias=False, router_aux_loss_coef=0.001, rope_theta=1e6,
                 rms_norm_eps=1e-6, sliding_window=None, use_sliding_window=False, max_window_layers=d["L"])
    elif arch == "olmoe":
        c.update(num_experts=d["E"], intermediate_size=d["I"], norm_topk_prob=False, attention_bias=False, clip_qkv=None,
                 router_aux_loss_coef=0.01, rope_theta=10000.0, rms_norm_eps=1e-5)
    else:
        c.update(head_dim=d["hd"], num_local_experts=d["E"], intermediate_size=d["I"], sliding_window=None,
                 router_aux_loss_coef=0.02, router_jitter_noise=0.0, rope_theta=1e6, rms_norm_eps=1e-5)
    c.update(extra)
    return {k: v for k, v in c.items() if k not in extra or v is not None}


def tensors(arch, d):
    """Yield (name, shape, kind); the kind sets the scale. Matrices are [out, in]."""
    H, L, V, E, I, nh, nkv, hd = (d[k] for k in ("H", "L", "V", "E", "I", "nh", "nkv", "hd"))
    yield "model.embed_tokens.weight", (V, H), "embed"
    for i in range(L):
        p = f"model.layers.{i}."
        a = p + "self_attn."
        yield p + "input_layernorm.weight", (H,), "norm"
        yield p + "post_attention_layernorm.weight", (H,), "norm"
        for n, o in (("q", nh), ("k", nkv), ("v", nkv)):
            yield a + f"{n}_proj.weight", (o * hd, H), "mat"
        yield a + "o_proj.weight", (H, nh * hd), "out"
        if arch != "mixtral":  # qwen3_moe norms each head, olmoe the whole row
            whole = arch == "olmoe"
            yield a + "q_norm.weight", (nh * hd if whole else hd,), "norm"
            yield a + "k_norm.weight", (nkv * hd if whole else hd,), "norm"
        f, names = (p + "block_sparse_moe.", ("w1", "w3", "w2")) if arch == "mixtral" else (p + "mlp.", ("gate_proj", "up_proj", "down_proj"))
        places = [(f, d["D"])] if i in d["dense"] else [(f + f"experts.{e}.", I) for e in range(E)]
        if i not in d["dense"]:
            yield f + "gate.weight", (E, H), "router"
        for q, width in places:
            yield q + names[0] + ".weight", (width, H), "mat"
            yield q + names[1] + ".weight", (width, H), "mat"
            yield q + names[2] + ".weight", (H, width), "out2"
    yield "model.norm.weight", (H,), "norm"
    if not d["tie"]:
        yield "lm_head.weight", (V, H), "head"


def draw(name, shape, kind, seed, L, router_scale, head_scale, tie):
    g = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1)
    x = torch.randn(shape, generator=g, dtype=torch.float32)
    if kind == "norm":
        return 1.0 + 0.1 * x
    s = 1.0 / math.sqrt(shape[-1])
    if kind == "embed":  # a tied table is the head as well
        s = head_scale * s if tie else 1.0
    elif kind == "router":
        s *= router_scale
    elif kind == "head":
        s *= head_scale
    elif kind.startswith("out"):  # silu(g)*u has less than unit variance: the factor 2 puts it back
        s *= (2.0 if kind == "out2" else 1.0) / math.sqrt(2 * L)
    return x.mul_(s)


def fuse(w):
    """Per-expert matrices stacked as transformers 5 holds them: gate_up_proj [E, 2I, H], down_proj [E, H, I]."""
    out, groups = {}, {}
    for name, t in w.items():
        head, mid, tail = name.partition(".mlp.experts.")
        if not mid:
            out[name] = t
            continue
        e, part, _ = tail.split(".")
        groups.setdefault(head + ".mlp.experts.", {})[part, int(e)] = t
    for p, g in groups.items():
        n = len(g) // 3
        out[p + "gate_up_proj"] = torch.stack([torch.cat([g["gate_proj", e], g["up_proj", e]]) for e in range(n)])
        out[p + "down_proj"] = torch.stack([g["down_proj", e] for e in range(n)])
    return out


def words(seed, count):
    """Seeded made-up prose: syllable words whose frequencies fall as in natural text, numbers, punctuation, some Unicode."""
    r = random.Random(f"words {seed}")
    syllable = lambda: r.choice(["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "st", "tr", "é", "ö"]) + r.choice("aeiou")
    pool = ["".join(syllable() for _ in range(r.randint(1, 4))) for _ in range(count)]
    for _ in range(count * 4):
        line = [pool[min(int(r.paretovariate(0.8)) - 1, count - 1)] for _ in range(r.randint(4, 14))]
        if r.random() < 0.2:
            line.append(str(r.randint(0, 9999)))
        yield " ".join(line).capitalize() + r.choice([".", ".", "!", "?", ",\n", ";\n\n"])


def write_tokenizer(out, vocab, ctx):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    t = Tokenizer(models.BPE(byte_fallback=False))
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(words(0, max(200, vocab)), trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIALS, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    t.save(os.path.join(out, "tokenizer.json"))
    special = {str(i): dict(content=s, lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
               for i, s in enumerate(SPECIALS)}
    write_json(out, "tokenizer_config.json", dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None,
        add_bos_token=False, clean_up_tokenization_spaces=False, model_max_length=ctx, chat_template=CHAT, added_tokens_decoder=special))


def write_json(out, name, value):
    with open(os.path.join(out, name), "w") as f:
        json.dump(value, f, indent=1)
        f.write("\n")


def write_weights(out, w, shard_bytes):
    """model.safetensors, or numbered shards with an index where the weights exceed `shard_bytes`."""
    shards, size = [{}], 0
    for name, t in w.items():
        b = t.numel() * t.element_size()
        if shards[-1] and size + b > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = t
        size += b
    where = {}
    for i, s in enumerate(shards):
        f = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(s, os.path.join(out, f), metadata={"format": "pt"})
        os.chmod(os.path.join(out, f), 0o644)
        where.update({k: f for k in s})
    if len(shards) > 1:
        total = sum(t.numel() * t.element_size() for t in w.values())
        write_json(out, "model.safetensors.index.json", dict(metadata=dict(total_size=total), weight_map=where))


def write_checkpoint(out, arch, d, dtype="bf16", seed=0, router_scale=2.0, head_scale=2.0, fused=False, shard_bytes=1 << 30, extra=()):
    """Write the whole folder; `extra` are config.json keys."""
    os.makedirs(out, exist_ok=True)
    write_json(out, "config.json", config(arch, d, dtype, dict(extra)))
    write_json(out, "generation_config.json", dict(bos_token_id=0, eos_token_id=[2], pad_token_id=0, do_sample=False))
    write_tokenizer(out, d["V"], d["ctx"])
    want = torch.float32 if dtype == "f32" else torch.bfloat16
    w = {n: draw(n, s, k, seed, d["L"], router_scale, head_scale, d["tie"]).to(torch.bfloat16).to(want).contiguous()
         for n, s, k in tensors(arch, d)}
    write_weights(out, fuse(w) if fused else w, shard_bytes)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("out")
    ap.add_argument("--arch", choices=ARCHS, default="qwen3_moe")
    ap.add_argument("--size", choices=list(SIZES), default="nano")
    ap.add_argument("--dtype", choices=["f32", "bf16"], default="bf16")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--router-scale", type=float, default=2.0)
    ap.add_argument("--head-scale", type=float, default=2.0)
    ap.add_argument("--fused", action="store_true")
    ap.add_argument("--shard-bytes", type=int, default=1 << 30)
    ap.add_argument("--dense", type=lambda s: [int(x) for x in s.split(",")], help="qwen3_moe: layers without experts, comma-separated")
    for k in ("L", "H", "nh", "nkv", "hd", "E", "K", "I", "D", "V", "ctx"):
        ap.add_argument(f"--{k}", type=int)
    a = ap.parse_args()
    over = {k: getattr(a, k) for k in ("L", "H", "nh", "nkv", "hd", "E", "K", "I", "D", "V", "ctx", "dense")}
    d = plan(a.arch, a.size, **over)
    write_checkpoint(a.out, a.arch, d, a.dtype, a.seed, a.router_scale, a.head_scale, a.fused, a.shard_bytes)
    print(json.dumps(dict(arch=a.arch, parameters=sum(math.prod(s) for _, s, _ in tensors(a.arch, d)), **d)))


if __name__ == "__main__":
    main()
