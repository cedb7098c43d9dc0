"""The server's side: a rule by its word, the loss after each round, a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from lowrank_kernels.integrations.flower import STRATEGIES

from .task import LIBRARIES, config, draw, held_out, load

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    serve(grid, context.run_config)


def serve(grid: Grid, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Run a rule, and return the losses after each round, the strategy's history, and what full FedAvg would send."""
    rule = str(settings["rule"])
    folder = Path.home() / str(settings["output"]) / rule
    folder.mkdir(parents=True, exist_ok=True)
    model = load()
    strategy = STRATEGIES[rule](
        model,
        config(int(settings["rank"])),
        state=folder / "server.pt",
        seed=int(settings["seed"]),
        min_train_nodes=2,
        min_available_nodes=len(LIBRARIES),
        fraction_evaluate=0.0,
    )
    full = 2 * len(LIBRARIES) * sum(4 * p.numel() for p in model.parameters())  # float32, down and up
    result_file = folder / "result.json"

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        whole = load()
        report = strategy.assemble(whole)
        loss = held_out(whole, int(settings["held-out"]))
        report.undo()
        losses = json.loads(result_file.read_text())["losses"][:server_round] if server_round else []
        losses.append(loss)
        result = {"rule": rule, "losses": losses, "history": strategy.history, "full_fedavg_bytes": full}
        result_file.write_text(json.dumps(result, indent=1))
        return MetricRecord({"held-out loss": loss})

    strategy.start(
        grid,
        num_rounds=int(settings["num-server-rounds"]),
        train_config=ConfigRecord({k: settings[k] for k in ("local-steps", "batch-size", "learning-rate", "seed")}),
        evaluate_fn=evaluate,
    )
    result = json.loads(result_file.read_text())
    picture = draw(folder, rule, result["losses"], result["history"], full)
    print(f"{rule}: held-out loss {result['losses'][0]:.4f} -> {result['losses'][-1]:.4f}; plot: {picture}")
    return result
