"""Fifty steps of SmolLM2-135M by each method of `lrk train`: held-out loss over three seeds.

    python benchmarks/methods/fifty_steps.py [--methods NAME ...] [--seeds 0 1 2]

The docstring task, batches of 2 functions, 24 held out, float32, each method at its own default rate, which its page
says how it was found. Rows go to `benchmarks/results/methods/fifty_steps.csv` as they come; what is there is not run
again.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from plots import RESULTS

METHODS = {
    "lora": (),
    "smt": (),
    "galore": (),
    "gmt": (),
    "svft": (),
    "lamda": (),
    "velora": (),
    "deft": (),
    "meft": (),
    "sherl": (),
}
COLUMNS = ("method", "seed", "steps", "learning_rate", "trainable_parameters", "held_out_before", "held_out_after")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    path = RESULTS / "fifty_steps.csv"
    done = set()
    if path.exists():
        with path.open() as file:
            done = {(row["method"], int(row["seed"]), int(row["steps"])) for row in csv.DictReader(file)}
    else:
        path.write_text(",".join(COLUMNS) + "\n")
    for seed in args.seeds:
        for method in args.methods:
            if (method, seed, args.steps) in done:
                continue
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "run.json"
                command = ["train", "--method", method, "--seed", str(seed), "--steps", str(args.steps)]
                command += ["--batch-size", "2", "--held-out", "24", "--json", str(out), *METHODS[method]]
                code = "import sys; from lowrank_kernels.cli import main; sys.exit(main(sys.argv[1:]))"
                subprocess.run([sys.executable, "-c", code, *command], check=True)
                result = json.loads(out.read_text())
            with path.open("a") as file:
                csv.writer(file).writerow([result.get(column, "") for column in COLUMNS])


if __name__ == "__main__":
    main()
