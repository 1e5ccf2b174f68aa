"""llama.cpp on the prompts of `moetrail bench`, through the C interface that llama-cpp-python ships, as one JSON object."""
import argparse
import time

import llama_cpp as L
import numpy as np

import worker
from prompts import prompt


class Peer:
    def __init__(self, path, a, n_ctx, n_seq):
        self.quiet = L.llama_log_callback(lambda *_: None)
        if not a.verbose:
            L.llama_log_set(self.quiet, None)
        L.llama_backend_init()
        began = time.perf_counter()
        params = L.llama_model_default_params()
        params.use_extra_bufts = a.extra_bufts
        self.model = L.llama_model_load_from_file(path.encode(), params)
        params = L.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx, a.n_batch, a.n_ubatch, n_seq
        params.n_threads = params.n_threads_batch = a.threads
        params.kv_unified = True
        if hasattr(params, "flash_attn_type"):
            params.flash_attn_type = 1 if a.flash_attn else 0
        self.context = L.llama_init_from_model(self.model, params)
        self.vocab = L.llama_vocab_n_tokens(L.llama_model_get_vocab(self.model))
        self.batch = L.llama_batch_init(max(a.n_batch, n_seq), 0, 1)
        self.n_batch = a.n_batch
        self.load_seconds = time.perf_counter() - began

    def clear(self):
        L.llama_memory_clear(L.llama_get_memory(self.context), True)

    def feed(self, entries, logits):
        """Decodes (token, position, sequence) entries in batches; `logits` says which positions need them."""
        for start in range(0, len(entries), self.n_batch):
            part = entries[start:start + self.n_batch]
            batch = self.batch
            batch.n_tokens = len(part)
            for i, (token, position, seq) in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, seq
                batch.logits[i] = logits(start + i)
            if L.llama_decode(self.context, batch) != 0:
                raise RuntimeError("llama_decode failed")

    def row(self, index):
        pointer = L.llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(pointer, (self.vocab,))

    def prefill(self, length, salt):
        self.clear()
        ids = prompt(length, salt, self.vocab)
        began = time.perf_counter()
        self.feed([(token, i, 0) for i, token in enumerate(ids)], lambda i: i == length - 1)
        self.row(-1).argmax()
        return time.perf_counter() - began

    def decode(self, batch, steps, salt, context):
        self.clear()
        tokens = []
        for seq in range(batch):
            ids = prompt(context, salt * 1000 + seq, self.vocab)
            self.feed([(token, i, seq) for i, token in enumerate(ids)], lambda i: i == context - 1)
            tokens.append(int(self.row(-1).argmax()))
        began = time.perf_counter()
        for step in range(steps):
            self.feed([(token, context + step, seq) for seq, token in enumerate(tokens)], lambda i: True)
            tokens = [int(self.row(i).argmax()) for i in range(batch)]
        return time.perf_counter() - began

    def mean_nll(self, ids):
        self.clear()
        total = 0.0
        for start in range(0, len(ids), self.n_batch):
            part = ids[start:start + self.n_batch]
            self.feed([(token, start + i, 0) for i, token in enumerate(part)], lambda i: True)
            for i in range(len(part)):
                if start + i + 1 < len(ids):
                    row = self.row(i).astype(np.float64)
                    total += np.logaddexp.reduce(row) - row[ids[start + i + 1]]
        return total / (len(ids) - 1)


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("gguf")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--n-batch", type=int, default=2048)
    ap.add_argument("--n-ubatch", type=int, default=512)
    ap.add_argument("--flash-attn", type=int, default=1)
    ap.add_argument("--extra-bufts", action="store_true", help="weights repacked for matrix tiles; crashes with q8_0 in llama-cpp-python 0.3.36")
    ap.add_argument("--verbose", action="store_true")
    a = worker.arguments(ap)
    n_ctx = max([length + 8 for length in a.prompt_len] + [batch * (a.context + a.gen_len) for batch in a.batch] + [a.score + 8])
    worker.report(Peer(a.gguf, a, n_ctx, max(a.batch + [1])), a, L.__version__)


if __name__ == "__main__":
    main()
