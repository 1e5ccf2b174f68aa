"""What the workers share: how they are called, what they measure, and the one JSON object that they print."""
import json
import math

from prompts import DECODE_PROMPT, prompt


def numbers(text):
    return [int(word) for word in text.split(",") if word]


def arguments(ap):
    """Parses the arguments of a worker that has added its own."""
    ap.add_argument("--prompt-len", type=numbers, default=[512])
    ap.add_argument("--batch", type=numbers, default=[1, 8])
    ap.add_argument("--context", type=int, default=DECODE_PROMPT)
    ap.add_argument("--gen-len", type=int, default=33)
    ap.add_argument("--reps", type=int, default=3)
    ap.add_argument("--score", type=int, default=0, help="tokens of the scored text")
    return ap.parse_args()


def report(peer, a, version):
    """Measures and prints. The first repetition of each measure warms up and is not counted."""
    results, steps = [], a.gen_len - 1
    for length in a.prompt_len:
        seconds = [peer.prefill(length, rep) for rep in range(a.reps + 1)][1:]
        results.append(dict(measure="prefill", tokens=length, tokens_per_second=[length / each for each in seconds]))
    for batch in a.batch:
        seconds = [peer.decode(batch, steps, rep, a.context) for rep in range(a.reps + 1)][1:]
        rates = [batch * steps / each for each in seconds]
        results.append(dict(measure="decode", batch=batch, context=a.context, tokens=a.gen_len, tokens_per_second=rates))
    report = dict(load_seconds=peer.load_seconds, version=version, results=results)
    if a.score:
        report["perplexity"] = math.exp(peer.mean_nll(prompt(a.score, 7, peer.vocab)))
    print(json.dumps(report))
