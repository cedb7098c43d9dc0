"""Gradients of 1% of the blocks of a weight over the dense weight gradient: ours, and gather with bmm, interleaved.

    python benchmarks/smt_gradient.py [--json FILE]

x and dY are given. Each figure is a ratio of medians to `grad_y.T @ x`; the candidates take turns within each round.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from cost_over_frozen import conditions

import lowrank_kernels as lk
from lowrank_kernels.bench import interleaved


def measure(dtype: torch.dtype, tokens: int, size: int, block: int, share: float, seconds: float) -> dict:
    torch.manual_seed(0)
    x, grad_y = (torch.randn(tokens, size).to(dtype) for _ in range(2))
    grid = size // block
    chosen = torch.randperm(grid * grid)[: max(1, round(share * grid * grid))].sort().values
    rows, columns = chosen // grid, chosen % grid
    index = torch.stack((rows, columns), 1).to(torch.int32)

    def gathered() -> torch.Tensor:
        left = grad_y.view(tokens, grid, block)[:, rows].permute(1, 2, 0)
        return torch.bmm(left, x.view(tokens, grid, block)[:, columns].permute(1, 0, 2))

    samples = interleaved(
        {
            "dense": lambda: grad_y.T @ x,
            "ours": lambda: lk.block_sparse_weight_grad(x, grad_y, index, block),
            "gather and bmm": gathered,
        },
        seconds,
        torch.device("cpu"),
    )
    medians = {name: sample.median for name, sample in samples.items()}
    dense = medians.pop("dense")
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "K": size,
        "N": size,
        "block": block,
        "blocks": len(index),
        "dense_ms": 1e3 * dense,
        "over_dense": {name: t / dense for name, t in medians.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=6.0, help="a row")
    args = parser.parse_args()
    torch.set_num_threads(2)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for block, share in ((64, 0.01), (256, 0.01), (64, 0.1)):
            row = measure(dtype, 1024, 4096, block, share, args.seconds)
            found.append(row)
            over = ", ".join(f"{name} {100 * ratio:.2f}%" for name, ratio in row["over_dense"].items())
            print(
                f"{row['dtype']} {row['blocks']} blocks of {block}: dense {row['dense_ms']:.1f} ms; {over}", flush=True
            )
    if args.json:
        args.json.write_text(json.dumps({"conditions": conditions(), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
