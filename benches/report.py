"""From raw results to figures and a table."""
import random
import statistics

median = statistics.median
ENGINES = ("moetrail", "transformers")


def rates(run, measure, batch=None):
    """Tokens per second of every repetition of one measure."""
    return next(found["tokens_per_second"] for found in run["report"]["results"] if found["measure"] == measure and found.get("batch") == batch)


def interval(values, draws=10_000):
    """Bootstrap 95 % interval of the median; the seed is fixed, so that a report can be made again."""
    source = random.Random(0)
    medians = sorted(median(source.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(draws * 0.025)], medians[int(draws * 0.975)]


def of_peaks(gflop_s, limit):
    """The share of each arithmetic peak that the machine has."""
    return {name: gflop_s / limit[name] for name in ("f32_gflop_s", "bf16_dot_gflop_s", "bf16_tile_gflop_s") if name in limit}


def usual_limits(result):
    """Each limit by number of threads: the highest figure of every look at it, and of these the median. Where the host has other
    guests, memory may be half as fast again for a minute; rates are medians over rounds, too."""
    seen = {}
    for limits in result["limits"]:
        for found in limits:
            for name, value in found.items():
                seen.setdefault(str(found["threads"]), {}).setdefault(name, []).append(value)
    return {threads: {name: median(values) for name, values in found.items()} for threads, found in seen.items()}


def keys(run):
    """(measure, batch, tokens) in the order in which they were taken."""
    return [(found["measure"], found.get("batch"), found["tokens"]) for found in run["report"]["results"]]


def speed(result, weights, limit, measure, batch, tokens):
    """One line of the table: both engines' medians over rounds, the ratio within each round, the share of the limit."""
    ours, theirs = ([median(rates(round_[engine], measure, batch)) for round_ in result["rounds"]] for engine in ENGINES)
    ratios = [a / b for a, b in zip(ours, theirs)]
    line = dict(measure=measure, batch=batch, tokens=tokens, moetrail=median(ours), transformers=median(theirs), ratio=median(ratios), ratios=ratios)
    peer = [next(f for f in r["transformers"]["report"]["results"] if (f["measure"], f.get("batch")) == (measure, batch)) for r in result["rounds"]]
    line["chosen"] = sorted({f"{found['chosen']['experts']} with {found['chosen']['threads']}" for found in peer})
    if measure == "prefill":
        line["gflop_per_token"] = weights.prefill_flops(tokens) / tokens / 1e9
        for engine in ENGINES:
            line[f"{engine}_gflop_s"] = line[engine] * line["gflop_per_token"]
            line[f"{engine}_share"] = of_peaks(line[f"{engine}_gflop_s"], limit)
    else:
        line["distinct_experts"] = median(found["distinct_experts"] for found in peer)
        line["distinct_if_uniform"] = weights.distinct(batch)
        line["bytes_per_step"] = weights.step_bytes(line["distinct_experts"])
        for engine in ENGINES:
            line[f"{engine}_gb_s"] = line[engine] / batch * line["bytes_per_step"] / 1e9
            line[f"{engine}_share"] = line[f"{engine}_gb_s"] / limit["read_gb_s"]
    return line


def memory(result):
    """Peak anonymous bytes against what was promised: packed weights x 1.1 + KV pool + ring."""
    runs = [round_["moetrail"] for round_ in result["rounds"]]
    # The log rounds down to whole MiB and KiB; the bound is not the place to gain from that.
    allowed = min(int(run["packed_mib"] * 2**20 * 1.1) + (run["kv_mib"] << 20) + (run["ring_kib"] << 10) for run in runs)
    return dict(peak=max(run["peak_anonymous"] for run in runs), allowed=allowed, packed_mib=runs[0]["packed_mib"], kv_mib=runs[0]["kv_mib"],
                ring_kib=runs[0]["ring_kib"], transformers_peak=max(round_["transformers"]["peak_anonymous"] for round_ in result["rounds"]))


def summary(result, weights, captured):
    """Everything that the table shows; `captured` as capture.py sums it up."""
    limit = usual_limits(result)
    runs = [run for group in result["rounds"] + result["pairs"] for run in group.values()]
    return dict(limits=limit,
                speed=[speed(result, weights, limit[str(result["threads"])], *key) for key in keys(result["rounds"][0]["moetrail"])],
                capture=captured,
                load_seconds={engine: [round_[engine]["report"]["load_seconds"] for round_ in result["rounds"]] for engine in ENGINES},
                memory=memory(result), runs=len(runs), busy_runs=sum(run["busy"] for run in runs),
                others_share=[min(run["others_share"] for run in runs), median(run["others_share"] for run in runs), max(run["others_share"] for run in runs)])


def label(line):
    return f"prefill {line['tokens']}" if line["measure"] == "prefill" else f"decode, batch {line['batch']}"


def peak_name(name):
    return name.removesuffix("_gflop_s").replace("_", " ")


def table(head, rows):
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)] + [""]


