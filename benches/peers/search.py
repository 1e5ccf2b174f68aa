"""The fastest settings of each peer, by trials, for every measure on its own: as a user would choose them."""
from itertools import product

from rows import measures

REPS, GEN_LEN = 2, 17


def default(peer, threads):
    """The settings where there was no trial."""
    return dict(llama_cpp=dict(threads=threads, flash_attn=1, n_ubatch=512), vllm=dict(batched_tokens=2048),
                transformers=dict(threads=threads, experts="grouped_mm"))[peer]


def grid(peer, file, threads, compile, quick):
    """Every setting that is tried, in one process each."""
    if peer == "transformers":
        return [dict(threads=sorted({1, threads}))]  # this worker tries all by itself
    if peer == "vllm":
        return [dict(batched_tokens=tokens, compile=compiled)
                for compiled, tokens in product([False, True] if compile else [False], [2048] if quick else [512, 2048])]
    # Forms of attention and of weights together; then, from what is best for the first row, sizes of a batch and one thread.
    # Repacked weights crash with q8_0 in this version of llama.cpp.
    buffers = [False, True] if file == "bf16" else [False]
    return [dict(threads=threads, flash_attn=flash, n_ubatch=512, extra_bufts=extra) for flash, extra in product([1, 0], buffers)]


def refined(best, quick):
    """llama.cpp's settings that are tried from the best of its grid on."""
    return [dict(best, n_ubatch=size) for size in ([] if quick else [128, 2048])] + [dict(best, threads=1)]


class Search:
    """The trials of one peer on one file."""

    def __init__(self, engines, peer, rows, say):
        self.engines, self.peer, self.rows, self.say, self.trials, self.chosen = engines, peer, rows, say, [], {}
        self.size, self.file = rows[0].size, rows[0].file

    def trial(self, settings, rows):
        self.say(f"trial: {self.peer}, {self.size} {self.file}, {settings}")
        asked = dict(measures(rows), gen_len=GEN_LEN, reps=1 if rows[0].long else REPS)
        run = self.engines.run(self.peer, self.size, self.file, settings, **asked)
        if "error" in run:
            return self.trials.append(dict(settings=settings, error=run["error"]))
        results = {row.key: row.result(run["report"]) for row in rows}
        self.trials.append(dict(settings=settings, results=results, others_share=run["others_share"], void=run["void"]))

    def choose(self, row):
        """The settings of the fastest trial of a measure."""
        done = [trial for trial in self.trials if row.key in trial.get("results", {})]
        if done:
            best = max(done, key=lambda trial: max(trial["results"][row.key]["tokens_per_second"]))
            own = best["results"][row.key].get("chosen")
            self.chosen[row.key] = {name: own[name] for name in ("threads", "experts")} if own else best["settings"]

    def tries(self, settings, rows):
        """A trial of each, then the choice for every row."""
        for each in settings:
            self.trial(each, rows)
        for row in rows:
            self.choose(row)

    def run(self, compile, quick):
        # Batch 32 takes the settings of batch 8. A long context takes those of batch 1, but for llama.cpp's form of attention.
        short = [row for row in self.rows if not row.long and not (row.measure == "decode" and row.count > 8)]
        self.tries(grid(self.peer, self.file, self.engines.threads, compile, quick) if short else [], short)
        if short and self.peer == "llama_cpp" and self.chosen:
            self.tries(refined(next(iter(self.chosen.values())), quick), short)
        for row in self.rows:
            if row.long and self.peer == "llama_cpp":
                base = self.chosen.get("decode b1") or default(self.peer, self.engines.threads)
                self.tries([dict(base, flash_attn=flash) for flash in (1, 0)], [row])
        return dict(trials=self.trials, chosen=self.chosen)


def search(engines, rows, compile, quick, say):
    """All trials and choices, by peer, checkpoint and format of its file."""
    found = {}
    for peer, size, file in dict.fromkeys((peer, row.size, row.file) for row in rows for peer in row.peers):
        mine = {row.key: row for row in rows if peer in row.peers and (row.size, row.file) == (size, file)}
        found[f"{peer} {size} {file}"] = Search(engines, peer, list(mine.values()), say).run(compile, quick)
    return found


def settings(found, peer, row, threads):
    """What was chosen for a row, or for the nearest that had trials."""
    chosen = found.get(f"{peer} {row.size} {row.file}", {}).get("chosen", {})
    return chosen.get(row.key) or chosen.get("decode b8" if row.count > 8 else "decode b1") or default(peer, threads)
