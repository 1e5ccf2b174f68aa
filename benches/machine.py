"""The machine: what it is, what it allows, and who else was using it."""
import contextlib
import hashlib
import json
import math
import os
import platform
import resource
import subprocess
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = ["avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "sve"]
TICK = os.sysconf("SC_CLK_TCK")


def describe():
    """Processor, memory and system, as Linux tells them."""
    info = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        info.setdefault(key.strip(), value.strip())
    flags = set(info.get("flags", info.get("Features", "")).split())
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        caches[f"L{level} {kind.lower()}"] = size
    memory = next(int(line.split()[1]) for line in open("/proc/meminfo") if line.startswith("MemTotal:"))
    return dict(cpu=info.get("model name", platform.machine()), family=info.get("cpu family"), model=info.get("model"),
                processors=len(os.sched_getaffinity(0)), flags=[flag for flag in FLAGS if flag in flags], caches=caches,
                memory_gib=round(memory / 2**20, 1), kernel=platform.release().split("-")[0], hypervisor="hypervisor" in flags)


def compiler():
    """First line of what the C compiler says of itself."""
    return subprocess.run(["cc", "--version"], capture_output=True, text=True).stdout.splitlines()[0]


def versions(binary):
    """What was measured, and with what."""
    git = lambda *words: subprocess.run(["git", "-C", HERE, *words], capture_output=True, text=True).stdout.strip()
    return dict(commit=git("rev-parse", "--short=12", "HEAD"), uncommitted_changes=bool(git("status", "--porcelain", "--untracked-files=no")),
                binary_sha256=hashlib.sha256(Path(binary).read_bytes()).hexdigest(), cc=compiler(), python=platform.python_version())


@contextlib.contextmanager
def limits_binary():
    """limits.c, compiled for this machine."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "limits")
        subprocess.run(["cc", "-O3", "-march=native", "-pthread", HERE / "limits.c", "-o", binary], check=True)
        yield binary


def look(binary, threads, mib=512, rounds=10):
    """GB/s and GFLOP/s for `threads`, by the binary of limits.c."""
    return json.loads(subprocess.run([binary, str(threads), str(mib), str(rounds)], check=True, capture_output=True, text=True).stdout)


def limits(threads):
    """GB/s and GFLOP/s for one thread and for `threads`."""
    with limits_binary() as binary:
        return [look(binary, count) for count in sorted({1, threads})]


def busy_seconds():
    """Processor seconds used by everyone since the machine started, and those that the host took away."""
    fields = [int(field) for field in open("/proc/stat").readline().split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq) / TICK, steal / TICK


def own_seconds():
    """Processor seconds of this process and of its children that have ended."""
    return sum(use.ru_utime + use.ru_stime for use in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def wait_for_lull(seconds):
    """Returns once others left the machine alone for one second, or when the time is up."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began, own = busy_seconds()[0], own_seconds()
        time.sleep(1)
        if busy_seconds()[0] - began - (own_seconds() - own) < 0.05 * os.cpu_count():
            return


def anonymous_bytes(pid):
    """Resident memory of a process that no file backs."""
    try:
        for line in open(f"/proc/{pid}/status"):
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def process_seconds(pid):
    """Processor seconds of one process that runs."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


class Usage:
    """What is used of the machine from now on, by us and by others. `beside` are processes of ours that go on running."""

    def __init__(self, *beside):
        self.beside, self.began = beside, time.monotonic()
        self.at_first = self.now()

    def now(self):
        return *busy_seconds(), own_seconds() + sum(map(process_seconds, self.beside))

    def found(self):
        seconds = time.monotonic() - self.began
        busy, steal, own = (after - before for before, after in zip(self.at_first, self.now()))
        capacity = seconds * os.cpu_count()
        return dict(seconds=round(seconds, 2), cpu_seconds=round(own, 3), others_share=round((busy - own) / capacity, 4),
                    steal_share=round(steal / capacity, 4))


class Failed(RuntimeError):
    """A command that did not end well; `reason` is the line that says why."""

    def __init__(self, command, code, stderr):
        super().__init__(f"{command} ended with {code}: {stderr[-2000:]}")
        lines = [line for line in stderr.splitlines() if line.strip()] or [f"ended with {code}"]
        self.reason = next((line for line in lines if line.lower().startswith("error")), lines[-1])


def watch(command, env=None, every=0.02, beside=(), limit=math.inf):
    """Runs a command to its end, `limit` seconds at most. Returns its output, peak anonymous memory and the others' share of the machine."""
    usage = Usage(*beside)
    # Files, not pipes: nobody has to read while the command runs.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([str(word) for word in command], stdout=out, stderr=err, env={**os.environ, **(env or {})})
        peak = 0
        ended = threading.Event()
        threading.Thread(target=lambda: (process.wait(), ended.set()), daemon=True).start()
        while not ended.wait(every):
            peak = max(peak, anonymous_bytes(process.pid))
            if time.monotonic() - usage.began > limit:
                process.kill()
                ended.wait()
                raise Failed(command, process.returncode, f"error: not done after {limit} s")
        used = usage.found()
        out.seek(0), err.seek(0)
        stdout, stderr = out.read(), err.read()
    if process.returncode != 0:
        raise Failed(command, process.returncode, stderr)
    return dict(stdout=stdout, stderr=stderr, peak_anonymous=peak, **used)
