"""Whether `lrk train`, stopped and started again, ends where an uninterrupted run does: bit for bit, every method.

    python benchmarks/methods/resume.py [METHOD ...] [--kill]

Each method runs three times on SmolLM2, in processes of their own: whole; half of it, stopped by `--stop-after`, or by
SIGKILL two steps beyond its checkpoint with `--kill`; and the rest of it. Losses, held-out losses and every file
written are compared. Chains merge once before the stop and once after. Exits with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from plots import RESULTS

from lowrank_kernels.bench.run import conditions
from lowrank_kernels.cli.methods import METHODS, ignored_options

STEPS, HALF = 8, 4
SIZES = {
    "steps": STEPS,
    "batch-size": 4,
    "held-out": 16,
    "dropout": 0.1,
    "steps-per-link": 3,
    "link-warmup": 1,
    "gradient-batches": 2,
    "warmup-steps": 2,
}
LRK = [sys.executable, "-c", "import sys; from lowrank_kernels.cli import main; sys.exit(main())"]


def train(method: str, *more: object, kill_at: int | None = None) -> None:
    others = ignored_options(method)
    options = [word for name, value in SIZES.items() if f"--{name}" not in others for word in (f"--{name}", str(value))]
    command = [*LRK, "train", "--method", method, *options, *map(str, more)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:  # the progress bar's carriage returns end lines too
            said.append(line)
            if kill_at is not None and f"| {kill_at}/{STEPS} [" in line:
                process.kill()
    if process.returncode != (0 if kill_at is None else -9):
        sys.exit(f"{' '.join(command[3:])}: exit code {process.returncode}\n{''.join(said)}")


def compare(method: str, kill: bool, folder: Path) -> dict[str, object]:
    """One method's row, from three runs in an empty folder."""
    train(method, "--output", folder / "whole", "--json", folder / "whole.json")
    parts = ["--checkpoint", folder / "state.pt", "--save-every", HALF]
    train(method, *parts, *(() if kill else ("--stop-after", HALF)), kill_at=HALF + 2 if kill else None)
    train(method, *parts, "--output", folder / "parts", "--json", folder / "parts.json")
    whole, resumed = (json.loads((folder / f"{name}.json").read_text()) for name in ("whole", "parts"))
    differ = [key for key in ("losses", "held_out_before", "held_out_after", "links") if whole[key] != resumed[key]]
    names = sorted({path.name for name in ("whole", "parts") for path in (folder / name).iterdir()})
    for name in names:
        pair = [folder / run / name for run in ("whole", "parts")]
        if not all(path.exists() for path in pair) or pair[0].read_bytes() != pair[1].read_bytes():
            differ.append(name)
    seen = {key: whole[key] for key in ("links", "held_out_before", "held_out_after")}
    return {
        "method": method,
        "stopped by": "SIGKILL" if kill else "--stop-after",
        **seen,
        "files": names,
        "differ": differ,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", metavar="METHOD", default=list(METHODS), help="default: all")
    parser.add_argument("--kill", action="store_true", help="stop by SIGKILL between two checkpoints")
    args = parser.parse_args()
    path = RESULTS / "resume.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    where = conditions(torch.device("cpu"), "python benchmarks/methods/resume.py")
    for method in args.methods:
        with tempfile.TemporaryDirectory() as folder:
            row = compare(method, args.kill, Path(folder))
        print(json.dumps(row), flush=True)
        rows = [r for r in rows if (r["method"], r["stopped by"]) != (method, row["stopped by"])] + [row]
        path.write_text(json.dumps({"conditions": where, "rows": rows}, indent=1) + "\n")
    return int(any(row["differ"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
