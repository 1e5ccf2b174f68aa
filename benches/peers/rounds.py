"""The rows, engines in turn: every ratio is taken within a round."""
from rows import asked, only


def rounds(engines, rows, count, settings, reps, gen_len, say, before):
    """`count` rounds of every row, and what is to be done before each. A row that moetrail cannot do is left out; a peer that fails is left out of the row."""
    found, out = [], set()
    for index in range(count):
        before()
        for group in groups(rows):
            runs = {row.name: {} for row in group}
            # Whoever runs later may find a warmer or a slower machine: the order alternates.
            for engine in ("moetrail", *dict.fromkeys(peer for row in group for peer in row.peers))[::1 if index % 2 == 0 else -1]:
                left = [row for row in group if engine in ("moetrail", *row.peers) and not {(row.name, engine), (row.name, "moetrail")} & out]
                for format, chosen, together in processes(engine, left, settings):
                    say(f"round {index + 1} of {count}: {engine}, {', '.join(row.name for row in together)}")
                    run = engines.run(engine, group[0].size, format, chosen, **asked(together, reps, gen_len))
                    for row in together:
                        runs[row.name][engine] = only(run, row)
                        if "error" in run:
                            out.add((row.name, engine))
            found += [dict(row=name, round=index, order=list(each), runs=each) for name, each in runs.items() if each]
    return found


def groups(rows):
    """Rows that a peer can measure in one process: of one file, with contexts of one length."""
    found = {}
    for row in rows:
        found.setdefault((row.size, row.file, row.context), []).append(row)
    return found.values()


def processes(engine, rows, settings):
    """(format, settings, rows) of every process of an engine: to peers, int8 and q8_0 are one."""
    found = {}
    for row in rows:
        chosen, format = settings(engine, row), row.format if engine == "moetrail" else row.file
        found.setdefault((format, *sorted(chosen.items())), (format, chosen, []))[2].append(row)
    return found.values()


def scores(engines, rows, settings, tokens, say):
    """What each engine makes of one text, for every format and checkpoint."""
    found = {}
    for row in rows:
        # moetrail's bf16 is what all are compared with.
        for engine, format in (("moetrail", "bf16"), ("moetrail", row.format), *((peer, row.file) for peer in row.peers)):
            name = f"{engine} {row.size} {format}"
            if name not in found:
                say(f"score: {name}")
                run = engines.run(engine, row.size, format, settings(engine, row), prompt_len=[], batch=[], reps=1, score=tokens)
                found[name] = {part: run[part] for part in ("error",) if part in run} or dict(perplexity=run["report"].get("perplexity"))
    return found
