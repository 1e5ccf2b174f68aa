"""The checkpoints that are measured: made where there are none yet, and read once so that they lie in the page cache."""
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def make(folder, size, python):
    """A qwen3_moe checkpoint in bf16 with random weights, by an interpreter that has tests/golden/requirements.txt."""
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([python, ROOT / "tests/golden/make_moe.py", folder, "--arch", "qwen3_moe", "--size", size, "--dtype", "bf16"], check=True)
    for file in folder.glob("*.safetensors"):
        read(file)
    return folder


def make_gguf(folder, kind, python):
    """The same weights as one GGUF file beside the folder, by an interpreter that has gguf."""
    file = folder.with_name(f"{folder.name}-{kind}.gguf")
    if not file.exists():
        part = file.with_suffix(".part")
        subprocess.run([python, ROOT / "benches/peers/to_gguf.py", folder, part, kind], check=True)
        part.rename(file)
    read(file)
    return file


def read(file):
    """Every engine is to find the file in the page cache, also in its first run."""
    with open(file, "rb", buffering=0) as stream:
        while stream.read(1 << 24):
            pass
