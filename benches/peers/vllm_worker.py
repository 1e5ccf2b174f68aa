"""vLLM's CPU wheel on the prompts of `moetrail bench`, offline, as one JSON object.

The engine runs in this process: without a second one that polls, two processors give it markedly more.
"""
import argparse
import json
import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import worker
from prompts import prompt


class Peer:
    def __init__(self, a, longest, n_seq):
        from vllm import LLM

        began = time.perf_counter()
        self.llm = LLM(a.checkpoint, dtype="bfloat16", max_model_len=longest, max_num_seqs=max(n_seq, 2), skip_tokenizer_init=True,
                       enforce_eager=not a.compile, max_num_batched_tokens=a.batched_tokens, enable_prefix_caching=False, disable_log_stats=True)
        self.load_seconds = time.perf_counter() - began
        self.vocab = json.load(open(os.path.join(a.checkpoint, "config.json")))["vocab_size"]
        self.requests = 0

    def submit(self, prompts, tokens):
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        for ids in prompts:
            self.requests += 1
            self.llm.llm_engine.add_request(str(self.requests), dict(prompt_token_ids=ids), params)

    def steps(self, enough=lambda outputs: False):
        """Steps until no request is left, or the outputs so far, by request, are enough."""
        outputs = {}
        while self.llm.llm_engine.has_unfinished_requests() and not enough(outputs):
            outputs.update({output.request_id: output for output in self.llm.llm_engine.step()})

    def prefill(self, length, salt):
        ids = prompt(length, salt, self.vocab)
        began = time.perf_counter()
        self.submit([ids], 1)
        self.steps()
        return time.perf_counter() - began

    def decode(self, batch, steps, salt, context):
        self.submit([prompt(context, salt * 1000 + i, self.vocab) for i in range(batch)], steps + 1)
        self.steps(lambda outputs: len(outputs) == batch)
        began = time.perf_counter()
        self.steps()
        return time.perf_counter() - began

    def mean_nll(self, ids):
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=1, detokenize=False, prompt_logprobs=0)
        out = self.llm.generate([dict(prompt_token_ids=ids)], params, use_tqdm=False)[0].prompt_logprobs
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
