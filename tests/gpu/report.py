"""Tables of what was found."""
import statistics

import shapes


def text(everything):
    about, parts = everything["about"], everything["parts"]
    lines = ["# GPU run", "", *head(about), ""]
    if about["dry"]:
        lines += ["**Dry: there was no GPU. Sizes are tiny; times, rates and ratios mean nothing.**", ""]
    lines += ["## Parts", "", "| part | result | checks | seconds |", "|---|---|---|---|"]
    for name, part in parts.items():
        checks = part.get("checks", [])
        good = sum(check["ok"] for check in checks)
        lines.append(f"| {name} | {part['status']}{': ' + part['reason'] if part.get('reason') else ''} | {f'{good} of {len(checks)}' if checks else ''} | "
                     f"{part['seconds']} |")
    for title, section in [("Failed checks", failed), ("Kernels", kernels), ("Parity", parity), ("Checks", passed), ("Replay", replay),
                           ("Kernels by themselves", micro), ("Engine", engine), ("Capture on over capture off", pairs),
                           ("Limits by torch", limits)]:
        if found := section(parts):
            lines += ["", f"## {title}", "", *found]
    return "\n".join(lines) + "\n"


def head(about):
    gpu, packed = about.get("gpu") or {}, about.get("packed") or about
    card = ", ".join(filter(None, [gpu.get("name"), gpu.get("memory.total"), gpu.get("driver_version") and f"driver {gpu['driver_version']}"]))
    card += "; " if card else ""
    return [f"{card}{about['processors']} processors ({about['cpu']}); commit {packed.get('commit')}"
            f"{', with uncommitted changes' if packed.get('uncommitted_changes') else ''}; {about.get('seconds')} s."]


def failed(parts):
    return [f"- {name}: {check['name']}: {check['detail']}" for name, part in parts.items() for check in part.get("checks", []) if not check["ok"]]


def kernels(parts):
    modules = parts.get("kernels", {}).get("modules")
    if not modules:
        return []
    lines = [f"On {parts['kernels']['device']}.", "", "| module | passed | failed |", "|---|---|---|"]
    return lines + [f"| {name} | {m['passed']} | {', '.join(m['failed']) or 0} |" for name, m in modules.items()]


def parity(parts):
    models = parts.get("parity", {}).get("models")
    if not models:
        return []
    lines = ["Log-probabilities of the same tokens; a cell is a (token, layer) with its experts in order.", "",
             "| checkpoint | pair | tokens | median abs difference | mean | p99 | largest | cells with the same set | cells differing | excused |", "|---|---|---|---|---|---|---|---|---|---|"]
    for name, pairs_ in models.items():
        for pair, d in pairs_.items():
            pair = " vs ".join({"gpu": "f32", "bf16": "bf16", "cpu": "CPU f32", "transformers": "transformers f32"}.get(side, side) for side in pair.split(" | "))
            lines.append(f"| {name} | {pair} | {d['tokens']} | {d['median']:.1e} | {d['mean']:.1e} | {d['p99']:.1e} | {d['max']:.1e} | {d['sets_equal']:.2%} | {d['differ']} | {d['excused']} |")
    return lines


def passed(parts):
    lines = []
    for name in ("invariance", "capture", "sanitizer"):
        lines += [f"- {name}: {check['name']}{': ' + check['detail'] if check['detail'] else ''}" for check in parts.get(name, {}).get("checks", []) if check["ok"]]
    return lines


def replay(parts):
    models = parts.get("replay", {}).get("models")
    if not models:
        return []
    lines = ["KL (k3) between a trainer in f32 and the engine in bf16, over the sampled tokens.", "",
             "| checkpoint | trainer | tokens | cells that differ | routed by the trainer | rows replayed | rows shifted by one |", "|---|---|---|---|---|---|---|"]
    for name, m in models.items():
        for device, kl in m["trainers"].items():
            lines.append(f"| {name} | {device} | {m['tokens']} | {kl['cells_differing']:.2%} | {kl['free']:.1e} | {kl['replayed']:.1e} | {kl['shifted']:.1e} |")
    return lines


