"""A step of GaLore over the 210 matrices of SmolLM2-135M's decoder layers, beside galore-torch's, in turns.

    pip install --target /tmp/galore galore-torch==1.0 --no-deps
    PYTHONPATH=/tmp/galore python benchmarks/methods/galore.py [--threads N] [--steps N]

Both have R = 64, T = 200, α = 0.25, decay 0.01, and the same float32 gradients. Without galore-torch ours is timed
alone; with it the figures are written to results/methods/galore.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from plots import RESULTS
from torch import nn

from lowrank_kernels.optim import GaLore

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cost_over_frozen import conditions

LAYER = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
RANK, PERIOD = 64, 200


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in LAYER * 30]
    for p in made:
        p.grad = 0.01 * torch.randn(p.shape, generator=generator)
    return made


def state_bytes(value: Any) -> int:
    """Of all tensors in the state, also those in objects."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(state_bytes, value.values()))
    return state_bytes(vars(value)) if hasattr(value, "__dict__") else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ours = matrices()
    optimizers: dict[str, torch.optim.Optimizer] = {
        "ours": GaLore([{"params": ours, "rank": RANK, "update_proj_gap": PERIOD}], eps=1e-6, weight_decay=0.01)
    }
    try:
        from galore_torch import GaLoreAdamW
    except ImportError:
        print("galore-torch is not installed: ours alone")
    else:
        warnings.simplefilter("ignore")
        theirs = matrices()
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad
        group = {"params": theirs, "rank": RANK, "update_proj_gap": PERIOD, "scale": 0.25, "proj_type": "std"}
        optimizers["galore-torch"] = GaLoreAdamW([group], weight_decay=0.01)
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(1 + args.steps):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            seconds[name].append(time.perf_counter() - start)
    result: dict[str, Any] = {"conditions": conditions(), "steps": args.steps}
    for name, (first, *others) in seconds.items():
        median = statistics.median(others)
        mean = (first + (PERIOD - 1) * median) / PERIOD
        size = sum(state_bytes(s) for s in optimizers[name].state.values())
        result[name] = {
            "step, ms": round(1e3 * median, 1),
            "step with new directions, s": round(first, 2),
            "mean over T, ms": round(1e3 * mean, 1),
            "state, MiB": round(size / 2**20, 1),
        }
        print(
            f"{name}: {1e3 * median:.0f} ms a step (median of {args.steps}), {first:.2f} s with new directions, "
            f"{1e3 * mean:.0f} ms on average over {PERIOD}; state {size / 2**20:.1f} MiB"
        )
    if len(seconds) == 2:
        pairs = zip(seconds["ours"][1:], seconds["galore-torch"][1:], strict=True)
        result["ours over galore-torch, median of pairs"] = round(statistics.median(a / b for a, b in pairs), 3)
        print(f"ours over galore-torch, median of pairs: {result['ours over galore-torch, median of pairs']:.2f}")
        (RESULTS / "galore.json").write_text(json.dumps(result, indent=1) + "\n")
    formula = 4 * sum(RANK * min(shape) + 2 * RANK * max(shape) for shape in LAYER * 30)
    adam = 8 * sum(p.numel() for p in ours)
    print(f"R short + 2 R long: {formula / 2**20:.1f} MiB; Adam: {adam / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
