"""Capture on against capture off: in pairs, alternately first, in one process and over the same weights (`moetrail bench --capture-pairs`)."""
from report import interval, median


def summary(run):
    """Speed with capture over speed without, pair by pair."""
    return [compared(found) for found in run["report"]["capture_pairs"]] if "report" in run else []


def compared(found):
    ratios = [on / off for on, off in zip(found["on"], found["off"])]
    low, high = interval(ratios)
    # A prefill is named by its tokens, a decode by its batch.
    name = dict(tokens=found["count"], batch=None) if found["measure"] == "prefill" else dict(tokens=None, batch=found["count"])
    return dict(measure=found["measure"], **name, pairs=len(ratios), median=median(ratios), low=low, high=high)
