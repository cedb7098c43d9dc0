"""Three rounds of each federated rule on SmolLM2-135M, in Flower's simulation: loss and bytes.

    python benchmarks/federated.py [--rules NAME ...]

The example `examples/federated_flower`: four clients, each with the docstrings of one library, rank 8, AdamW. Losses
are of held-out functions of all four libraries. Bytes are those of the arrays in all messages, beside four clients' full
FedAvg, which sends every parameter in float32 down and up. Rows go to `benchmarks/results/federated.csv` as they come;
rules that are there are not run again.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "federated_flower"
RULES = ("fedavg", "ffa-lora", "fedex-lora", "flexlora", "federa", "slora", "fed-rac-lora")
COLUMNS = ("rule", "rank", "rounds", "held_out_before", "held_out_after", "bytes_down", "bytes_up", "full_fedavg_bytes")


def row(rule: str, rounds: int, folder: str) -> dict[str, object]:
    settings = [f"num-server-rounds={rounds}", f'output="{folder}"']
    subprocess.run([sys.executable, str(EXAMPLE / "run.py"), "--rule", rule, "--set", *settings], check=True)
    result = json.loads((Path(folder) / rule / "result.json").read_text())
    losses, history = result["losses"], result["history"]
    return {
        "rule": rule,
        "rank": 8,
        "rounds": rounds,
        "held_out_before": losses[0],
        "held_out_after": losses[rounds],
        "bytes_down": sum(record["bytes_down"] for record in history),
        "bytes_up": sum(record["bytes_up"] for record in history),
        "full_fedavg_bytes": rounds * result["full_fedavg_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    path = ROOT / "benchmarks" / "results" / "federated.csv"
    if not path.exists():
        path.write_text(",".join(COLUMNS) + "\n")
    with path.open() as file:
        done = {(found["rule"], int(found["rounds"])) for found in csv.DictReader(file)}
    for rule in args.rules:
        if (rule, args.rounds) in done:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = row(rule, args.rounds, folder)
        with path.open("a") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(found)


if __name__ == "__main__":
    main()
