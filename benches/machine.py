"""The machine: what it is, what it allows, and who else was using it."""
import json
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


def limits(threads, mib=512, rounds=10):
    """Compiles and runs limits.c: GB/s and GFLOP/s for one thread and for `threads`."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "limits")
        subprocess.run(["cc", "-O3", "-march=native", "-pthread", HERE / "limits.c", "-o", binary], check=True)
        measured = []
        for count in sorted({1, threads}):
            run = subprocess.run([binary, str(count), str(mib), str(rounds)], check=True, capture_output=True, text=True)
            measured.append(json.loads(run.stdout))
    return measured


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


def watch(command, env=None, every=0.02):
    """Runs a command to its end. Returns its output, peak anonymous memory and the others' share of the machine."""
    (busy, steal), own, began = busy_seconds(), own_seconds(), time.monotonic()
    # Files, not pipes: nobody has to read while the command runs.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([str(word) for word in command], stdout=out, stderr=err, env={**os.environ, **(env or {})})
        peak = 0
        ended = threading.Event()
        threading.Thread(target=lambda: (process.wait(), ended.set()), daemon=True).start()
        while not ended.wait(every):
            peak = max(peak, anonymous_bytes(process.pid))
        seconds = time.monotonic() - began
        out.seek(0), err.seek(0)
        stdout, stderr = out.read(), err.read()
    if process.returncode != 0:
        raise RuntimeError(f"{command} ended with {process.returncode}: {stderr[-2000:]}")
    (busy_after, steal_after), capacity, spent = busy_seconds(), seconds * os.cpu_count(), own_seconds() - own
    others = (busy_after - busy - spent) / capacity
    return dict(stdout=stdout, stderr=stderr, peak_anonymous=peak, seconds=round(seconds, 2), cpu_seconds=round(spent, 3),
                others_share=round(others, 4), steal_share=round((steal_after - steal) / capacity, 4))
