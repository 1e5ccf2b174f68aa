#!/usr/bin/env python3
"""Measure the bundled toy: held-out perplexity, routing by text kind, answers; writes metrics.json and README.md's figures.

    python evaluate.py [--model DIR] [--documents N]

The weights are the published bf16 ones, computed in f32 by transformers; the model is also compared with
model.py (the module that was trained) and run once in bf16.
"""
import argparse
import json
import math
import os
import random

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import grammar
from model import Toy

HERE = os.path.dirname(os.path.abspath(__file__))
PROMPTS = [
    "Tell me a story about a fox.", "What is 7 plus 5?", "Hello!", "Who are you?", "What is the capital of France?",
    "What is the opposite of hot?", "tell me a story about an owl and a bear", "What is 9 times 6?", "What day comes after Friday?",
    "Explain quantum physics.", "Anna has 7 apples. She finds 4 more. How many apples does Anna have now?", "Name three animals."]
OPENINGS = ["Once upon a time", "The capital of France is", "Hello, my name is", "7 + 5 ="]


def shape(c):
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts",
            "num_experts_per_tok", "moe_intermediate_size", "rms_norm_eps", "rope_theta")
    return {k: c[k] for k in keys}


def trained_module(folder):
    """The module of model.py with the checkpoint's weights."""
    with open(os.path.join(folder, "config.json")) as f:
        m = Toy(shape(json.load(f)))
    m.load_hf(load_file(os.path.join(folder, "model.safetensors")))
    return m


def held_out(tok, n):
    """n documents of each kind from a seed that training never uses."""
    r = random.Random("moetrail bundled held out")
    for kind in grammar.KINDS:
        for _ in range(n):
            yield kind, tok(grammar.WRITERS[kind](r) + grammar.END).input_ids[:512]


def mutual_information(xs, ys):
    n, joint, px, py = len(xs), {}, {}, {}
    for x, y in zip(xs, ys):
        joint[x, y] = joint.get((x, y), 0) + 1
        px[x] = px.get(x, 0) + 1
        py[y] = py.get(y, 0) + 1
    return sum(k / n * math.log2(k * n / (px[x] * py[y])) for (x, y), k in joint.items())


@torch.no_grad()
def measure(m, tok, n):
    """Perplexity per kind; per layer the mutual information of top-1 expert and kind, with the kinds shuffled over documents as control."""
    layers = [l.mlp.gate for l in m.model.layers]
    top, picked = [[] for _ in layers], {}
    hooks = [g.register_forward_hook(lambda _, __, out, i=i: picked.__setitem__(i, out[2]))
             for i, g in enumerate(layers)]
    loss, count, kinds, lengths, load = {}, {}, [], [], torch.zeros(len(layers), m.config.num_experts)
    for kind, ids in held_out(tok, n):
        t = torch.tensor([ids])
        logits = m(t).logits[0]
        loss[kind] = loss.get(kind, 0.0) + F.cross_entropy(logits[:-1], t[0, 1:], reduction="sum").item()
        count[kind] = count.get(kind, 0) + len(ids) - 1
        kinds.append(kind)
        lengths.append(len(ids))
        for i in range(len(layers)):
            top[i] += picked[i][:, 0].tolist()
            load[i] += torch.bincount(picked[i].flatten(), minlength=m.config.num_experts)
    for h in hooks:
        h.remove()
    spread = lambda ks: [k for k, l in zip(ks, lengths) for _ in range(l)]
    shuffled = []
    for s in range(10):
        order = kinds[:]
        random.Random(s).shuffle(order)
        shuffled.append(spread(order))
    label = spread(kinds)
    rows = []
    for i, x in enumerate(top):
        control = [mutual_information(x, y) for y in shuffled]
        share = load[i] / load[i].sum()
        rows.append(dict(layer=i, bits=round(mutual_information(x, label), 4), shuffled_mean=round(sum(control) / len(control), 4),
                         shuffled_max=round(max(control), 4), busiest_expert=round(share.max().item(), 3),
                         idlest_expert=round(share.min().item(), 3)))
    entropy = -sum(p * math.log2(p) for p in (label.count(k) / len(label) for k in set(label)))
    ppl = {k: round(math.exp(loss[k] / count[k]), 3) for k in loss}
    ppl["all"] = round(math.exp(sum(loss.values()) / sum(count.values())), 3)
    return dict(perplexity=ppl, tokens=count, kind_entropy_bits=round(entropy, 4), routing=rows)


