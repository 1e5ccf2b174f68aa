"""vLLM's CPU wheel on the prompts of `moetrail bench`, offline and eager, as one JSON object.

A decode rate is the difference of two runs, as the offline interface tells no times of steps: one token, and all of them.
"""
import argparse
import json
import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import worker
from prompts import prompt


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
    ap.add_argument("--batched-tokens", type=int, default=2048)
    ap.add_argument("--compile", action="store_true")
    a = worker.arguments(ap)
    longest = max([length + 8 for length in a.prompt_len] + [a.context + a.gen_len + 8] + [a.score + 8])
    peer = Peer(a, longest, max(a.batch + [1]))
    import vllm

    worker.report(peer, a, vllm.__version__)


if __name__ == "__main__":
    main()