def speed_row(line):
    row = [label(line), *(f"{line[engine]:.1f}" for engine in ENGINES),
           f"**{line['ratio']:.2f}** ({min(line['ratios']):.2f}–{max(line['ratios']):.2f})"]
    for engine in ENGINES:
        share = line[f"{engine}_share"]
        if line["measure"] == "prefill":
            row += [f"{line[f'{engine}_gflop_s']:.0f} GFLOP/s", ", ".join(f"{value:.0%} of {peak_name(peak)}" for peak, value in share.items())]
        else:
            row += [f"{line[f'{engine}_gb_s']:.1f} GB/s", f"{share:.0%}"]
    return row


def tables(found):
    memory, load, mib = found["memory"], found["load_seconds"], 2**20
    lines = table(["measure", "moetrail, tok/s", "transformers, tok/s", "ratio (rounds)", "moetrail", "of the limit", "transformers", "of the limit"],
                  [speed_row(line) for line in found["speed"]])
    lines += table(["capture on / off", "median", "95 % interval", "pairs"],
                   [[label(line), f"{line['median']:.4f}", f"{line['low']:.4f}–{line['high']:.4f}", str(line["pairs"])] for line in found["capture"]])
    lines += table(["", *ENGINES], [["load, files in the page cache", *(f"{median(load[engine]):.1f} s" for engine in ENGINES)],
                                    ["peak anonymous memory", f"{memory['peak'] / mib:.0f} MiB", f"{memory['transformers_peak'] / mib:.0f} MiB"]])
    holds = "holds" if memory["peak"] <= memory["allowed"] else "**does not hold**"
    return lines + [f"The bound on moetrail's memory {holds}: packed weights {memory['packed_mib']} MiB × 1.1 + KV pool {memory['kv_mib']} MiB "
                    f"+ ring {memory['ring_kib']} KiB = {memory['allowed'] / mib:.0f} MiB.", ""]


def notes(result):
    """What one must know to read the tables."""
    found, machine, threads, made = result["summary"], result["machine"], result["threads"], result["versions"]
    limit, first = found["limits"][str(threads)], result["rounds"][0]
    peaks = ", ".join(f"{value:.0f} GFLOP/s {peak_name(peak)}" for peak, value in limit.items() if peak.endswith("gflop_s"))
    steps = "; ".join(f"batch {line['batch']}: {line['bytes_per_step'] / 1e6:.0f} MB a step, {line['distinct_experts']:.1f} experts a layer "
                      f"({line['distinct_if_uniform']:.1f} if routing were uniform)" for line in found["speed"] if line["measure"] == "decode")
    prompt = next(line for line in found["speed"] if line["measure"] == "prefill")
    chosen = "; ".join(f"{label(line)}: {' or '.join(line['chosen'])}" for line in found["speed"])
    low, middle, high = found["others_share"]
    busy = f"{found['busy_runs']} of {found['runs']} runs were {'**busy**' if found['busy_runs'] else 'busy'} (others above 10 %)"
    return [f"- Machine: {machine['cpu']} (family {machine['family']}, model {machine['model']}), {machine['processors']} processors"
            f"{', virtual' if machine['hypervisor'] else ''}, {machine['memory_gib']} GiB, Linux {machine['kernel']}; {' '.join(machine['flags'])}.",
            f"- Its limits with {threads} threads, best of all tries: {limit['read_gb_s']:.1f} GB/s read "
            f"({found['limits']['1']['read_gb_s']:.1f} with one thread), {peaks}.",
            f"- Weights read, without embedding and KV, experts counted by transformers on the same prompts: {steps}.",
            f"- Prefill: {prompt['gflop_per_token']:.3f} GFLOP a token, attention included.",
            f"- moetrail: commit {made['commit']}{' with uncommitted changes' if made['uncommitted_changes'] else ''}, "
            f"{first['moetrail']['report']['kernels']} kernels, capture on and every row drained.",
            f"- transformers {first['transformers']['report']['version']}, torch {first['transformers']['report']['torch']}, "
            f"form of experts and threads as fastest in a trial ({chosen}); moetrail always {threads}.",
            f"- {len(result['rounds'])} rounds, engines in turn; a ratio is taken within a round. Others used {low:.0%} to {high:.0%} of the machine "
            f"during a run (median {middle:.0%}); {busy}.",
            f"- {result['date']}, {result['seconds']} s in all.", ""]


def markdown(result):
    """The tables, and under them the notes."""
    lines = [f"# moetrail and transformers, {result['checkpoint']['name']}, bf16, {result['threads']} threads", ""]
    if result["quick"]:
        lines += ["**A quick run: it tries the script and measures nothing.**", ""]
    return "\n".join(lines + tables(result["summary"]) + notes(result))
