"""RAC-LoRA on quadratics, against its theory: seconds.

    python benchmarks/methods/quadratics.py

1. f(W) = the sum of d_i (W_i - W*_i)² / 2 over the nine elements of a 3×3 W, d = (10, 1, …, 1), R = 1, SGD at rate 1/L:
   RAC-LoRA converges, LoRA and one-sided LoRA stall.
2. f(W) = ‖W - W*‖² / 2 with n = 12 columns: after T links the error is (1 - R/n)ᵀ of the first.
"""

from __future__ import annotations

import csv

import torch
from plots import RESULTS, lines_with_spread
from torch import Tensor, nn

import lowrank_kernels as lk
from lowrank_kernels.chain import cola, rac_lora

METHODS = {"rac-lora": "b", "cola": "both", "lora": "both", "asymmetric lora": "b"}


def model_of(weight: Tensor, train: str, r: int, seed: int, init: str = "orthonormal") -> nn.Module:
    model = nn.Sequential(nn.Linear(*weight.shape[::-1], bias=False, dtype=weight.dtype))
    model[0].weight.data.copy_(weight)
    torch.manual_seed(seed)
    lk.adapt(model, lk.LoRAConfig(r=r, alpha=r, train=train, init=init))
    return model


def descend(method: str, loss, weight: Tensor, r: int, rate: float, steps: int, seed: int) -> list[float]:  # type: ignore[no-untyped-def]
    """f before each step and after the last; a chain merges after every step."""
    model = model_of(weight, METHODS[method], r, seed, "gaussian" if METHODS[method] == "both" else "orthonormal")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    if method == "rac-lora":
        rac_lora(model, optimizer, 1, seed=seed)
    elif method == "cola":
        cola(model, optimizer, 1, seed=seed)
    layer, values = model[0], []  # type: ignore[index]
    for step in range(steps + 1):
        optimizer.zero_grad()
        value = loss(layer.weight + layer.scaling * layer.lora_B.weight @ layer.lora_A.weight)
        values.append(min(value.item(), 1e6) if value.isfinite() else 1e6)
        if step < steps and value.isfinite():
            value.backward()
            optimizer.step()
    return values


def write(name: str, curves: dict[str, list[list[float]]]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["method", "seed", "step", "value"])
        for method, seeds in curves.items():
            for seed, values in enumerate(seeds):
                every = max(1, len(values) // 100)
                out.writerows([method, seed, i, f"{v:.6e}"] for i, v in enumerate(values) if i % every == 0)


def three_by_three() -> None:
    scale = torch.ones(9, dtype=torch.float64)
    scale[0] = 10
    target = torch.arange(1.0, 10.0, dtype=torch.float64).reshape(3, 3) / 5
    target[0, 0] += 1

    def loss(w: Tensor) -> Tensor:
        return 0.5 * (scale * (w - target).flatten().square()).sum()

    start = torch.zeros(3, 3, dtype=torch.float64)
    curves = {
        f"{m}": [descend(m, loss, start, 1, 0.1 if m != "cola" else 0.02, 3000, s) for s in range(3)] for m in METHODS
    }
    write("quadratic_3x3", curves)
    for method, seeds in curves.items():
        print(f"3×3 quadratic, 3000 steps: {method:16} " + ", ".join(f"{values[-1]:.1e}" for values in seeds))
    floor = {m: [[max(v, 1e-30) for v in values] for values in seeds] for m, seeds in curves.items()}
    lines_with_spread(
        floor,
        RESULTS / "quadratic_3x3.png",
        "step (and link)",
        "f - f*",
        "3×3 quadratic, R = 1, SGD at 1/L (COLA at 0.2/L), 3 seeds",
        log=True,
        first=0,
    )


def isotropic() -> None:
    n, r, links = 12, 3, 20
    target = torch.randn(2000, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = torch.zeros_like(target)

    def loss(w: Tensor) -> Tensor:
        return 0.5 * (w - target).square().sum()

    runs = [descend("rac-lora", loss, start, r, 1.0, links, seed) for seed in range(40)]
    runs = [[value / values[0] for value in values] for values in runs]
    theory = [(1 - r / n) ** t for t in range(links + 1)]
    curves = {"rac-lora, 40 seeds": runs, "(1 - R/n)ᵀ": [theory]}
    write("quadratic_isotropic", curves)
    mean = sum(values[-1] for values in runs) / len(runs)
    print(f"isotropic quadratic, n = {n}, R = {r}: {mean:.3e} after {links} links, theory {theory[-1]:.3e}")
    lines_with_spread(
        curves,
        RESULTS / "quadratic_isotropic.png",
        "link",
        "error over the first",
        f"Isotropic quadratic, n = {n}, R = {r}",
        log=True,
        first=0,
    )


if __name__ == "__main__":
    three_by_three()
    isotropic()
