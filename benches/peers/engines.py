"""How each engine is called. One process for one measure; it prints one JSON object."""
import json
import math
import os
import re
import sys
from pathlib import Path

import machine
from prompts import DECODE_PROMPT

HERE = Path(__file__).parent
NAMES = dict(moetrail="moetrail", llama_cpp="llama.cpp", vllm="vLLM", transformers="transformers")
QUIET = 0.02    # of the machine, used by others at most: above, a run is void
BESIDE_SECONDS = 120  # beside a neighbour an engine whose threads wait for each other hardly moves
SHORTEST = 127  # positions that moetrail's check of itself needs
SERVED = 640    # positions that the mixed requests need


def flags(settings):
    """{"n_ubatch": 512, "compile": True, "batch": [1, 8]} as the words of a command line."""
    for name, value in settings.items():
        if value is not False:
            yield "--" + name.replace("_", "-")
            if value is not True:
                yield ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


class Engines:
    """`lull` seconds at most are waited for others before a run, which is done again up to `retries` times if they disturbed it."""

    def __init__(self, binary, pythons, checkpoints, threads, lull, retries):
        self.binary, self.pythons, self.folder, self.threads, self.lull, self.retries = binary, pythons, checkpoints, threads, lull, retries

    def checkpoint(self, size):
        return self.folder / f"qwen3_moe-{size}"

    def gguf(self, size, file):
        return self.folder / f"qwen3_moe-{size}-{file}.gguf"

    def moetrail(self, command, size, format):
        """The words before the flags of `bench` and `serve`."""
        model = [self.gguf(size, "q8_0"), "--tokenizer", self.checkpoint(size)] if format == "q8_0" else [self.checkpoint(size)]
        quantized = ["--quantization", "int8"] if format == "int8" else []
        return [self.binary, command, *model, *quantized, "--dtype", "bfloat16", "--threads", self.threads]

    def command(self, engine, size, format, settings, asked):
        """Words and environment of one process."""
        env = {"NO_COLOR": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(settings.get("threads", self.threads))}
        if engine == "moetrail":
            # `bench` always measures both; what is not asked for is made short.
            asked = {"gen_len": 2, **asked, "prompt_len": asked.get("prompt_len") or [16], "batch": asked.get("batch") or [1]}
            steps = asked.get("context", DECODE_PROMPT) + asked["gen_len"]
            longest = max(*asked["prompt_len"], steps, asked.get("score", 0), SERVED if "mixed" in asked else SHORTEST) + 1
            return [*self.moetrail("bench", size, format), "--max-model-len", longest, *flags({**settings, **asked})], env
        model = self.gguf(size, "bf16" if format == "bf16" else "q8_0") if engine == "llama_cpp" else self.checkpoint(size)
        if engine == "vllm":
            processors = sorted(os.sched_getaffinity(0))[:self.threads]
            # The second runner of vLLM, and its Triton, want a device; the first one does not.
            env |= {"TRITON_BACKENDS_IN_TREE": "1", "VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_CPU_KVCACHE_SPACE": "2",
                    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, processors)),
                    "LD_PRELOAD": str(self.pythons[engine].parent.parent / "lib/libiomp5.so")}
        return [self.pythons[engine], HERE / f"{engine}_worker.py", model, *flags({**settings, **asked})], env

    def run(self, engine, size, format, settings, beside=(), **asked):
        """One process that measures one thing."""
        command, env = self.command(engine, size, format, settings, asked)
        return dict(self.again(lambda: self.once(command, env, beside)), engine=engine, settings=settings)

    def again(self, once):
        """The quietest of the tries, marked void if even that was not quiet."""
        tries = []
        while len(tries) <= self.retries and not any("error" in run or run["others_share"] <= QUIET for run in tries):
            machine.wait_for_lull(self.lull)
            tries.append(once())
        best = min(tries, key=lambda run: run.get("others_share", -1))
        return dict(best, tries=len(tries), void=best.get("others_share", 0) > QUIET)

    def once(self, command, env, beside):
        try:
            run = machine.watch(command, env=env, beside=beside, limit=BESIDE_SECONDS if beside else math.inf)
            run["report"] = json.loads((run.pop("stdout").splitlines() or [""])[-1])
        except (machine.Failed, ValueError) as failed:
            reason = re.sub(r"/\S*/", "", getattr(failed, "reason", "printed no report"))[:200]  # without the paths of this machine
            print(f"  not measured: {reason}", file=sys.stderr, flush=True)
            return dict(error=reason)
        run["report"].pop("model", None)
        run.pop("stderr")
        return run
