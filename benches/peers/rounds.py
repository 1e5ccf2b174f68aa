"""The rows, engines in turn: every ratio is taken within a round."""


def rounds(engines, rows, count, settings, reps, gen_len, say):
    """`count` rounds of every row. A row that moetrail cannot do is left out; a peer that fails is left out of the row."""
    found, out = [], set()
    for index in range(count):
        for row in rows:
            runs = {}
            # Whoever runs later may find a warmer or a slower machine: the order alternates.
            for engine in ("moetrail", *row.peers)[::1 if index % 2 == 0 else -1]:
                if (row.name, engine) in out or (row.name, "moetrail") in out:
                    continue
                say(f"round {index + 1} of {count}: {row.name}, {engine}")
                runs[engine] = engines.run(engine, row.size, row.format, settings(engine, row), **row.asked(reps, gen_len))
                if "error" in runs[engine]:
                    out.add((row.name, engine))
            if runs:
                found.append(dict(row=row.name, round=index, order=list(runs), runs=runs))
    return found


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
