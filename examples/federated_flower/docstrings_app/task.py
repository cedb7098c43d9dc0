"""The model, the data of each client, and how it trains: nothing here knows of rules."""

from __future__ import annotations

import copy
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context

import lowrank_kernels as lk
from lowrank_kernels.cli.batches import batches
from lowrank_kernels.cli.docstrings import MODULES, collect, split
from lowrank_kernels.cli.evaluation import held_out_loss
from lowrank_kernels.cli.method import TARGETS
from lowrank_kernels.integrations.transformers import answer_loss, load_language_model

LIBRARIES = tuple(MODULES)
"""One a client: numpy, scipy, scikit-learn and torch."""


def config(rank: int) -> lk.LoRAConfig:
    return lk.LoRAConfig(r=rank, alpha=2 * rank, target_modules=TARGETS)


@cache
def base() -> tuple[Any, Any]:
    """The model and its tokenizer, read once a process."""
    return load_language_model("smollm2", torch.float32)


def load(context: Context | None = None) -> Any:
    return copy.deepcopy(base()[0])


def library_of(context: Context) -> str:
    return LIBRARIES[int(context.node_config["partition-id"]) % len(LIBRARIES)]


def fit(model: Any, context: Context, settings: dict[str, Any]) -> tuple[int, dict[str, float]]:
    """A few steps of AdamW on the library's own docstrings."""
    examples, _ = split(collect((library_of(context),)))
    steps, size = int(settings["local-steps"]), int(settings["batch-size"])
    seed = 1000 * int(settings["seed"]) + int(settings["server-round"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=float(settings["learning-rate"]), weight_decay=0.0)
    model.train()
    losses = []
    for batch in islice(batches(base()[1], examples, size, seed, "cpu"), steps):
        loss = answer_loss(model, **batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return len(examples), {"loss": sum(losses) / len(losses)}


def held_out(model: Any, count: int) -> float:
    """Loss a target token on functions of all libraries, in nats."""
    _, aside = split(collect())
    return held_out_loss(model, base()[1], aside[:: max(1, len(aside) // count)][:count], 8, "cpu")


def draw(folder: Path, rule: str, losses: list[float], history: list[dict[str, Any]], full: int) -> Path:
    """Held-out loss, and bytes sent beside those of full FedAvg, by round."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.4))
    left.plot(range(len(losses)), losses, "o-")
    left.set(xlabel="round", ylabel="held-out loss (nats a token)", title=rule, xticks=range(len(losses)))
    rounds = [record["round"] for record in history]
    for key, label in (("bytes_down", "down"), ("bytes_up", "up")):
        right.plot(rounds, [record[key] / 2**20 for record in history], "o-", label=label)
    right.axhline(full / 2 / 2**20, color="grey", linestyle="--", label="full FedAvg, each way")
    right.set(xlabel="round", ylabel="MiB sent, all clients", yscale="log", xticks=rounds)
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    path = folder / "rounds.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