@torch.no_grad()
def answer(m, tok, prompt, chat, seed=None, limit=220):
    """(text, whether it ended by itself)"""
    text = tok.apply_chat_template([dict(role="user", content=prompt)], tokenize=False, add_generation_prompt=True) if chat else prompt
    ids = tok(text, return_tensors="pt")
    if seed is not None:
        torch.manual_seed(seed)
    how = dict(do_sample=False, temperature=None, top_p=None) if seed is None else dict(do_sample=True, temperature=0.7, top_p=0.9)
    out = m.generate(**ids, max_new_tokens=limit, eos_token_id=[2, 0], pad_token_id=0, **how)[0, ids.input_ids.shape[1]:]
    return tok.decode(out, skip_special_tokens=True).strip(), out[-1].item() in (0, 2)


def arithmetic(m, tok):
    """Share of right greedy answers to the sums of the quick start: both numbers up to 12, and products up to 10."""
    right = total = 0
    r = random.Random("arithmetic")
    for _ in range(100):
        op, top = r.choice([("plus", 12), ("minus", 12), ("times", 10)])
        x, y = r.randint(0, top), r.randint(0, top)
        if op == "minus":
            x, y = max(x, y), min(x, y)
        z = {"plus": x + y, "minus": x - y, "times": x * y}[op]
        right += answer(m, tok, f"What is {x} {op} {y}?", True, limit=24)[0] == f"{x} {op} {y} is {z}."
        total += 1
    return dict(right=right, asked=total)


def facts(m, tok):
    """Share of right greedy answers to questions about capitals, opposites, days, colours and so on."""
    r = random.Random("facts")
    asked = [grammar.fact(r) for _ in range(100)]
    return dict(right=sum(answer(m, tok, q[0], True, limit=24)[0] == want for q, want in asked), asked=len(asked))


def on_topic(m, tok):
    """Of a hundred sampled stories about an animal: how many name it, and how many end by themselves."""
    named = ended = 0
    kinds = list(grammar.ANIMALS)
    for i in range(100):
        kind = kinds[i % len(kinds)]
        text, end = answer(m, tok, f"Tell me a story about {grammar.a(kind)}.", True, seed=i)
        named += kind in text.split(".")[0] + text.split(".")[1]
        ended += end
    return dict(stories=100, name_the_animal_first=named, end=ended)