def micro(parts):
    part = parts.get("micro", {})
    if not part.get("lines"):
        return []
    lines = [f"A copy on the device: {part['copy_gb_s']:.0f} GB/s, read and written. ", "",
             "| kernel | sizes | µs | GB/s | of the copy | TFLOP/s | of torch's product |", "|---|---|---|---|---|---|---|"]
    rate = parts.get("peer", {}).get("matmul_tflop_s")
    for line in part["lines"]:
        if "error" in line:
            lines.append(f"| {line['op']} | {line['error']} | | | | | |")
            continue
        sizes = ", ".join(f"{key} {value}" for key, value in line.items() if key not in ("op", "us", "gb_s", "copy_share", "tflop_s"))
        flops = line.get("tflop_s")
        lines.append(f"| {line['op']} | {sizes} | {line['us']:.1f} | {show(line.get('gb_s'), '.0f')} | {show(line.get('copy_share'), '.0%')} | "
                     f"{show(flops, '.1f')} | {show(flops / rate if flops is not None and rate else None, '.0%')} |")
    return lines


def engine(parts):
    models = parts.get("bench", {}).get("models")
    if not models:
        return []
    peer, micro_ = parts.get("peer", {}), parts.get("micro", {})
    matmul, copy = peer.get("matmul_tflop_s"), micro_.get("copy_gb_s") or peer.get("copy_gb_s")
    if micro_.get("tiny"):
        copy = peer.get("copy_gb_s")
    lines = ["Tokens per second, capture on, median of the repetitions. TFLOP/s of the products and attention; GB/s of weights and KV that a step reads,",
             "experts counted as expected when all sets are equally likely; shares of torch's product and of the copy on this device.", "",
             "| model | measure | moetrail | transformers | ratio | TFLOP/s | of the product | GB/s | of the copy |", "|---|---|---|---|---|---|---|---|---|"]
    for name, report in models.items():
        shape = {**shapes.SHAPES, **shapes.DRY}[name]
        theirs = {key(line): line for line in (peer.get("models") or {}).get(name, {}).get("results", [])}
        for line in report.get("results", []):
            rate = statistics.median(line["tokens_per_second"])
            other = theirs.get(key(line))
            other = statistics.median(other["tokens_per_second"]) if other else None
            flops = moved = None
            if line["measure"] == "prefill":
                label = f"prefill {line['tokens']}"
                flops = shapes.prefill_flops(shape, line["tokens"]) * rate / line["tokens"] / 1e12
            else:
                label = f"decode, batch {line['batch']}"
                moved = shapes.decode_bytes(shape, line["batch"], line["context"] + line["tokens"] / 2) * rate / line["batch"] / 1e9
            lines.append(f"| {name} | {label} | {rate:.0f} | {show(other, '.0f')} | {show(other and rate / other, '.2f')} | {show(flops, '.1f')} | "
                         f"{show(flops and matmul and flops / matmul, '.0%')} | {show(moved, '.0f')} | {show(moved and copy and moved / copy, '.0%')} |")
    ahead = "; ".join(f"{name}: {report['steps_ahead']} of {report['steps']}" for name, report in models.items() if "steps" in report)
    if ahead:
        lines += ["", f"Steps issued while the one before ran: {ahead}."]
    return lines


def key(line):
    return line["measure"], line["tokens"] if line["measure"] == "prefill" else line["batch"]


def pairs(parts):
    lines = []
    for name, report in (parts.get("bench", {}).get("models") or {}).items():
        for found in report.get("capture_pairs") or []:
            ratios = [on / off for on, off in zip(found["on"], found["off"])]
            lines.append(f"| {name} | {found['measure']} {found['count']} | {statistics.median(ratios):.3f} | {min(ratios):.3f} to {max(ratios):.3f} | {len(ratios)} |")
    return lines and ["| model | measure | median | range | pairs |", "|---|---|---|---|---|", *lines]


def limits(parts):
    part = parts.get("peer", {})
    if "matmul_tflop_s" not in part:
        return []
    lines = [f"torch {part['torch']} (CUDA {part['cuda']}), transformers {part['transformers']}: product {part['matmul']} {part['matmul_tflop_s']:.1f} TFLOP/s; "
             f"copy {part['copy_gb_s']:.0f} GB/s, read and written."]
    for name, found in (part.get("models") or {}).items():
        chosen = ", ".join(f"{line['measure']} {key(line)[1]}: {line['experts']}" for line in found["results"])
        lines.append(f"transformers chose for {name}: attention {found['attention']}; experts {chosen}.")
    return lines


def show(value, form):
    return "" if value is None else format(value, form)
