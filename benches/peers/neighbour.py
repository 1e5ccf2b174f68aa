"""An engine beside one process that does arithmetic on one thread, against its own rate without."""
import subprocess

import machine
from rows import asked

FOREVER = str(10**9)


def neighbours(engines, rows, count, settings, reps, gen_len, say):
    """`count` pairs of runs of each row and engine, with and without the neighbour, alternately first."""
    found = []
    with machine.limits_binary() as binary:
        for index in range(count):
            for row in rows:
                for engine in ("moetrail", "llama_cpp"):
                    pair = dict(row=row.name, engine=engine)
                    for beside in (False, True)[::1 if index % 2 == 0 else -1]:
                        say(f"pair {index + 1} of {count}: {row.name}, {engine}{' beside a neighbour' if beside else ''}")
                        run = lambda *pids: engines.run(engine, row.size, row.format, settings(engine, row), beside=pids, **asked([row], reps, gen_len))
                        pair["beside" if beside else "alone"] = with_neighbour(binary, run) if beside else run()
                    found.append(pair)
    return found


def with_neighbour(binary, run):
    neighbour = subprocess.Popen([binary, "1", "16", FOREVER, "f32_gflop_s"], stdout=subprocess.DEVNULL)
    try:
        return run(neighbour.pid)
    finally:
        neighbour.kill()
        neighbour.wait()
