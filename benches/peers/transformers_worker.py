"""transformers on the prompts of `moetrail bench`, as one JSON object.

The model's forward is called directly, without `generate` and its bookkeeping. A short trial picks, for each measure, the
fastest number of threads and the fastest of the ways in which transformers computes experts: on a busy machine two threads
that wait for each other are many times slower than one, and a comparison with them would say nothing.
"""
import argparse
import itertools
import json
import math
import statistics
import time

import torch
import transformers
from transformers import AutoModelForCausalLM

import worker
from prompts import prompt

TRIAL_STEPS = 2
HOPELESS = 3  # what is this many times slower than the best gets no second chance
ENOUGH_SECONDS = 30  # after these, a measure is not repeated


class Peer:
    def __init__(self, folder, dtype):
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        began = time.perf_counter()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.load_seconds = time.perf_counter() - began
        self.config, self.vocab = self.model.config, self.model.config.vocab_size

    def forward(self, ids, past=None, **more):
        return self.model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1, **more)

    def prefill(self, length, salt):
        """Seconds to the first token of one prompt."""
        ids = torch.tensor([prompt(length, salt, self.vocab)])
        began = time.perf_counter()
        self.forward(ids).logits[:, -1:].argmax(-1).tolist()
        return time.perf_counter() - began

    def start(self, batch, salt, context):
        ids = torch.tensor([prompt(context, salt * 1000 + i, self.vocab) for i in range(batch)])
        out = self.forward(ids)
        return out.logits[:, -1:].argmax(-1), out.past_key_values

    def decode(self, batch, steps, salt, context):
        """Seconds of `steps` greedy steps of `batch` sequences."""
        ids, past = self.start(batch, salt, context)
        began = time.perf_counter()
        for _ in range(steps):
            ids = self.forward(ids, past).logits[:, -1:].argmax(-1)
        ids.tolist()
        return time.perf_counter() - began

    def distinct(self, batch, context, steps=4):
        """Mean number of experts that a layer uses in a decode step; not timed."""
        ids, past = self.start(batch, 0, context)
        counts = []
        for _ in range(steps):
            out = self.forward(ids, past, output_router_logits=True)
            ids = out.logits[:, -1:].argmax(-1)
            counts += [logits.topk(self.config.num_experts_per_tok).indices.unique().numel() for logits in out.router_logits]
        return statistics.mean(counts)

    def mean_nll(self, ids):
        logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
        return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).item()


def useful(peer, threads, context):
    """The numbers of threads that are worth a trial."""
    seconds = {}
    for count in threads:
        torch.set_num_threads(count)
        peer.decode(1, 1, 0, context)
        seconds[count] = peer.decode(1, 1, 0, context)
    return [count for count in threads if seconds[count] < HOPELESS * min(seconds.values())]


def fastest(peer, implementations, threads, trial):
    """Sets the number of threads and the form of experts with which the trial is shortest. Returns every trial."""
    trials = []
    for count, name in itertools.product(threads, implementations):
        torch.set_num_threads(count)
        peer.model.set_experts_implementation(name)
        warm_up = trial()
        hopeless = warm_up > HOPELESS * min((tried["seconds"] for tried in trials), default=math.inf)
        trials.append(dict(threads=count, experts=name, seconds=warm_up if hopeless else min(trial(), trial())))
    best = min(trials, key=lambda tried: tried["seconds"])
    torch.set_num_threads(best["threads"])
    peer.model.set_experts_implementation(best["experts"])
    return dict(best, trials=trials)


def repeat(run, tokens, reps):
    """Tokens per second of `reps` runs, or of as many as fit the time."""
    seconds = []
    while len(seconds) < reps and sum(seconds) < ENOUGH_SECONDS:
        seconds.append(run(len(seconds) + 1))
    return [tokens / each for each in seconds]


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("checkpoint")
    ap.add_argument("--threads", type=worker.numbers, default=[1, 2])
    ap.add_argument("--dtype", default="bfloat16")
    ap.add_argument("--experts", type=lambda text: text.split(","), default=["grouped_mm", "eager"])
    a = worker.arguments(ap)
    peer = Peer(a.checkpoint, getattr(torch, a.dtype))
    results, steps = [], a.gen_len - 1
    with torch.inference_mode():
        threads = useful(peer, a.threads, a.context) if len(a.threads) > 1 else a.threads
        for length in a.prompt_len:
            chosen = fastest(peer, a.experts, threads, lambda: peer.prefill(length, 0))
            rates = repeat(lambda rep: peer.prefill(length, rep), length, a.reps)
            results.append(dict(measure="prefill", tokens=length, tokens_per_second=rates, chosen=chosen))
        for batch in a.batch:
            chosen = fastest(peer, a.experts, threads, lambda: peer.decode(batch, min(TRIAL_STEPS, steps), 0, a.context))
            rates = repeat(lambda rep: peer.decode(batch, steps, rep, a.context), batch * steps, a.reps)
            results.append(dict(measure="decode", batch=batch, context=a.context, tokens=a.gen_len, tokens_per_second=rates, chosen=chosen,
                                distinct_experts=peer.distinct(batch, a.context)))
        report = dict(load_seconds=peer.load_seconds, torch=torch.__version__, version=transformers.__version__, results=results)
        if a.score:
            report["perplexity"] = math.exp(peer.mean_nll(prompt(a.score, 7, peer.vocab)))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
