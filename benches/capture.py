"""Capture on against capture off: fresh processes in pairs, alternately first."""
from report import interval, keys, median, rates


def pairs(run, count, say):
    """`count` pairs of run(capture)."""
    found = []
    for index in range(count):
        say(f"capture on and off, pair {index + 1} of {count}")
        order = [True, False] if index % 2 == 0 else [False, True]
        found.append({("on" if capture else "off"): run(capture) for capture in order})
    return found


def compared(pairs, value, **name):
    """A figure with capture over the same figure without, pair by pair."""
    ratios = [value(pair["on"]) / value(pair["off"]) for pair in pairs]
    low, high = interval(ratios)
    return dict(**name, pairs=len(ratios), median=median(ratios), low=low, high=high, ratios=ratios)


def summary(pairs):
    """Speed with capture over speed without, and the same of processor time, which a busy machine disturbs less."""
    if not pairs:
        return []
    lines = [compared(pairs, lambda run: median(rates(run, measure, batch)), measure=measure, batch=batch, tokens=tokens)
             for measure, batch, tokens in keys(pairs[0]["on"])]
    return lines + [compared(pairs, lambda run: run["cpu_seconds"], measure="cpu")]
