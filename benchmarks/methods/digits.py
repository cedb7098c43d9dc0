"""scikit-learn's digits, an MLP of 64-32-10: pretrained on 0 to 4, tuned on 5 to 9 at rank 1, five seeds. A minute.

    python benchmarks/methods/digits.py [--sweep]

Adam at 1e-2, 100 epochs in batches of 64; chains of 10 links of 10 epochs, XGBLoRA's of 50 of 2, in one of the two
layers each. Test accuracy on 5 to 9. With --sweep, XGBLoRA alone, by the number of rounds and the share of layers.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
from typing import Any

import torch
from plots import RESULTS
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lowrank_kernels as lk
from lowrank_kernels.chain import cola, rac_lora, xgblora

CHAINS = {"cola": cola, "rac-lora": rac_lora, "xgblora": xgblora}
METHODS = ("full", "lora", "cola", "asymmetric", "rac-lora", "xgblora")
EPOCHS, LINKS, BATCH = 100, 10, 64


def data(low: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images and labels of the digits below 5, or of the others; every fourth is for testing."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    keep = (y < 5) if low else (y >= 5)
    x, y = x[keep], y[keep]
    test = torch.arange(len(y)) % 4 == 0
    return x[~test], y[~test], x[test], y[test]


def epoch(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
    for rows in torch.randperm(len(y), generator=generator).split(BATCH):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()


def pretrained(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, y, _, _ = data(low=True)
    for _ in range(20):
        epoch(model, optimizer, x, y, torch.Generator().manual_seed(seed))
    return model


def tune(method: str, base: nn.Module, seed: int, links: int | None = None, **settings: Any) -> float:
    """Test accuracy in per cent after tuning a copy; settings are the chain's."""
    model = copy.deepcopy(base)
    x, y, test_x, test_y = data(low=False)
    if method != "full":
        torch.manual_seed(seed)
        one_sided = method in ("asymmetric", "rac-lora")
        lk.adapt(
            model,
            lk.LoRAConfig(
                r=1,
                alpha=1,
                target_modules=("0", "2"),
                train="b" if one_sided else "both",
                init="orthonormal" if one_sided else "kaiming",
            ),
        )
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    if method in CHAINS:
        links = links or (5 * LINKS if method == "xgblora" else LINKS)
        steps = EPOCHS // links * -(-len(y) // BATCH)
        CHAINS[method](model, optimizer, steps, seed=seed, **settings)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        epoch(model, optimizer, x, y, generator)
    with torch.no_grad():
        return 100 * (model(test_x).argmax(1) == test_y).float().mean().item()


def sweep(seeds: int) -> None:
    """Print XGBLoRA's mean accuracy by share of layers and number of rounds."""
    bases = [pretrained(seed) for seed in range(seeds)]
    for share in (0.3, 1.0):
        for rounds in (100, 50, 20, 10):
            values = [tune("xgblora", base, seed, rounds, share=share) for seed, base in enumerate(bases)]
            print(f"share {share}, {rounds} rounds: {statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sweep", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.sweep:
        sweep(args.seeds)
        return
    rows: dict[str, list[float]] = {method: [] for method in METHODS}
    for seed in range(args.seeds):
        base = pretrained(seed)
        for method in METHODS:
            rows[method].append(tune(method, base, seed))
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / "digits.csv").open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["method", "seed", "test accuracy, %"])
        out.writerows([m, seed, f"{a:.2f}"] for m, values in rows.items() for seed, a in enumerate(values))
    for method, values in rows.items():
        spread = (
            f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"
            if len(values) > 1
            else f"{values[0]:.1f}"
        )
        print(f"{method:12} {spread}   ({', '.join(f'{a:.1f}' for a in values)})")

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4))
    axes.boxplot(list(rows.values()), tick_labels=list(rows))
    axes.set(ylabel="test accuracy, %", title=f"Digits 5 to 9 after pretraining on 0 to 4, R = 1, {args.seeds} seeds")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(RESULTS / "digits.png", dpi=120)


if __name__ == "__main__":
    main()
