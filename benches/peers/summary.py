"""From raw results to figures: rates, ratios within a round, shares of the limits, bars."""
import capture
from report import best_limits, median, of_peaks

AGREE = 0.01              # relative difference of perplexities
NEIGHBOUR = dict(prefill=0.45, decode=0.6)
CAPTURE, SERVING = 0.99, 0.95
Q8_0 = 34 / 64            # bytes of a block of 32 weights, over those of bf16


def bar(value, least, reasons=()):
    """Whether a figure holds; nobody knows where a run was void or failed."""
    return dict(value=value, bar=least, holds=None if least is None or value is None or reasons else value >= least, reasons=list(reasons))


def summary(result, rows, weights):
    """Everything that the tables show; `weights` by size of checkpoint."""
    limits = best_limits(result)
    limit = limits[str(result["threads"])]
    return dict(limits=limits, scores=agreement(result["scores"]), rows=[row_line(result, row, weights[row.size], limit) for row in rows if any(each["row"] == row.name for each in result["rounds"])],
                neighbour=neighbour_lines(result["neighbour"], rows), capture=capture_lines(result["capture"]), serving=serving_line(result["serving"]))


def agreement(scores):
    """Each perplexity, and its difference from moetrail's in bf16."""
    lines = []
    for name, found in scores.items():
        ours = scores.get(f"moetrail {name.split()[1]} bf16", {}).get("perplexity")
        theirs = found.get("perplexity")
        lines.append(dict(name=name, perplexity=theirs, difference=theirs / ours - 1 if ours and theirs else None, error=found.get("error")))
    return lines


def row_line(result, row, weights, limit):
    rounds = [each["runs"] for each in result["rounds"] if each["row"] == row.name]
    failed = {engine: run["error"] for runs in rounds for engine, run in runs.items() if "error" in run}
    complete = [runs for runs in rounds if "moetrail" in runs and "moetrail" not in failed]
    line = dict(row=row.name, failed=failed, others_share=max((run["others_share"] for runs in rounds for run in runs.values() if "error" not in run), default=None))
    rates = {engine: [row.rate(runs[engine]["report"]) for runs in complete] for engine in ("moetrail", *row.peers) if engine not in failed and complete}
    line["rates"] = {engine: median(each) for engine, each in rates.items()}
    line["used"] = {engine: used(row, weights, limit, rate, distinct(row, weights, complete)) for engine, rate in line["rates"].items()}
    line["ratios"] = {peer: [a / b for a, b in zip(rates["moetrail"], rates[peer])] for peer in row.peers if peer in rates}
    line["settings"] = {engine: run["settings"] for runs in complete for engine, run in runs.items() if run.get("settings")}
    against = {peer: median(ratios) for peer, ratios in line["ratios"].items() if peer in row.against}
    line["best"] = min(against, key=against.get, default=None)
    void = sum(run["void"] for runs in complete for run in runs.values())
    reasons = [f"{void} void runs"] if void else []
    reasons += [f"{peer} failed" for peer in row.against if peer in failed] + unscored(result["scores"], row, line["rates"])
    line.update(bar(against.get(line["best"]), row.bar, reasons))
    return line


def unscored(scores, row, engines):
    """Why a row in bf16 does not count: an engine that computes something else, or never told. In 8 bits the difference is reported only."""
    if row.format != "bf16":
        return []
    differ = {line["name"]: line["difference"] for line in agreement(scores)}
    found = {engine: differ.get(f"{engine} {row.size} bf16") for engine in engines}
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
        runs = [run for pair in mine for run in (pair["alone"], pair["beside"])]
        if any("error" in run for run in runs):
            continue
        rates = {part: [row.rate(pair[part]["report"]) for pair in mine] for part in ("alone", "beside")}
        ratios = [b / a for a, b in zip(rates["alone"], rates["beside"])]
        void = sum(run["void"] for run in runs)
        lines.append(dict(row=name, engine=engine, alone=median(rates["alone"]), beside=median(rates["beside"]), ratios=ratios,
                          **bar(median(ratios), NEIGHBOUR[row.measure] if engine == "moetrail" else None, [f"{void} void runs"] if void else [])))
    return lines


def capture_lines(pairs):
    void = sum(run["void"] for pair in pairs for run in pair.values())
    # Processor seconds are a cost, not a rate: they have no bar.
    return [dict(line, **bar(line["low"], None if line["measure"] == "cpu" else CAPTURE, [f"{void} void runs"] if void else []))
            for line in capture.summary(pairs)]


def serving_line(rounds):
    served = [each["served"] for each in rounds]
    if not served:
        return None
    of = lambda run: median(burst["tokens_per_second"] for burst in run["bursts"])
    line = dict(served=median(map(of, served)), tokens=served[0]["bursts"][0]["tokens"], offline=None)
    for name in ("ttft_ms", "itl_ms"):
        line[name] = {part: median(burst[name][part] for run in served for burst in run["bursts"]) for part in served[0]["bursts"][0][name]}
    line["client_share"] = max(run["client_cpu_seconds"] / run["seconds"] for run in served)
    if any("error" in each["offline"] for each in rounds):
        return dict(line, **bar(None, SERVING, ["offline: " + rounds[0]["offline"]["error"]]))
    mixed = lambda run: median(next(found for found in run["report"]["results"] if found["measure"] == "mixed")["tokens_per_second"])
    ratios = [of(each["served"]) / mixed(each["offline"]) for each in rounds]
    void = sum(run["void"] for each in rounds for run in each.values())
    return dict(line, offline=median(mixed(each["offline"]) for each in rounds), ratios=ratios,
                **bar(median(ratios), SERVING, [f"{void} void runs"] if void else []))
