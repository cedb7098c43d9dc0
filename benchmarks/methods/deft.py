"""What DEFT's term costs beside plain LoRA: time of forward and backward, and what is kept between them, in turns.

    python benchmarks/methods/deft.py [--threads N] [--rounds N]

Two decoder layers of SmolLM2's shape with random weights, all seven linears adapted at R = 8, 8 × 64 tokens, float32.
"The formula" is the term written with PyTorch's operations. Writes results/methods/deft.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch
from plots import RESULTS
from torch import Tensor
from velora import R, adapted, conditions, kept_bytes, peak_allocated, seconds

import lowrank_kernels as lk
from lowrank_kernels.cli.method import TARGETS
from lowrank_kernels.losses import Density

EPS = 1e-2


def by_formula(model: Any) -> None:
    """Add the term of PyTorch's operations to the model's loss."""
    outputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda module, args, o: outputs.append(o))

    def add(module: Any, args: Any, output: Any) -> Any:
        output.loss = output.loss + torch.stack([(o**2 / (o**2 + EPS)).mean() for o in outputs]).mean()
        outputs.clear()
        return output

    model.register_forward_hook(add)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = ("LoRA", "with Density", "with the formula")
    models = {name: adapted(lk.LoRAConfig(r=R, alpha=2 * R, target_modules=TARGETS)).train() for name in names}
    Density(models["with Density"], eps=EPS, into_loss=True)
    by_formula(models["with the formula"])
    for model in models.values():
        seconds(model)
    rounds = [{name: seconds(model) for name, model in models.items()} for _ in range(args.rounds)]
    result: dict[str, Any] = {"conditions": conditions(), "rounds": args.rounds}
    for name, model in models.items():
        result[name] = {
            "time over LoRA": round(statistics.median(r[name] / r["LoRA"] for r in rounds), 3),
            "kept for backward, MiB": round(kept_bytes(model) / 2**20, 2),
            "peak, MiB": round(peak_allocated(lambda model=model: seconds(model), torch.device("cpu")) / 2**20, 1),
        }
        print(name, result[name])
    (RESULTS / "deft.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
