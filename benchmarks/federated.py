"""Three rounds of each federated rule on SmolLM2-135M, in Flower's simulation: loss and bytes.

    python benchmarks/federated.py [--rules NAME ...]

The app of `examples/federated_flower`, with its settings: four clients, each with the docstrings of one library, rank
8, AdamW. Losses are of held-out functions of all four. Bytes are those of the arrays in all messages, beside what full
FedAvg would send: every parameter in float32, down to and up from each client. Rows go to
`benchmarks/results/federated.csv` as they come; rules that are there are not run again.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "federated_flower"
RESULTS = ROOT / "benchmarks" / "results" / "federated.csv"
RULES = ("fedavg", "ffa-lora", "fedex-lora", "flexlora", "federa", "slora", "fed-rac-lora")
COLUMNS = ("rule", "rank", "rounds", "held_out_before", "held_out_after", "bytes_down", "bytes_up", "full_fedavg_bytes")
ROUNDS = 3


def simulate(rules: list[str], output: Path) -> None:
    """One simulation, in which the server runs one rule after another."""
    import tomllib
    from docstrings_app.client_app import app_for  # the processes of a run find it on their path
    from docstrings_app.server_app import serve
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    settings = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    server = ServerApp()

    @server.main()
    def main(grid: Any, context: Any) -> None:
        for rule in rules:
            result = serve(grid, {**settings, "rule": rule, "num-server-rounds": ROUNDS, "output": str(output)})
            losses, history = result["losses"], result["history"]
            row = {
                "rule": rule,
                "rank": settings["rank"],
                "rounds": ROUNDS,
                "held_out_before": losses[0],
                "held_out_after": losses[ROUNDS],
                "bytes_down": sum(record["bytes_down"] for record in history),
                "bytes_up": sum(record["bytes_up"] for record in history),
                "full_fedavg_bytes": ROUNDS * result["full_fedavg_bytes"],
            }
            with RESULTS.open("a") as file:
                csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)

    resources = {"client_resources": {"num_cpus": os.cpu_count(), "num_gpus": 0.0}}  # one client at a time
    run_simulation(server, app_for(int(settings["rank"])), 4, backend_config=resources)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        simulate(args.rules, args.inside)
        return
    if not RESULTS.exists():
        RESULTS.write_text(",".join(COLUMNS) + "\n")
    with RESULTS.open() as file:
        done = {row["rule"] for row in csv.DictReader(file) if int(row["rounds"]) == ROUNDS}
    rules = [rule for rule in args.rules if rule not in done]
    if not rules:
        return
    sys.path.insert(0, str(EXAMPLE))
    import run

    with tempfile.TemporaryDirectory() as folder:
        paths = os.pathsep.join([str(EXAMPLE), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, __file__, "--inside", folder, "--rules", *rules]
        try:
            subprocess.run(command, check=True, env={**run.environment(Path(folder)), "PYTHONPATH": paths})
        finally:
            run.stop(Path(folder))


if __name__ == "__main__":
    main()
