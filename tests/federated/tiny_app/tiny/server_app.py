"""The server: waits for two nodes, runs a rule, and writes what it has come to."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from lowrank_kernels.integrations.flower import STRATEGIES, LowRankStrategy

from .task import CONFIG, base

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    serve(grid, context.run_config)


def serve(grid: Grid, settings: Mapping[str, Any]) -> None:
    folder = Path(str(settings["folder"]))
    while len(list(grid.get_node_ids())) < 2:
        time.sleep(0.1)
    strategy = make(str(settings["rule"]), state=folder / "server.pt")
    strategy.start(grid, num_rounds=int(settings["rounds"]), timeout=float(settings["timeout"]))
    torch.save(weights_of(strategy), folder / "model.pt")
    aside = folder / "aside"
    aside.write_text(json.dumps(strategy.history))
    os.replace(aside, folder / "history.json")  # the test waits for it


def make(rule: str, state: Path | None = None) -> LowRankStrategy:
    return STRATEGIES[rule](
        base(), CONFIG, state=state, min_train_nodes=1, min_available_nodes=1, fraction_evaluate=0.0
    )


def weights_of(strategy: LowRankStrategy) -> dict[str, Tensor]:
    model = base()
    strategy.assemble(model)
    return model.state_dict()
