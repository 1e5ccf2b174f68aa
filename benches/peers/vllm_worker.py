"""vLLM's CPU wheel on the prompts of `moetrail bench`, offline and eager, as one JSON object.

A decode rate is the difference of two runs, as the offline interface tells no times of steps: one token, and all of them.
"""
import argparse
import json
import math
import os
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from prompts import DECODE_PROMPT, prompt


class Peer:
    def __init__(self, a, longest, n_seq):
        from vllm import LLM

        began = time.perf_counter()
        self.llm = LLM(a.checkpoint, dtype="bfloat16", max_model_len=longest, max_num_seqs=max(n_seq, 2), skip_tokenizer_init=True, enforce_eager=not a.compile,
                       max_num_batched_tokens=a.batched_tokens, enable_prefix_caching=False, disable_log_stats=True)
        self.load_seconds = time.perf_counter() - began
        self.vocab = json.load(open(os.path.join(a.checkpoint, "config.json")))["vocab_size"]

    def run(self, prompts, tokens, **more):
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, **more)
        began = time.perf_counter()
        out = self.llm.generate([dict(prompt_token_ids=ids) for ids in prompts], params, use_tqdm=False)
        return time.perf_counter() - began, out

    def prefill(self, length, salt):
        return self.run([prompt(length, salt, self.vocab)], 1)[0]

    def decode(self, batch, steps, salt, context):
        prompts = [prompt(context, salt * 1000 + i, self.vocab) for i in range(batch)]
        first = self.run(prompts, 1)[0]
        return self.run(prompts, steps + 1)[0] - first

    def mean_nll(self, ids):
        out = self.run([ids], 1, prompt_logprobs=0)[1][0].prompt_logprobs
        return -sum(entry[token].logprob for token, entry in zip(ids[1:], out[1:])) / (len(ids) - 1)


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("checkpoint")
    ap.add_argument("--prompt-len", type=lambda text: [int(word) for word in text.split(",") if word], default=[512])
    ap.add_argument("--batch", type=lambda text: [int(word) for word in text.split(",") if word], default=[1, 8])
    ap.add_argument("--context", type=int, default=DECODE_PROMPT)
    ap.add_argument("--gen-len", type=int, default=33)
    ap.add_argument("--reps", type=int, default=3)
    ap.add_argument("--score", type=int, default=0)
    ap.add_argument("--batched-tokens", type=int, default=2048)
    ap.add_argument("--compile", action="store_true")
    a = ap.parse_args()
    steps = a.gen_len - 1
    longest = max([length + 8 for length in a.prompt_len] + [a.context + a.gen_len + 8] + [a.score + 8])
    peer = Peer(a, longest, max(a.batch + [1]))
    results = []
    for length in a.prompt_len:
        seconds = [peer.prefill(length, rep) for rep in range(a.reps + 1)][1:]
        results.append(dict(measure="prefill", tokens=length, tokens_per_second=[length / each for each in seconds]))
    for batch in a.batch:
        seconds = [peer.decode(batch, steps, rep, a.context) for rep in range(a.reps + 1)][1:]
        results.append(dict(measure="decode", batch=batch, context=a.context, tokens=a.gen_len, tokens_per_second=[batch * steps / each for each in seconds]))
    import vllm

    report = dict(load_seconds=peer.load_seconds, version=vllm.__version__, results=results)
    if a.score:
        report["perplexity"] = math.exp(peer.mean_nll(prompt(a.score, 7, peer.vocab)))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
