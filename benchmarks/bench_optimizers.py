"""What a step of each optimizer costs, over AdamW(foreach=True) on the same factors: 210 layers of rank 16.

    python benchmarks/bench_optimizers.py [--json FILE]

The optimizers take turns within each round; each figure is the ratio of medians.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from cost_over_frozen import conditions

from lowrank_kernels.bench import interleaved
from lowrank_kernels.optim import LoRAPro, LoRARITE

LAYERS, RANK, WIDTH = 210, 16, 576


def pairs(layers: int, rank: int, width: int) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    params = []
    for _ in range(layers):
        params += [torch.nn.Parameter(torch.randn(rank, width) / width**0.5)]
        params += [torch.nn.Parameter(torch.randn(width, rank) / 10)]
    for p in params:
        p.grad = torch.randn_like(p) / 100
    return params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=30.0)
    args = parser.parse_args()
    torch.set_num_threads(2)

    def groups() -> list[dict]:
        return [{"params": pairs(LAYERS, RANK, WIDTH), "scaling": [2.0] * LAYERS}]

    optimizers = {
        "AdamW(foreach=True)": torch.optim.AdamW(pairs(LAYERS, RANK, WIDTH), lr=1e-6, foreach=True),
        "LoRAPro": LoRAPro(groups(), lr=1e-6),
        "LoRARITE": LoRARITE(groups(), lr=1e-6),
    }
    samples = interleaved({name: o.step for name, o in optimizers.items()}, args.seconds, torch.device("cpu"))
    medians = {name: sample.median for name, sample in samples.items()}
    base = medians["AdamW(foreach=True)"]
    for name, seconds in medians.items():
        print(f"{name:20} {1e3 * seconds:7.2f} ms  {seconds / base:5.2f}")
    if args.json:
        shape = {"layers": LAYERS, "R": RANK, "K": WIDTH, "N": WIDTH}
        rows = {name: {"ms": 1e3 * s, "over_adamw": s / base} for name, s in medians.items()}
        args.json.write_text(json.dumps({"conditions": conditions(), "shape": shape, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
