"""The tables, and under them the notes."""
from engines import NAMES, QUIET
from report import label, peak_name, table
from rows import PEERS
from summary import AGREE


def number(value, form):
    return "" if value is None else format(value, form)


def least(line):
    return f"≥ {line['bar']}" if line["bar"] else "—"


def verdict(line):
    """Whether a bar holds, in words."""
    if line["bar"] is None:
        return "; ".join(line["reasons"]) or "—"
    if line["holds"] is None:
        return "**does not count**: " + ("; ".join(line["reasons"]) or "not measured")
    return "holds" if line["holds"] else "**does not hold**"


def ratio(value, ratios, form=".2f"):
    return f"**{value:{form}}** ({min(ratios):{form}}–{max(ratios):{form}})" if ratios else ""


def row_cells(line):
    if not line["rates"]:
        return [line["row"], *[""] * 6, "; ".join(f"{NAMES[engine]}: {reason}" for engine, reason in line["failed"].items()), "", ""]
    used, best = line["used"]["moetrail"], line["best"]
    amount = f"{used['gflop_s']:.0f} GFLOP/s" if "gflop_s" in used else f"{used['gb_s']:.1f} GB/s"
    shares = ", ".join(f"{share:.0%} of {peak_name(name)}" if "gflop_s" in used else f"{share:.0%}" for name, share in used["shares"].items())
    return [line["row"], *("failed" if engine in line["failed"] else number(line["rates"].get(engine), ".1f") for engine in ("moetrail", *PEERS)),
            f"{ratio(line['value'], line['ratios'][best])} {NAMES[best]}" if best else "", least(line), verdict(line), f"{amount}: {shares}",
            f"{line['others_share']:.1%}"]


def rows_table(found):
    head = ["row, tok/s", *(NAMES[engine] for engine in ("moetrail", *PEERS)), "ratio (rounds)", "bar", "verdict", "moetrail, of the limit", "others"]
    return table(head, [row_cells(line) for line in found["rows"]]) if found["rows"] else []


def neighbour_table(found):
    return ["## Beside a neighbour that computes on one thread", "", *table(
        ["row", "engine", "alone, tok/s", "beside it, tok/s", "ratio (pairs)", "bar", "verdict"],
        [[line["row"], NAMES[line["engine"]], number(line["alone"], ".1f"), number(line["beside"], ".1f"), ratio(line["value"], line["ratios"]),
          least(line), verdict(line)] for line in found["neighbour"]])] if found["neighbour"] else []


def capture_table(found):
    return ["## Capture on and off", "", *table(
        ["on / off", "median", "95 % interval", "pairs", "bar of its lower end", "verdict"],
        [[label(line), f"{line['median']:.4f}", f"{line['low']:.4f}–{line['high']:.4f}", str(line["pairs"]), least(line), verdict(line)]
         for line in found["capture"]])] if found["capture"] else []


def serving_table(found):
    if not (line := found["serving"]):
        return []
    spread = lambda name: ", ".join(f"{value:.1f} ({part})" for part, value in line[name].items())
    return ["## Many requests at once over HTTP", "", *table(
        ["served, tok/s", "offline, tok/s", "ratio (rounds)", "bar", "verdict", "first token, ms", "between tokens, ms"],
        [[number(line["served"], ".1f"), number(line["offline"], ".1f"), ratio(line["value"], line["ratios"], ".3f"), least(line), verdict(line),
          spread("ttft_ms"), spread("itl_ms")]]),
        f"Tokens generated: {' or '.join(map(str, line['tokens']))}. The client used {number(line['client_share'], '.1%')} of a processor.", ""]


def score_table(found):
    return ["## Perplexity of one text", "", *table(
        ["engine, checkpoint, format", "perplexity", "from moetrail in bf16"],
        [[line["name"], number(line.get("perplexity"), ".1f") or line.get("error", "not told"), number(line["difference"], "+.2%")]
         for line in found["scores"]])] if found["scores"] else []


def words(settings):
    return " ".join(f"{name}={value}" for name, value in settings.items() if value is not False)


def trial_rows(trial):
    if "error" in trial:
        return [[words(trial["settings"]), trial["error"]]]
    own = [(key, each) for key, found in trial["results"].items() for each in found.get("chosen", {}).get("trials", [])]
    if own:  # transformers tells seconds
        return [[words(dict(threads=each["threads"], experts=each["experts"])), f"{key}: {each['seconds']:.3f} s"] for key, each in own]
    rates = ", ".join(f"{key}: {max(found['tokens_per_second']):.1f}" for key, found in trial["results"].items())
    return [[words(trial["settings"]), rates + (" (void)" if trial["void"] else "")]]


def search_tables(result):
    lines = ["## Settings of the peers", ""] if result["search"] else []
    for name, search in result["search"].items():
        chosen = "; ".join(f"{key}: {words(settings)}" for key, settings in search["chosen"].items())
        trials = [row for trial in search["trials"] for row in trial_rows(trial)]
        lines += [f"### {name}", "", f"Chosen: {chosen or 'nothing'}.", "", *table(["settings", "tok/s, or seconds of a trial"], trials)]
    return lines


def notes(result):
    found, machine, made = result["summary"], result["machine"], result["versions"]
    limit = found["limits"][str(result["threads"])]
    reads = ", ".join(f"{each[-1]['read_gb_s']:.1f}" for each in result["limits"])
    peaks = ", ".join(f"{value:.0f} GFLOP/s {peak_name(peak)}" for peak, value in limit.items() if peak.endswith("gflop_s"))
    peers = "; ".join(f"{NAMES[peer]} {version}" for peer, version in result["peers"].items())
    return ["## Notes", "",
            f"- Machine: {machine['cpu']} (family {machine['family']}, model {machine['model']}), {machine['processors']} processors"
            f"{', virtual' if machine['hypervisor'] else ''}, {machine['memory_gib']} GiB, Linux {machine['kernel']}; {' '.join(machine['flags'])}.",
            f"- Its limits with {result['threads']} threads, the median of {len(result['limits'])} looks: {limit['read_gb_s']:.1f} GB/s read ({reads}), {peaks}.",
            f"- moetrail: commit {made['commit']}{' with uncommitted changes' if made['uncommitted_changes'] else ''}, binary "
            f"{made['binary_sha256'][:12]}, {result['kernels']} kernels, capture on and every row drained. {peers or 'No peers'}.",
            f"- A rate is the median of {result['round_count']} rounds, a ratio the median of those within a round, to the peer named.",
            f"- A run in which others used more than {QUIET:.0%} of the machine is void: it is done again up to {result['retries']} times, the "
            "quietest counts, and if that is void too the row does not count.",
            f"- A row in bf16 counts only if every engine's perplexity of one text is within {AGREE:.0%} of moetrail's.",
            "- GB/s: weights and KV that a step must read; formats of 8 bits as if they were q8_0. Others: their largest share in any run.",
            f"- {result['date']}, {result['seconds']} s in all.", ""]


def markdown(result):
    found = result["summary"]
    lines = [f"# moetrail and its peers, {result['threads']} threads", ""]
    if result["quick"]:
        lines += ["**A quick run: it tries the script and measures nothing.**", ""]
    for part in (rows_table, neighbour_table, capture_table, serving_table, score_table):
        lines += part(found)
    return "\n".join(lines + notes(result) + search_tables(result))
