#!/usr/bin/env python3
"""Draw docs/routing.svg: which experts the bundled model's layers choose for which kind of text.

    cargo run --release -- serve &
    python benches/figure.py [--url http://127.0.0.1:8000] [--documents 40]

Held-out documents of the bundled grammar are scored (max_tokens 0) on /inference/v1/generate; the rows of the reply are
counted. Needs the standard library alone.
"""
import argparse
import base64
import json
import os
import sys
import urllib.request

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path.insert(0, os.path.join(ROOT, "models", "bundled"))
from grammar import documents  # noqa: E402

KINDS = ["story", "sum", "fact", "chat"]
CELL, LEFT, TOP = 26, 66, 44


def post(url, path, body):
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())


def shares(url, per_kind, layer):
    """Share of selections of each expert in one layer, by kind of text."""
    counts, seen, experts = {}, {kind: 0 for kind in KINDS}, 0
    for kind, text in documents("figure"):
        if seen[kind] == per_kind:
            if min(seen.values()) == per_kind:
                break
            continue
        seen[kind] += 1
        ids = post(url, "/tokenize", {"prompt": text})["tokens"]
        reply = post(url, "/inference/v1/generate", {
            "token_ids": ids, "sampling_params": {"max_tokens": 0}, "return_routed_experts": True})
        rows = reply["choices"][0]["routed_experts"]
        _, layers, top_k = rows["shape"]
        data = base64.b64decode(rows["data"])
        row = counts.setdefault(kind, {})
        for start in range((layer % layers) * top_k, len(data), layers * top_k):
            for expert in data[start:start + top_k]:
                row[expert] = row.get(expert, 0) + 1
                experts = max(experts, expert + 1)
    return {kind: [counts[kind].get(e, 0) / sum(counts[kind].values()) for e in range(experts)] for kind in KINDS}


def draw(table, layer):
    experts = len(table[KINDS[0]])
    # Experts in the order of the kind that likes them most, so that blocks show.
    order = sorted(range(experts), key=lambda e: (max(KINDS, key=lambda k: table[k][e]), -max(table[k][e] for k in KINDS)))
    peak = max(max(row) for row in table.values())
    width, height = LEFT + experts * CELL + 10, TOP + len(KINDS) * CELL + 34
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
           f'<rect width="{width}" height="{height}" fill="white"/>',
           f'<text x="10" y="18">layer {layer}: share of each expert by kind of text, in per cent (uniform: {100 / experts:.1f})</text>']
    for column, expert in enumerate(order):
        out.append(f'<text x="{LEFT + column * CELL + CELL / 2}" y="{TOP - 6}" text-anchor="middle" fill="#555">{expert}</text>')
    for line, kind in enumerate(KINDS):
        y = TOP + line * CELL
        out.append(f'<text x="{LEFT - 8}" y="{y + 17}" text-anchor="end">{kind}</text>')
        for column, expert in enumerate(order):
            share = table[kind][expert]
            level = share / peak
            r, g, b = (round(255 + (c - 255) * level) for c in (8, 69, 148))
            ink = "white" if level > 0.55 else "#333"
            x = LEFT + column * CELL
            out.append(f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" fill="rgb({r},{g},{b})"/>')
            out.append(f'<text x="{x + CELL / 2 - 0.5}" y="{y + 17}" text-anchor="middle" font-size="10" fill="{ink}">{100 * share:.0f}</text>')
    out.append(f'<text x="10" y="{height - 12}" fill="#555">the bundled toy model on held-out text, from the rows that the engine returned</text></svg>')
    return "\n".join(out) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--documents", type=int, default=40, help="of each kind")
    parser.add_argument("--layer", type=int, default=5)
    args = parser.parse_args()
    with open(os.path.join(ROOT, "docs", "routing.svg"), "w", encoding="utf-8") as f:
        f.write(draw(shares(args.url, args.documents, args.layer), args.layer))


if __name__ == "__main__":
    main()