def figures(x):
    t, p = x["training"], x["perplexity"]
    out = [f"Trained in {t['cpu_minutes']} minutes of CPU time (one thread of a shared 2-core machine, torch {t['torch']}): {t['steps']} steps, {t['tokens'] / 1e6:.1f} M tokens, {t['parameters'] / 1e6:.2f} M parameters, vocabulary {t['vocabulary']}.", "",
           "Held-out perplexity per token (fresh documents of the same grammar; it says nothing about English):", "",
           "| " + " | ".join(p) + " |", "|" + "---|" * len(p), "| " + " | ".join(f"{v:.2f}" for v in p.values()) + " |", "",
           f"Mutual information of the top-1 expert and the text kind, in bits, on the same documents (the kind itself has {x['kind_entropy_bits']:.2f} bits). "
           "In the control the kinds are shuffled over whole documents, ten times:", "",
           "| layer | bits | shuffled, mean | shuffled, max | busiest expert | idlest expert |", "|---|---|---|---|---|---|"]
    out += [f"| {r['layer']} | {r['bits']:.3f} | {r['shuffled_mean']:.3f} | {r['shuffled_max']:.3f} | {r['busiest_expert']:.1%} | {r['idlest_expert']:.1%} |"
            for r in x["routing"]]
    a, k, o = x["arithmetic"], x["facts"], x["stories"]
    out += ["", f"Greedy sums right: {a['right']} of {a['asked']}; facts right: {k['right']} of {k['asked']}. Sampled stories that name the asked animal in the first two sentences: "
            f"{o['name_the_animal_first']} of {o['stories']}; that end by themselves: {o['end']} of {o['stories']}.",
            f"Largest difference of a logit from the trained module: {x['largest_logit_difference']:.1e} (f32). "
            f"Perplexity in bf16 (first tenth of the documents of each kind): {x['perplexity_bf16']:.2f}.", "", "Answers (greedy, unless sampled at temperature 0.7, top-p 0.9):", ""]
    for s in x["samples"]:
        out += [f"- **{s['prompt']}** ({s['how']}) {s['answer']}" + ("" if s["ended"] else " […]")]
    return "\n".join(out)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", default=HERE)
    ap.add_argument("--documents", type=int, default=200, help="held-out documents of each kind")
    a = ap.parse_args()
    torch.set_num_threads(1)
    tok = AutoTokenizer.from_pretrained(a.model)
    m, info = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32, output_loading_info=True)
    bad = {k: v for k, v in info.items() if v and k in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    assert not bad, bad
    turns = [("Hello!", "Hello! How can I help you?"), ("What is 3 plus 4?", "3 plus 4 is 7.")]
    messages = [dict(role="system", content="Be kind.")] + [dict(role=w, content=s) for t in turns for w, s in zip(("user", "assistant"), t)]
    assert tok.apply_chat_template(messages, tokenize=False) == grammar.render(turns, "Be kind."), "template and grammar disagree"
    path = os.path.join(a.model, "metrics.json")
    with open(path) as f:
        x = dict(training=json.load(f)["training"])
    probe = torch.tensor([tok(grammar.render(turns, "Be kind.")).input_ids])
    with torch.no_grad():
        x["largest_logit_difference"] = (m(probe).logits - trained_module(a.model)(probe)[0]).abs().max().item()
    assert x["largest_logit_difference"] < 1e-4, x
    x |= measure(m, tok, a.documents)
    x["arithmetic"], x["facts"], x["stories"] = arithmetic(m, tok), facts(m, tok), on_topic(m, tok)
    x["samples"] = []
    for chat, prompts in ((True, PROMPTS), (False, OPENINGS)):
        for p in prompts:
            for seed in (None, 1) if p in (PROMPTS[0], OPENINGS[0]) else (None,):
                text, ended = answer(m, tok, p, chat, seed, limit=220 if chat or p == OPENINGS[0] else 60)
                how = ("chat" if chat else "completion") + (", sampled" if seed else "")
                x["samples"].append(dict(prompt=p, how=how, answer=text, ended=ended))
    b = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.bfloat16)
    loss = n = 0
    with torch.no_grad():
        for _, ids in held_out(tok, max(1, a.documents // 10)):
            t = torch.tensor([ids])
            loss += F.cross_entropy(b(t).logits[0, :-1].float(), t[0, 1:], reduction="sum").item()
            n += len(ids) - 1
    x["perplexity_bf16"] = round(math.exp(loss / n), 3)
    with open(path, "w") as f:
        json.dump(x, f, indent=1)
        f.write("\n")
    readme = os.path.join(HERE, "README.md")
    with open(readme) as f:
        before, _, rest = f.read().partition("<!-- figures -->\n")
    after = rest.partition("<!-- end of figures -->")[2]
    with open(readme, "w") as f:
        f.write(f"{before}<!-- figures -->\n{figures(x)}\n<!-- end of figures -->{after}")
    print(figures(x))


if __name__ == "__main__":
    main()
