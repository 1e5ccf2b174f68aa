"""The rows of the table: what is measured, on which checkpoint, against whom, and the bar."""
from dataclasses import dataclass, replace
from statistics import median

from prompts import DECODE_PROMPT

PEERS = ("llama_cpp", "vllm", "transformers")
LONG = 8192 - 64  # what `1b` takes, less the tokens that are generated


@dataclass(frozen=True)
class Row:
    size: str                      # of the checkpoint: 1b or small
    format: str                    # bf16; int8, where peers have q8_0; q8_0, the same GGUF file for all
    measure: str                   # prefill or decode
    count: int                     # tokens of the prompt, or sequences
    bar: float | None = None       # the ratio that is asked for
    against: tuple = PEERS         # the peers that the bar is set against: the best of them
    peers: tuple = PEERS
    context: int = DECODE_PROMPT   # tokens before the first step of a decode

    @property
    def file(self):
        """Format of the file that peers read."""
        return "bf16" if self.format == "bf16" else "q8_0"

    @property
    def key(self):
        """What is measured, without the checkpoint."""
        return f"prefill {self.count}" if self.measure == "prefill" else f"decode b{self.count}" + (f" at {self.context}" if self.long else "")

    @property
    def name(self):
        return f"{self.size} {self.format} {self.key}"

    @property
    def long(self):
        return self.context > DECODE_PROMPT

    def result(self, report):
        """What an engine found, among the results that it printed."""
        name = "tokens" if self.measure == "prefill" else "batch"
        return next(found for found in report["results"] if found["measure"] == self.measure and found.get(name) == self.count)

    def rate(self, report):
        """Tokens per second, the median of the repetitions."""
        return median(self.result(report)["tokens_per_second"])


def asked(rows, reps, gen_len):
    """How an engine is asked for rows of one checkpoint. `small` is over in a moment: more repetitions; a long prompt takes very long: one."""
    return dict(measures(rows), gen_len=gen_len, reps=1 if rows[0].long else reps * 4 if rows[0].size == "small" else reps)


def measures(rows):
    """What rows of one checkpoint measure, once each."""
    counts = lambda measure: list(dict.fromkeys(row.count for row in rows if row.measure == measure))
    return dict(prompt_len=counts("prefill"), batch=counts("decode"), context=rows[0].context)


def only(run, row):
    """Of a run that measured several rows, what belongs to one."""
    return run if "error" in run else dict(run, report=dict(run["report"], results=[row.result(run["report"])]))


LLAMA = ("llama_cpp",)
ROWS = [
    Row("1b", "bf16", "prefill", 512, 1.5),
    Row("1b", "bf16", "prefill", 2048, 1.5),
    Row("1b", "bf16", "decode", 1, 1.25, against=LLAMA),
    Row("1b", "bf16", "decode", 8, 1.25),
    Row("1b", "bf16", "decode", 32, 1.25),
    Row("1b", "bf16", "decode", 1, 1.25, against=LLAMA, peers=("llama_cpp", "vllm"), context=LONG),
    Row("small", "bf16", "prefill", 512, 1.3),
    Row("small", "bf16", "decode", 1, 1.3),
    Row("small", "bf16", "decode", 8),
    Row("1b", "int8", "prefill", 512, peers=LLAMA, against=LLAMA),
    Row("1b", "int8", "decode", 1, 1.25, peers=LLAMA, against=LLAMA),
    Row("1b", "int8", "decode", 8, 1.25, peers=LLAMA, against=LLAMA),
    Row("1b", "q8_0", "prefill", 512, peers=LLAMA, against=LLAMA),
    Row("1b", "q8_0", "decode", 1, peers=LLAMA, against=LLAMA),
    Row("1b", "q8_0", "decode", 8, peers=LLAMA, against=LLAMA),
]


def quick(rows):
    """The same on `small`, whose sequences are shorter."""
    return list({row.name: row for row in (replace(row, size="small", context=min(row.context, 1024)) for row in rows)}.values())


def find(rows, measure, count):
    """The row in bf16, with a short context, that is measured beside a neighbour."""
    return next(row for row in rows if (row.format, row.measure, row.count, row.long) == ("bf16", measure, count, False))
