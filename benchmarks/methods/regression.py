"""Chains on linear and logistic regression: full fine-tuning, LoRA, one-sided LoRA, COLA, RAC-LoRA. A minute.

    python benchmarks/methods/regression.py

W (20, 40) starts from a solution of one problem and is tuned on another whose best W differs by full rank; R = 2, SGD
with momentum 0.9, 1000 steps, links of 20. Rates from a grid, the same for all, on seed 0; the rest on seeds 0 to 4.
"""

from __future__ import annotations

import statistics

import torch
from plots import RESULTS, lines_with_spread
from quadratics import write
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.chain import cola, rac_lora

OUT, IN, R, STEPS, LINK = 20, 40, 2, 1000, 20
GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
METHODS = ("full", "lora", "asymmetric lora", "cola", "rac-lora")


def run(problem: str, method: str, rate: float, seed: int) -> list[float]:
    """Training loss at every step."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, IN, generator=generator)
    truth = torch.randn(OUT, IN, generator=generator) / IN**0.5
    scores = x @ truth.T
    y = scores if problem == "linear" else scores.argmax(1)
    model = nn.Sequential(nn.Linear(IN, OUT, bias=False))
    model[0].weight.data = torch.randn(OUT, IN, generator=generator) / IN**0.5
    if method != "full":
        torch.manual_seed(seed)
        one_sided = method in ("asymmetric lora", "rac-lora")
        config = lk.LoRAConfig(r=R, alpha=R, train="b" if one_sided else "both", init="orthonormal")
        lk.adapt(model, config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate, momentum=0.9)
    if method in ("cola", "rac-lora"):
        chain = cola if method == "cola" else rac_lora
        chain(model, optimizer, LINK, init="orthonormal", seed=seed)
    loss_of = nn.functional.mse_loss if problem == "linear" else nn.functional.cross_entropy
    losses: list[float] = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model(x), y) * (OUT if problem == "linear" else 1)
        losses.append(loss.item() if loss.isfinite() else 1e6)
        if losses[-1] > 1e5:
            return losses + [1e6] * (STEPS - len(losses))
        loss.backward()
        optimizer.step()
    return losses


def main() -> None:
    torch.set_num_threads(1)
    for problem in ("linear", "logistic"):
        curves = {}
        for method in METHODS:
            best = min(GRID, key=lambda rate, m=method: run(problem, m, rate, 0)[-1])  # type: ignore[misc]
            curves[f"{method}, lr {best:g}"] = [run(problem, method, best, seed) for seed in range(5)]
        write(f"regression_{problem}", curves)
        for name, seeds in curves.items():
            finals = [losses[-1] for losses in seeds]
            print(f"{problem:9} {name:26} {statistics.fmean(finals):.3e} ± {statistics.stdev(finals):.1e}", flush=True)
        lines_with_spread(
            curves,
            RESULTS / f"regression_{problem}.png",
            "step",
            "training loss",
            f"{problem.capitalize()} regression, W (20, 40), R = {R}, links of {LINK} steps, 5 seeds",
            log=True,
        )


if __name__ == "__main__":
    main()
