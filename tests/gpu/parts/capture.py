"""Rows end to end over HTTP: trimmed before they are copied, counted to the byte, and the same through eviction, swap, n > 1 and streams."""
import random

import numpy as np

import rig as rigs

D2H = "moetrail_routed_experts_d2h_bytes_total"


def run(rig):
    folder = rig.model("small")
    draw = random.Random(1)
    prompt = lambda length: [draw.randrange(3, 300) for _ in range(length)]
    trim(rig, folder, prompt(300))
    evict(rig, folder, prompt)
    swap(rig, folder, prompt)
    several(rig, folder, prompt(70))
    deltas(rig, folder, prompt(100))
    off(rig, folder, prompt(50))


def trim(rig, folder, prompt):
    """A start moves the cut, not the rows, and what lies below it is never copied."""
    each, new = rigs.row_bytes(folder), 20
    with rig.serve(folder, "--no-enable-prefix-caching") as server:
        whole = rigs.decode(server.generate(rigs.ask(prompt, new))["choices"][0])
        end = len(prompt) + new - 1
        rig.check("a row for all tokens but the last", len(whole) == end, f"{len(whole)} of {end}")
        for start in (0, 17, len(prompt) - 1, len(prompt)):
            before = server.metric(D2H)
            rows = rigs.decode(server.generate(rigs.ask(prompt, new, start))["choices"][0])
            copied = server.metric(D2H) - before
            rig.check(f"start {start}: the same rows", rows.shape == whole[start:].shape and (rows == whole[start:]).all(), f"{len(rows)} rows")
            rig.check(f"start {start}: the bytes of these rows were copied, and no more", copied == (end - start) * each,
                      f"{copied:.0f} bytes of {(end - start) * each}")
        rig.note(bytes_per_row=each)


def evict(rig, folder, prompt):
    """Of a prompt whose blocks were given away, and of one whose blocks were kept."""
    first, new = prompt(200), 10
    with rig.serve(folder, "--max-model-len", 320, blocks=32) as server:
        ask = lambda ids: rigs.decode(server.generate(rigs.ask(ids, new))["choices"][0])
        hits = lambda: server.metric("vllm:prefix_cache_hits_total")
        rows = ask(first)
        again, found = ask(first), hits()
        rig.check("rows of cached blocks", (again == rows).all() and found > 0, f"{found:.0f} tokens found")
        for _ in range(4):
            ask(prompt(300))
        again, later = ask(first), hits()
        rig.check("rows after eviction", (again == rows).all() and later == found, f"{later - found:.0f} tokens found")
        refused = server.metric("moetrail_routed_experts_generation_mismatch_total")
        rig.check("no gather was refused", refused == 0, f"{refused:.0f}")


def swap(rig, folder, prompt):
    """Rows leave with their blocks, and come back with them."""
    bodies = [rigs.ask(prompt(120), 100) for _ in range(8)]
    with rig.serve(folder, "--max-model-len", 320, "--no-enable-prefix-caching", blocks=256) as server:
        alone = [server.generate(body)["choices"][0] for body in bodies]
    with rig.serve(folder, "--max-model-len", 320, "--swap-space", "0.25", blocks=40) as server:
        together = [reply["choices"][0] for reply in server.together(bodies)]
        moved = {to: server.metric("moetrail_routed_experts_moved_bytes_total", f'to="{to}"') for to in ("host", "device")}
        preempted = server.metric("vllm:num_preemptions_total")
    rig.check("blocks were swapped", preempted > 0 and all(moved.values()), f"{preempted:.0f} preemptions, bytes of rows moved {moved}")
    same = sum(a["routed_experts"] == b["routed_experts"] and a["token_ids"] == b["token_ids"] for a, b in zip(alone, together))
    rig.check("rows after a swap", same == len(bodies), f"{same} of {len(bodies)} requests")


def several(rig, folder, prompt):
    """Choices share the prompt's rows and have their own thereafter: those that a request for their tokens alone has."""
    with rig.serve(folder) as server:
        choices = server.generate(rigs.ask(prompt, 24, n=3, temperature=0.9, seed=5))["choices"]
        rig.check("choices differ", len({tuple(choice["token_ids"]) for choice in choices}) > 1)
        for index, choice in enumerate(choices):
            rows = rigs.decode(choice)
            logprobs, scored, _ = server.score(prompt + choice["token_ids"])
            ok = len(rows) == len(prompt) + 23 and (rows == scored[:-1]).all() and logprobs[len(prompt) - 1:] == rigs.sampled(choice)
            rig.check(f"choice {index} of 3: its rows and log-probabilities are those of its tokens", ok)


def deltas(rig, folder, prompt):
    """The pieces of a stream, laid end to end."""
    with rig.serve(folder) as server:
        body = rigs.ask(prompt, 40, 10)
        whole = rigs.decode(server.generate(body)["choices"][0])
        pieces, next_start, gaps = [], 10, 0
        for chunk in server.stream(dict(body, routed_experts_stream="delta")):
            for choice in chunk["choices"]:
                if choice.get("routed_experts"):
                    gaps += choice["routed_experts"]["start"] != next_start
                    pieces.append(rigs.decode(choice))
                    next_start += len(pieces[-1])
        rig.check("deltas follow each other", gaps == 0 and len(pieces) > 1, f"{len(pieces)} pieces")
        joined = np.concatenate(pieces)
        rig.check("deltas are the final rows", joined.shape == whole.shape and (joined == whole).all())
        last = [choice for chunk in server.stream(body) for choice in chunk["choices"] if choice.get("routed_experts")]
        rig.check("a plain stream has them at its end", len(last) == 1 and (rigs.decode(last[0]) == whole).all())


def off(rig, folder, prompt):
    """Capture changes no bit, and who wants no rows copies none."""
    with rig.serve(folder) as server, rig.serve(folder, "--no-capture") as without:
        body = dict(rigs.ask(prompt, 20), return_routed_experts=False)
        del body["routed_experts_prompt_start"]
        a, b = (one.generate(body)["choices"][0] for one in (server, without))
        rig.check("capture changes no bit", a["token_ids"] == b["token_ids"] and rigs.sampled(a) == rigs.sampled(b))
        rig.check("rows that nobody wants are not copied", server.metric(D2H) == 0)
