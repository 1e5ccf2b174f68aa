"""The same requests alone and in a busy batch, under every setting that moves them about: the same bits."""
import json
import random

import rig as rigs


def run(rig):
    rig.note(runs={})
    for name in ["small"] if rig.dry else ["small", "wide", "ids16"]:
        folder = rig.model(name)
        bodies = requests(folder, rig.size(8, 24), rig.size(200, 900))
        tokens = sum(len(body["token_ids"]) + body["sampling_params"]["max_tokens"] for body in bodies)
        longest = max(len(body["token_ids"]) + body["sampling_params"]["max_tokens"] for body in bodies)
        limit = longest + 1
        roomy, tight = tokens // 8 + 64, longest // 16 + 8
        with rig.serve(folder, "--no-enable-prefix-caching", "--max-model-len", limit, blocks=roomy) as server:
            alone = [seen(server.generate(body)) for body in bodies]
            for body, (tokens_, logprobs, *_) in list(zip(bodies, alone))[:6]:
                # What decode gave token by token, a prefill gives at once.
                scored = server.score(body["token_ids"] + list(tokens_))[0]
                if body["sampling_params"]["temperature"] == 0:
                    rig.check(f"{name}: scoring gives the log-probabilities of sampling", scored[len(body["token_ids"]) - 1:] == list(logprobs),
                              f"{len(body['token_ids'])} tokens")
        settings = {
            "together": ([], roomy),
            "prefix cache, chunks of 64, blocks of 8": (["--max-num-batched-tokens", 64, "--block-size", 8], roomy * 2),
            "no prefix cache, blocks of 32, 3 seats": (["--no-enable-prefix-caching", "--block-size", 32, "--max-num-seqs", 3], roomy),
            "preempted, computed again": (["--no-enable-prefix-caching"], tight),
            "preempted, swapped": (["--swap-space", "0.5"], tight),
        }
        for setting, (flags, blocks) in settings.items():
            with rig.serve(folder, *flags, "--max-model-len", limit, blocks=blocks) as server:
                together = [seen(reply) for reply in server.together(bodies)]
                preempted = server.metric("vllm:num_preemptions_total")
            differ = [index for index, (a, b) in enumerate(zip(alone, together)) if a != b]
            what = sorted({part for index in differ for part, a, b in zip(PARTS, alone[index], together[index]) if a != b})
            detail = f"{len(bodies)} requests, {preempted:.0f} preemptions" + (f"; requests {differ} differ in {', '.join(what)}" if differ else "")
            rig.check(f"{name}: {setting}", not differ, detail)
            if "preempted" in setting:
                rig.check(f"{name}: {setting}: there were preemptions", preempted > 0, preempted)


PARTS = ["tokens", "log-probabilities", "prompt log-probabilities", "rows"]


def seen(reply):
    """What a client sees, as comparable text: numbers are written in the shortest form that gives the same bits."""
    choice = reply["choices"][0]
    return tuple(choice["token_ids"]), tuple(rigs.sampled(choice)), json.dumps(reply.get("prompt_logprobs")), json.dumps(choice.get("routed_experts"))


def requests(folder, count, longest):
    """Prompts of all lengths, some of which begin alike, greedy and sampled."""
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    longest = min(longest, json.loads((folder / "config.json").read_text())["max_position_embeddings"] - 64)
    draw, bodies = random.Random(folder.name), []
    common = [draw.randrange(3, vocab) for _ in range(longest // 2)]
    for index in range(count):
        length = [1, 15, 16, 17, 64, longest][index] if index < 6 else draw.randint(1, longest)
        prompt = common[:length // 2] if index % 2 else []
        prompt = prompt + [draw.randrange(3, vocab) for _ in range(length - len(prompt))]
        extra = dict(temperature=0.8, seed=index) if index % 3 == 2 else {}
        if index % 4 == 1:
            extra["prompt_logprobs"] = 1
        bodies.append(rigs.ask(prompt, draw.randint(8, 48), **extra))
    return bodies
