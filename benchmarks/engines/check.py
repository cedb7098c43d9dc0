"""Converted adapters in the engines they are for, against this package: one command an engine.

    python benchmarks/engines/check.py llama_cpp [--folder DIR] [--python PATH] [--json FILE]

Makes models and adapters in DIR (default: a temporary folder), converts the adapters, computes the outputs here, in
float32, and runs ``in_ENGINE.py`` with an interpreter of its own: that of --python, or of an environment in DIR with
the versions of ``requirements/ENGINE.txt``. Cases with a planted fault must differ, all others agree within the
engine's bound; the exit code says whether they do. Outside CI: the environments take up to a gigabyte.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import cases
import numpy as np

HERE = Path(__file__).resolve().parent
BOUNDS = {"llama_cpp": 1e-4, "mlx": 1e-5, "lycoris": 1e-6, "diffusers": 1e-5, "onnx": 0.0}
"""Largest difference of two outputs, over the largest output where that is above 1: of log-probabilities (llama_cpp),
logits or activations; greedy tokens are equal."""


def environment(engine: str, folder: Path) -> Path:
    """The Python of a new environment with the pinned versions."""
    home = folder / "environment"
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
        requirements = HERE / "requirements" / f"{engine}.txt"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", requirements], check=True)
    return python


def difference(engine: str, ours: np.ndarray, theirs: np.ndarray) -> float:
    if ours.shape != theirs.shape:
        raise ValueError(f"expected outputs of shape {ours.shape}, got {theirs.shape}")
    if engine == "llama_cpp":
        ours = (
            ours
            - np.log(np.exp(ours - ours.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - ours.max(-1, keepdims=True)
        )
    return float(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max() / max(1.0, np.abs(ours).max()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=BOUNDS)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--python", type=Path)
    parser.add_argument("--models", nargs="*", default=(), help="only these; rows of others stay")
    parser.add_argument("--json", type=Path, default=HERE.parent / "results" / "engines.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        python = args.python or environment(args.engine, folder)
        prepared = cases.PREPARE[args.engine](folder, python, args.models)
        (folder / "cases.json").write_text(json.dumps(prepared, indent=1))
        run = subprocess.run([python, HERE / f"in_{args.engine}.py", folder], check=False)
        if run.returncode:
            print(f"the engine's script ended with {run.returncode}", file=sys.stderr)
            return 1
        return report(args, folder, prepared)


def report(args: argparse.Namespace, folder: Path, prepared: list[dict[str, Any]]) -> int:
    bound, rows, failed = BOUNDS[args.engine], [], 0
    said = json.loads((folder / "said.json").read_text())
    for case in prepared:
        error = said["errors"].get(case["name"])
        ours, theirs = folder / f"{case['name']}.ours.npy", folder / f"{case['name']}.theirs.npy"
        off = None if error else difference(args.engine, np.load(ours), np.load(theirs))
        good = bool(error or (off is not None and off > bound)) if case["fault"] else off is not None and off <= bound
        failed += not good
        row = {"model": case["model"], "adapter": case["adapter"], "fault": case["fault"], "difference": off}
        rows.append(row | ({"error": error[:200]} if error else {}))
        print(f"{'ok  ' if good else 'FAIL'} {case['name']:<50} {error[:100] if error else f'{off:.2e}'}", flush=True)
    found = json.loads(args.json.read_text()) if args.json.exists() else {}
    before = found.get(args.engine, {}).get("cases", [])
    rows = [row for row in before if args.models and row["model"] not in args.models] + rows
    found[args.engine] = {"bound": bound, "versions": said["versions"], "cases": rows}
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
