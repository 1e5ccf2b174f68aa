"""From raw results to figures: rates, ratios within a round, shares of the limits, bars."""
import capture
from report import median, of_peaks, usual_limits

AGREE = 0.01              # relative difference of perplexities
NEIGHBOUR = dict(prefill=0.45, decode=0.6)
CAPTURE, SERVING = 0.99, 0.95
Q8_0 = 34 / 64            # bytes of a block of 32 weights, over those of bf16


def bar(value, least, reasons):
    """Whether a figure holds; nobody knows where there are reasons against the runs behind it."""
    known = None not in (value, least) and not reasons
    return dict(value=value, bar=least, holds=value >= least if known else None, reasons=reasons)


def trouble(runs):
    """Why runs do not count."""
    void = sum(run.get("void", False) for run in runs)
    return [f"failed: {error}" for error in dict.fromkeys(run["error"] for run in runs if "error" in run)] + ([f"void runs: {void}"] if void else [])


def summary(result, rows, weights):
    """Everything that the tables show; `weights` by size of checkpoint."""
    limits, scored = usual_limits(result), agreement(result["scores"])
    measured = {each["row"] for each in result["rounds"]}
    return dict(limits=limits, scores=scored, neighbour=neighbour_lines(result["neighbour"], rows), capture=capture_lines(result["capture"]),
                rows=[row_line(result, row, weights[row.size], limits[str(result["threads"])], scored) for row in rows if row.name in measured],
                serving=serving_line(result["serving"]) if result["serving"] else None)


def agreement(scores):
    """Each perplexity, and its difference from moetrail's in bf16."""
    lines = []
    for name, found in scores.items():
        ours, theirs = scores.get(f"moetrail {name.split()[1]} bf16", {}).get("perplexity"), found.get("perplexity")
        lines.append(dict(found, name=name, difference=theirs / ours - 1 if ours and theirs else None))
    return lines


def row_line(result, row, weights, limit, scored):
    rounds = [each["runs"] for each in result["rounds"] if each["row"] == row.name]
    runs = [(engine, run) for each in rounds for engine, run in each.items()]
    failed = {engine: run["error"] for engine, run in runs if "error" in run}
    engines = [engine for engine in ("moetrail", *row.peers) if engine not in failed and "moetrail" not in failed]
    rates = {engine: [row.rate(each[engine]["report"]) for each in rounds] for engine in engines}
    ratios = {peer: [a / b for a, b in zip(rates["moetrail"], rates[peer])] for peer in engines[1:]}
    best = min((peer for peer in ratios if peer in row.against), key=lambda peer: median(ratios[peer]), default=None)
    line = dict(row=row.name, failed=failed, rates={engine: median(each) for engine, each in rates.items()}, ratios=ratios, best=best,
                settings={engine: run["settings"] for engine, run in runs if engine in rates},
                others_share=max((run["others_share"] for engine, run in runs if engine in rates), default=None))
    line["used"] = {engine: used(row, weights, limit, rate, distinct(row, weights, rounds)) for engine, rate in line["rates"].items()}
    reasons = trouble([run for engine, run in runs if engine == "moetrail" or engine in row.against]) + unscored(scored, row, engines)
    return dict(line, **bar(median(ratios[best]) if best else None, row.bar, reasons))


def unscored(scored, row, engines):
    """Engines of a row in bf16 that compute something else than moetrail, or never told. In 8 bits a difference is only reported."""
    differ = {line["name"]: line["difference"] for line in scored}
    found = {engine: differ.get(f"{engine} {row.size} bf16") for engine in engines if row.format == "bf16"}
    return [f"{engine} not scored" for engine, value in found.items() if value is None] + \
           [f"perplexity of {engine} differs by {value:+.1%}" for engine, value in found.items() if value is not None and abs(value) > AGREE]


def distinct(row, weights, rounds):
    """Experts that a layer uses in a step: as transformers counted them, or as uniform routing would."""
    counted = [row.result(runs["transformers"]["report"])["distinct_experts"] for runs in rounds
               if row.measure == "decode" and "report" in runs.get("transformers", {})]
    return median(counted) if counted else weights.distinct(row.count)


def used(row, weights, limit, rate, distinct):
    """What a rate takes of the machine. In 8 bits every format counts as q8_0."""
    if row.measure == "prefill":
        gflop_s = rate * weights.prefill_flops(row.count) / row.count / 1e9
        return dict(gflop_s=gflop_s, shares=of_peaks(gflop_s, limit))
    step = weights.step_bytes(distinct) * (1 if row.format == "bf16" else Q8_0) + row.count * weights.kv_bytes(row.context)
    gb_s = rate / row.count * step / 1e9
    return dict(gb_s=gb_s, shares=dict(read_gb_s=gb_s / limit["read_gb_s"]))


def neighbour_lines(pairs, rows):
    lines = []
    for name, engine in dict.fromkeys((pair["row"], pair["engine"]) for pair in pairs):
        row = next(row for row in rows if row.name == name)
        mine = [pair for pair in pairs if (pair["row"], pair["engine"]) == (name, engine)]
        reasons = trouble([run for pair in mine for run in (pair["alone"], pair["beside"])])
        complete = [pair for pair in mine if "error" not in pair["alone"] | pair["beside"]]
        rates = {part: [row.rate(pair[part]["report"]) for pair in complete] for part in ("alone", "beside")}
        ratios = [b / a for a, b in zip(rates["alone"], rates["beside"])]
        lines.append(dict(row=name, engine=engine, ratios=ratios, **{part: median(each) if each else None for part, each in rates.items()},
                          **bar(median(ratios) if ratios else None, NEIGHBOUR[row.measure] if engine == "moetrail" else None, reasons)))
    return lines


def capture_lines(run):
    return [dict(line, **bar(line["low"], CAPTURE, trouble([run]))) for line in capture.summary(run)]


def serving_line(rounds):
    reasons = trouble([run for each in rounds for run in each.values()])
    served = lambda run: median(burst["tokens_per_second"] for burst in run["bursts"])
    offline = lambda run: median(next(found for found in run["report"]["results"] if found["measure"] == "mixed")["tokens_per_second"])
    over_http = [each["served"] for each in rounds if "bursts" in each["served"]]
    bursts = [burst for run in over_http for burst in run["bursts"]]
    complete = [each for each in rounds if "error" not in each["served"] | each["offline"]]
    ratios = [served(each["served"]) / offline(each["offline"]) for each in complete]
    line = dict(served=median(burst["tokens_per_second"] for burst in bursts) if bursts else None,
                offline=median(offline(each["offline"]) for each in complete) if complete else None, ratios=ratios,
                tokens=sorted({burst["tokens"] for burst in bursts}),
                client_share=max((run["client_cpu_seconds"] / run["seconds"] for run in over_http), default=None))
    for name in ("ttft_ms", "itl_ms"):
        line[name] = {part: median(burst[name][part] for burst in bursts) for part in (bursts[0][name] if bursts else [])}
    return dict(line, **bar(median(ratios) if ratios else None, SERVING, reasons))
