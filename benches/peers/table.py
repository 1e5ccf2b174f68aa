"""The tables, and under them the notes."""
from engines import NAMES, QUIET, RETRIES
from report import label, peak_name, table
from rows import PEERS
from summary import AGREE


def verdict(line):
    """Whether a bar holds, in words."""
    if line["bar"] is None:
        return "; ".join(line["reasons"]) or "—"
    if line["value"] is None or line["reasons"]:
        return "**does not count**: " + ("; ".join(line["reasons"]) or "not measured")
    return "holds" if line["holds"] else "**does not hold**"


def row_cells(line):
    if not line["rates"]:
        return [line["row"], "; ".join(f"{NAMES[engine]}: {reason}" for engine, reason in line["failed"].items()) or "not measured", *[""] * 8]
    rate = lambda engine: f"{line['rates'][engine]:.1f}" if engine in line["rates"] else "failed" if engine in line["failed"] else ""
    used, ratios = line["used"]["moetrail"], line["ratios"].get(line["best"])
    amount = f"{used['gflop_s']:.0f} GFLOP/s" if "gflop_s" in used else f"{used['gb_s']:.1f} GB/s"
    shares = ", ".join(f"{share:.0%}" + (f" of {peak_name(name)}" if "gflop_s" in used else "") for name, share in used["shares"].items())
    ratio = f"**{line['value']:.2f}** ({min(ratios):.2f}–{max(ratios):.2f}) {NAMES[line['best']]}" if ratios else ""
    return [line["row"], rate("moetrail"), *map(rate, PEERS), ratio, f"≥ {line['bar']}" if line["bar"] else "—", verdict(line), f"{amount}, {shares}",
            f"{line['others_share']:.1%}"]


def words(settings):
    return " ".join(f"{name}={value}" for name, value in settings.items() if value is not False)


def other_tables(found):
    lines = []
    if found["neighbour"]:
        lines += ["## Beside a neighbour that computes on one thread", ""]
        lines += table(["", "engine", "alone, tok/s", "beside it, tok/s", "ratio (pairs)", "bar", ""], [
            [line["row"], NAMES[line["engine"]], f"{line['alone']:.1f}", f"{line['beside']:.1f}", f"**{line['value']:.2f}** ({min(line['ratios']):.2f}–{max(line['ratios']):.2f})",
             f"≥ {line['bar']}" if line["bar"] else "—", verdict(line)] for line in found["neighbour"]])
    if found["capture"]:
        lines += ["## Capture on and off", ""]
        lines += table(["on / off", "median", "95 % interval", "pairs", "bar of the lower end", ""], [
            [label(line), f"{line['median']:.4f}", f"{line['low']:.4f}–{line['high']:.4f}", str(line["pairs"]), f"≥ {line['bar']}" if line["bar"] else "—", verdict(line)]
            for line in found["capture"]])
    if line := found["serving"]:
        spread = lambda name: ", ".join(f"{value:.1f} ({part})" for part, value in line[name].items())
        lines += ["## Many requests at once over HTTP", ""]
        lines += table(["served, tok/s", "offline, tok/s", "ratio", "bar", "", "first token, ms", "between tokens, ms"], [
            [f"{line['served']:.1f}", f"{line['offline']:.1f}" if line["offline"] else "", f"**{line['value']:.3f}**" if line["value"] else "", f"≥ {line['bar']}", verdict(line),
             spread("ttft_ms"), spread("itl_ms")]])
        lines += [f"{line['tokens']} tokens are generated; the client, on the same machine, used {line['client_share']:.1%} of a processor.", ""]
    return lines


def trial_table(name, search):
    """Every trial of one peer on one file."""
    rows = []
    for trial in search["trials"]:
        if "error" in trial:
            rows.append([words(trial["settings"]), trial["error"]])
            continue
        for key, found in trial["results"].items():
            own = found.get("chosen", {}).get("trials")
            rows += [[words({k: each[k] for k in ("threads", "experts")}), f"{key}: {each['seconds']:.3f} s"] for each in own or []]
        if not own:
            rows.append([words(trial["settings"]), ", ".join(f"{key}: {max(found['tokens_per_second']):.1f}" for key, found in trial["results"].items())])
    chosen = "; ".join(f"{key}: {words(settings)}" for key, settings in search["chosen"].items())
    return [f"### {name}", "", f"Chosen: {chosen}.", "", *table(["settings", "tok/s, or seconds of a trial"], rows)]


def notes(result):
    found, machine, made = result["summary"], result["machine"], result["versions"]
    limit = found["limits"][str(result["threads"])]
    peaks = ", ".join(f"{value:.0f} GFLOP/s {peak_name(peak)}" for peak, value in limit.items() if peak.endswith("gflop_s"))
    return ["## Notes", "",
            f"- Machine: {machine['cpu']} (family {machine['family']}, model {machine['model']}), {machine['processors']} processors"
            f"{', virtual' if machine['hypervisor'] else ''}, {machine['memory_gib']} GiB, Linux {machine['kernel']}; {' '.join(machine['flags'])}.",
            f"- Its limits with {result['threads']} threads, the better of before and after: {limit['read_gb_s']:.1f} GB/s read, {peaks}.",
            f"- moetrail: commit {made['commit']}{' with uncommitted changes' if made['uncommitted_changes'] else ''}, {result['kernels']} kernels, capture on and every row drained. "
            + ", ".join(f"{NAMES[peer]} {version}" for peer, version in result["peers"].items()) + ".",
            f"- A rate is the median of the rounds ({result['round_count']}), a ratio the median of those within a round, to the peer named. A run in which others used more than {QUIET:.0%} of "
            f"the machine is void: it is done again up to {RETRIES} times, the quietest counts, and if that is void too the row does not count.",
            f"- A row in bf16 counts only if every engine's perplexity of one text is within {AGREE:.0%} of moetrail's.",
            f"- GB/s: weights and KV that a step must read; formats of 8 bits as if they were q8_0. Others: the largest share in any counted run.",
            f"- {result['date']}, {result['seconds']} s in all.", ""]


def markdown(result):
    found = result["summary"]
    lines = [f"# moetrail and its peers, {result['threads']} threads", ""]
    if result["quick"]:
        lines += ["**A quick run: it tries the script and measures nothing.**", ""]
    if any(line["rates"] or line["failed"] for line in found["rows"]):
        lines += table(["", "moetrail, tok/s", *(f"{NAMES[peer]}, tok/s" for peer in PEERS), "ratio (rounds)", "bar", "", "moetrail, of the limit", "others"],
                       [row_cells(line) for line in found["rows"]])
    lines += other_tables(found)
    if found["scores"]:
        lines += ["## Perplexity of one text", ""]
        lines += table(["", "perplexity", "from moetrail in bf16"], [
            [line["name"], f"{line['perplexity']:.1f}" if line["perplexity"] else line["error"] or "not told", f"{line['difference']:+.2%}" if line["difference"] is not None else ""]
            for line in found["scores"]])
    lines += notes(result)
    if result["search"]:
        lines += ["## Settings of the peers", ""] + [line for name, search in result["search"].items() for line in trial_table(name, search)]
    return "\n".join(lines)
