"""SVFT's layers beside LoRA's: forward and backward in turns, what stays in memory, and what is saved for backward.

    python benchmarks/methods/svft.py [--threads N] [--rounds N] [--tokens N]

Linears of SmolLM2-135M's shapes in float32, whose input requires grad. "paper" computes ((x V)(Σ + M)ᵀ) Uᵀ in PyTorch,
with a dense M, from U, V and Σ alone. Figures are written to results/methods/svft.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from plots import RESULTS
from torch import Tensor, nn

import lowrank_kernels as lk

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cost_over_frozen import conditions

SHAPES = ((576, 576), (576, 1536), (1536, 576))  # K, N


class Paper(nn.Module):
    """The three products of the paper, with a dense Σ + M."""

    def __init__(self, layer: lk.nn.SVFTLinear) -> None:
        super().__init__()
        for name, t in {"u": layer.u, "vh": layer.vh, "sigma": torch.diag(layer.sigma)}.items():
            self.register_buffer(name, t)
        self.register_buffer("index", layer.position.long().T)
        self.values = nn.Parameter(layer.values.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        m = self.sigma.index_put((self.index[0], self.index[1]), self.values, accumulate=True)
        return ((x @ self.vh.T) @ m.T) @ self.u.T


def layers(k: int, n: int) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    base = nn.Linear(k, n, bias=False).requires_grad_(False)
    make = lk.nn.SVFTLinear.from_linear
    banded = make(base, "banded", band=4)
    return {
        "frozen": base,
        "LoRA, rank 8": lk.nn.LoRALinear.from_linear(base, r=8),
        "plain": make(base, "plain"),
        "banded, 4": banded,
        "random": make(base, "random", k=len(banded.values)),
        "top": make(base, "top", k=len(banded.values)),
        "paper, banded": Paper(banded),
    }


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Kept for backward, beside parameters and buffers."""
    found: dict[int, int] = {}
    own = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
        layer(x)
    return sum(size for place, size in found.items() if place not in own)


def seconds(run: Callable[..., Any], *operands: Any) -> float:
    start = time.perf_counter()
    run(*operands)
    return time.perf_counter() - start


def forward_backward(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    layer(x).backward(dy)


def svd(weight: Tensor) -> None:
    torch.linalg.svd(weight.double(), full_matrices=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {"conditions": conditions(), "tokens": args.tokens, "shapes": {}}
    for k, n in SHAPES:
        x, dy = torch.randn(args.tokens, k, requires_grad=True), torch.randn(args.tokens, n)
        made = layers(k, n)
        times: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(2 + args.rounds):
            for name, layer in made.items():
                times[name].append(seconds(forward_backward, layer, x, dy))
        floor = times["frozen"][2:]
        svd_seconds = seconds(svd, made["frozen"].weight.detach())
        rows: dict[str, Any] = {}
        for name, layer in made.items():
            ratios = [t / f for t, f in zip(times[name][2:], floor, strict=True)]
            frozen = {t.data_ptr(): t.nbytes for t in (*layer.parameters(), *layer.buffers()) if not t.requires_grad}
            rows[name] = {
                "over frozen": round(statistics.median(ratios), 2),
                "trained": sum(p.numel() for p in layer.parameters() if p.requires_grad),
                "frozen, MiB": round(sum(frozen.values()) / 2**20, 2),
                "saved, MiB": round(saved_bytes(layer, x) / 2**20, 2),
            }
            print(f"{k} -> {n} {name}: {rows[name]}")
        milliseconds = round(1e3 * statistics.median(floor), 2)
        own = {"svd, s": round(svd_seconds, 2), "frozen, ms": milliseconds, "layers": rows}
        result["shapes"][f"{k} -> {n}"] = own
    (RESULTS / "svft.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
