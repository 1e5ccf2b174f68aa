"""The kernels' own tests: on the GPU, module by module, the driver's first; in a dry run a few of them on the emulation."""
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

MODULE_SECONDS = 60
RESULT = re.compile(r"^test (\S+) \.\.\. (ok|FAILED|ignored)", re.M)


def run(rig):
    binary = rig.binary("gpu_tests")
    # Shrinking a failing case to its smallest takes long, and any case is a finding.
    env = {**os.environ, "PROPTEST_MAX_SHRINK_ITERS": "50", "PROPTEST_DISABLE_FAILURE_PERSISTENCE": "1", "RUST_BACKTRACE": "0"}
    if not rig.dry:
        env["MOETRAIL_TEST_DEVICE"] = "cuda"

    def call(*words, seconds=MODULE_SECONDS):
        try:
            done = subprocess.run([str(binary), *words], capture_output=True, text=True, env=env, timeout=seconds)
            return done.stdout + done.stderr, f"status {done.returncode}"
        except subprocess.TimeoutExpired as late:
            text = lambda part: part.decode(errors="replace") if isinstance(part, bytes) else part or ""
            return text(late.stdout) + text(late.stderr), f"killed after {seconds} s"

    listed = [line.removesuffix(": test") for line in call("--list")[0].splitlines() if line.endswith(": test")]
    modules = {}
    for test in listed:
        modules.setdefault(test.split("::")[0], []).append(test)
    chosen = ["driver", "norm"] if rig.dry else ["driver", *(name for name in modules if name != "driver")]
    rig.note(device=rig.size("emulation", "cuda"), listed=len(listed), modules={})

    def module(name):
        # A process each: after a fault a device answers nothing more to the process that had it.
        text, ended = call(f"{name}::", "--test-threads", "1" if name == "driver" else "4")
        results = dict(RESULT.findall(text))
        failed = [test for test in modules.get(name, []) if results.get(test) != "ok"]
        # Alone, those fail that are at fault, and not those that came after.
        alone = {test: "ok" in dict(RESULT.findall(call(test, "--exact", seconds=30)[0])).values() for test in failed[:6]}
        reasons = {test: reason(text, test) for test in failed}
        rig.found["modules"][name] = dict(passed=len(modules.get(name, [])) - len(failed), failed=reasons, passed_alone=alone, ended=ended)
        for test in failed:
            rig.check(test, False, f"{reasons[test]} (alone: {'ok' if alone.get(test) else 'FAILED' if test in alone else 'not tried'})")
        if not failed:
            rig.check(f"kernels: {name}", True, f"{len(modules.get(name, []))} tests")
        else:
            print(text[-6000:])

    module(chosen[0])
    with ThreadPoolExecutor(rig.size(1, 3)) as pool:
        list(pool.map(module, chosen[1:]))


def reason(text, test):
    """The first lines that a failed test said."""
    said = text.partition(f"---- {test} stdout ----")[2].partition("\n---- ")[0].partition("\nfailures:\n")[0]
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith(("note: ", "thread '"))]
    return " ".join(dict.fromkeys(lines))[:400] or "did not end"
