"""From raw results to figures and a table."""
import random
import statistics

median = statistics.median


def rates(run, measure, batch=None):
    """Tokens per second of every repetition of one measure."""
    return next(found["tokens_per_second"] for found in run["report"]["results"] if found["measure"] == measure and found.get("batch") == batch)


def interval(values, draws=10_000):
    """Bootstrap 95 % interval of the median; the seed is fixed, so that a report can be made again."""
    source = random.Random(0)
    medians = sorted(median(source.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(draws * 0.025)], medians[int(draws * 0.975)]


def best_limits(result):
    """The highest figure seen of each limit, by number of threads."""
    best = {}
    for limits in result["limits"]:
        for found in limits:
            for name, value in found.items():
                entry = best.setdefault(str(found["threads"]), {})
                entry[name] = max(entry.get(name, 0), value)
    return best


def keys(result):
    """(measure, batch) in the order in which they were taken."""
    return [(found["measure"], found.get("batch")) for found in result["rounds"][0]["moetrail"]["report"]["results"]]


def speed(result, weights, limit, measure, batch):
    """One line of the table: both engines' medians over rounds, the ratio within each round, the share of the limit."""
    ours, theirs = ([median(rates(round_[engine], measure, batch)) for round_ in result["rounds"]] for engine in ("moetrail", "transformers"))
    ratios = [a / b for a, b in zip(ours, theirs)]
    line = dict(measure=measure, batch=batch, moetrail=median(ours), transformers=median(theirs), ratio=median(ratios), ratios=ratios)
    peer = [next(f for f in r["transformers"]["report"]["results"] if (f["measure"], f.get("batch")) == (measure, batch)) for r in result["rounds"]]
    line["experts"] = sorted({found["experts"] for found in peer})
    if measure == "prefill":
        tokens = peer[0]["tokens"]
        line["gflop_per_token"] = weights.prefill_flops(tokens) / tokens / 1e9
        peaks = {name: limit[name] for name in ("f32_gflop_s", "bf16_dot_gflop_s", "bf16_tile_gflop_s") if name in limit}
        for engine in ("moetrail", "transformers"):
            line[f"{engine}_gflop_s"] = line[engine] * line["gflop_per_token"]
            line[f"{engine}_share"] = {name: line[f"{engine}_gflop_s"] / peak for name, peak in peaks.items()}
    else:
        line["distinct_experts"] = median(found["distinct_experts"] for found in peer)
        line["distinct_if_uniform"] = weights.distinct(batch)
        line["bytes_per_step"] = weights.step_bytes(line["distinct_experts"])
        for engine in ("moetrail", "transformers"):
            line[f"{engine}_gb_s"] = line[engine] / batch * line["bytes_per_step"] / 1e9
            line[f"{engine}_share"] = line[f"{engine}_gb_s"] / limit["read_gb_s"]
    return line


def capture(result, measure, batch):
    """Speed with capture over speed without, pair by pair."""
    ratios = [median(rates(pair["on"], measure, batch)) / median(rates(pair["off"], measure, batch)) for pair in result["pairs"]]
    low, high = interval(ratios)
    return dict(measure=measure, batch=batch, pairs=len(ratios), median=median(ratios), low=low, high=high, ratios=ratios)


def memory(result):
    """Peak anonymous bytes against what was promised: packed weights x 1.1 + KV pool + ring."""
    runs = [round_["moetrail"] for round_ in result["rounds"]]
    # The log rounds down to whole MiB and KiB; the bound is not the place to gain from that.
    allowed = min(int(run["packed_mib"] * 2**20 * 1.1) + (run["kv_mib"] << 20) + (run["ring_kib"] << 10) for run in runs)
    return dict(peak=max(run["peak_anonymous"] for run in runs), allowed=allowed, packed_mib=runs[0]["packed_mib"], kv_mib=runs[0]["kv_mib"],
                ring_kib=runs[0]["ring_kib"], transformers_peak=max(round_["transformers"]["peak_anonymous"] for round_ in result["rounds"]))


def summary(result, weights):
    """Everything that the table shows."""
    limit = best_limits(result)
    runs = [run for group in result["rounds"] + result["pairs"] for run in group.values()]
    return dict(limits=limit,
                speed=[speed(result, weights, limit[str(result["threads"])], *key) for key in keys(result)],
                capture=[capture(result, *key) for key in keys(result)] if result["pairs"] else [],
                load_seconds={engine: [round_[engine]["report"]["load_seconds"] for round_ in result["rounds"]] for engine in ("moetrail", "transformers")},
                memory=memory(result), runs=len(runs), busy_runs=sum(run["busy"] for run in runs),
                others_share=[min(run["others_share"] for run in runs), median(run["others_share"] for run in runs), max(run["others_share"] for run in runs)])


def markdown(result):
    """The table, and under it what one must know to read it."""
    found, machine, threads = result["summary"], result["machine"], result["threads"]
    limit, mib = found["limits"][str(threads)], 2**20
    name = lambda line: f"prefill {result['rounds'][0]['moetrail']['report']['results'][0]['tokens']}" if line["measure"] == "prefill" else f"decode, batch {line['batch']}"
    lines = [f"# moetrail and transformers, {result['checkpoint']['name']}, bf16, {threads} threads", ""]
    if result["quick"]:
        lines += ["**A quick run: it tries the script and measures nothing.**", ""]
    lines += ["| measure | moetrail, tok/s | transformers, tok/s | ratio (rounds) | moetrail | of the limit | transformers | of the limit |", "|---|---|---|---|---|---|---|---|"]
    for line in found["speed"]:
        unit, digits = ("gflop_s", 0) if line["measure"] == "prefill" else ("gb_s", 1)
        share = lambda engine: ", ".join(f"{value:.0%} of {peak.removesuffix('_gflop_s').replace('_', ' ')}" for peak, value in line[f"{engine}_share"].items()) \
            if line["measure"] == "prefill" else f"{line[f'{engine}_share']:.0%}"
        cells = [name(line), f"{line['moetrail']:.1f}", f"{line['transformers']:.1f}", f"**{line['ratio']:.2f}** ({min(line['ratios']):.2f}–{max(line['ratios']):.2f})"]
        for engine in ("moetrail", "transformers"):
            cells += [f"{line[f'{engine}_{unit}']:.{digits}f} {'GFLOP/s' if unit == 'gflop_s' else 'GB/s'}", share(engine)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| capture on / off | median | 95 % interval | pairs |", "|---|---|---|---|"]
    lines += [f"| {name(line)} | {line['median']:.4f} | {line['low']:.4f}–{line['high']:.4f} | {line['pairs']} |" for line in found["capture"]]
    memory, load = found["memory"], found["load_seconds"]
    holds = "holds" if memory["peak"] <= memory["allowed"] else "**does not hold**"
    lines += ["", "| | moetrail | transformers |", "|---|---|---|",
              f"| load, files in the page cache | {median(load['moetrail']):.1f} s | {median(load['transformers']):.1f} s |",
              f"| peak anonymous memory | {memory['peak'] / mib:.0f} MiB | {memory['transformers_peak'] / mib:.0f} MiB |", "",
              f"The bound on moetrail's memory {holds}: packed weights {memory['packed_mib']} MiB × 1.1 + KV pool {memory['kv_mib']} MiB + ring {memory['ring_kib']} KiB "
              f"= {memory['allowed'] / mib:.0f} MiB.", ""]
    speed = {(line["measure"], line["batch"]): line for line in found["speed"]}
    steps = "; ".join(f"batch {line['batch']}: {line['bytes_per_step'] / 1e6:.0f} MB a step, {line['distinct_experts']:.1f} experts a layer "
                      f"({line['distinct_if_uniform']:.1f} if routing were uniform)" for line in speed.values() if line["measure"] == "decode")
    peaks = ", ".join(f"{value:.0f} GFLOP/s {peak.removesuffix('_gflop_s').replace('_', ' ')}" for peak, value in limit.items() if peak.endswith("gflop_s"))
    low, middle, high = found["others_share"]
    lines += [f"- Machine: {machine['cpu']} (family {machine['family']}, model {machine['model']}), {machine['processors']} processors"
              f"{', virtual' if machine['hypervisor'] else ''}, {machine['memory_gib']} GiB, Linux {machine['kernel']}; {' '.join(machine['flags'])}.",
              f"- Its limits, best of all tries, {threads} threads: {limit['read_gb_s']:.1f} GB/s read ({found['limits']['1']['read_gb_s']:.1f} with one), {peaks}.",
              f"- Weights read, embedding and KV left out, experts counted by transformers on the same prompts: {steps}. Nothing is assumed to stay in a cache.",
              f"- Prefill: {speed[('prefill', None)]['gflop_per_token']:.3f} GFLOP a token, attention included.",
              f"- moetrail: commit {result['versions']['commit']}{' with uncommitted changes' if result['versions']['uncommitted_changes'] else ''}, "
              f"{result['rounds'][0]['moetrail']['report']['kernels']} kernels, capture on, rows drained. "
              f"transformers {result['rounds'][0]['transformers']['report']['transformers']}, torch {result['rounds'][0]['transformers']['report']['torch']}, "
              f"experts {', '.join(f'{name(line)}: ' + '/'.join(line['experts']) for line in found['speed'])} (the fastest in a trial).",
              f"- {len(result['rounds'])} rounds, engines in turn; a ratio is taken within a round. Others used {low:.0%} to {high:.0%} of the machine during a run (median {middle:.0%}); "
              f"{found['busy_runs']} of {found['runs']} runs were **busy** (others above 10 %)" + (": read the figures as lower limits." if found["busy_runs"] else "."),
              f"- {result['date']}, {result['seconds']} s in all.", ""]
    return "\n".join(lines)
