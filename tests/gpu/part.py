"""Runs one part: python tests/gpu/part.py NAME FILE [--dry]; what it found goes to FILE, as JSON, while it runs."""
import importlib
import sys
import traceback

from rig import Rig, Skip


def main():
    name, file = sys.argv[1:3]
    rig = Rig(name, "--dry" in sys.argv, file)
    rig.note(status="killed")
    try:
        importlib.import_module(f"parts.{name}").run(rig)
        rig.note(status="failed" if any(not check["ok"] for check in rig.found["checks"]) else "passed")
    except Skip as reason:
        print(f"skipped: {reason}")
        rig.note(status="skipped", reason=str(reason))
    except ModuleNotFoundError as missing:
        # On a machine with a GPU everything is to run.
        reason, packages = f"python has no {missing.name}", ("numpy", "torch", "transformers", "safetensors", "tokenizers")
        rig.note(status="skipped" if rig.dry and missing.name in packages else "crashed", reason=reason)
    except Exception as error:
        traceback.print_exc()
        rig.note(status="crashed", reason=f"{type(error).__name__}: {error}".split("\n")[0][:1000])


if __name__ == "__main__":
    main()
