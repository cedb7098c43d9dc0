"""Many adapters in one batch, after Punica's design (arXiv 2310.18547, section 7): a linear and its adapters.

    python benchmarks/many_adapters.py [--json FILE] [--plot FILE] [--dtypes float32 bfloat16] [--populations ...]

Populations of adapters over the rows: identical (one adapter), distinct (one each), uniform (sqrt(rows) of them), zipf
(Zipf with exponent 1.5), skewed (one row has an adapter of its own). Candidates, base product and correction each:
ours, from ids to result, the plan included; a gathered bmm, its weights already at one rank; a loop over the adapters;
and PEFT's mixed batch (`adapter_names`), where it is installed. Each takes turns with the base product alone,
`torch.nn.functional.linear`, and its figure is the ratio of the two medians; before each call a buffer of 16 MiB is
swept, more than the caches of a core, as a model's other layers would.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cost_over_frozen import conditions
from torch import nn

import lowrank_kernels as lk

POPULATIONS = ("identical", "distinct", "uniform", "zipf", "skewed")
CANDIDATES = ("ours", "bmm", "loop", "peft")


def population(name: str, rows: int) -> torch.Tensor:
    """(rows,) ids, shuffled; adapters are numbered from 0."""
    generator = torch.Generator().manual_seed(rows)
    if name == "identical":
        ids = torch.zeros(rows, dtype=torch.int64)
    elif name == "distinct":
        ids = torch.arange(rows)
    elif name == "uniform":
        ids = torch.arange(rows) % -(-rows // max(1, round(rows**0.5)))
    elif name == "zipf":
        ids = torch.multinomial(1.0 / torch.arange(1, rows + 1) ** 1.5, rows, replacement=True, generator=generator)
        ids = ids.unique(return_inverse=True)[1]
    else:
        ids = torch.ones(rows, dtype=torch.int64)
        ids[0] = 0
    return ids[torch.randperm(rows, generator=generator)] if rows > 1 else torch.zeros(1, dtype=torch.int64)


class OneLinear(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def peft_model(factors: list[tuple[torch.Tensor, torch.Tensor]], weight: torch.Tensor) -> Any:
    """A model of one linear with every adapter, or None without PEFT."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return None
    rank = factors[0][0].shape[0]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["linear"])
    model = get_peft_model(OneLinear(weight.shape[0]), config, "0")
    for i in range(1, len(factors)):
        model.add_adapter(str(i), config)
    layer = model.base_model.model.linear
    layer.base_layer.weight.data = weight
    for i, (lora_a, lora_b) in enumerate(factors):
        layer.lora_A[str(i)].weight.data, layer.lora_B[str(i)].weight.data = lora_a, lora_b
    return model.to(weight.dtype).eval()


def candidates(
    x: torch.Tensor,
    weight: torch.Tensor,
    factors: list[tuple[torch.Tensor, torch.Tensor]],
    ids: torch.Tensor,
    peft: Any,
) -> dict[str, Callable[[], torch.Tensor]]:
    functional = torch.nn.functional
    stack = lk.LoRAStack.from_factors((a, b, 1.0) for a, b in factors)
    all_a, all_b = torch.stack([a for a, _ in factors]), torch.stack([b for _, b in factors])
    groups = [(i, (ids == i).nonzero().squeeze(1)) for i in range(len(factors))]

    def bmm() -> torch.Tensor:
        down = torch.bmm(all_a[ids], x[:, :, None])
        return functional.linear(x, weight) + torch.bmm(all_b[ids], down)[:, :, 0]

    def loop() -> torch.Tensor:
        y = functional.linear(x, weight)
        for i, rows in groups:
            if len(rows):
                y[rows] += x[rows] @ factors[i][0].T @ factors[i][1].T
        return y

    calls: dict[str, Callable[[], torch.Tensor]] = {
        "base": lambda: functional.linear(x, weight),
        "ours": lambda: lk.multi_lora_linear(x, weight, stack, ids),
        "bmm": bmm,
        "loop": loop,
    }
    if peft is not None:
        names = [str(i) for i in ids.tolist()]
        calls["peft"] = lambda: peft(x, adapter_names=names)
    return calls


def medians(calls: list[Callable[[], torch.Tensor]], seconds: float, flush: torch.Tensor) -> list[float]:
    """Median seconds of each call, one of each a round."""
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 9:
        for call, found in zip(calls, times, strict=True):
            flush.add_(1.0)
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    return [statistics.median(values[2:]) for values in times]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time over the base product against the batch size: a panel a population, a row of panels a dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    names = list(dict.fromkeys(row["population"] for row in rows))
    figure, axes = pyplot.subplots(
        len(dtypes), len(names), figsize=(3.2 * len(names), 2.8 * len(dtypes)), sharex=True, sharey="row", squeeze=False
    )
    for line, dtype in enumerate(dtypes):
        for column, name in enumerate(names):
            axis = axes[line][column]
            mine = [row for row in rows if row["dtype"] == dtype and row["population"] == name]
            for candidate in CANDIDATES:
                if all(candidate in row["over_base"] for row in mine):
                    values = [row["over_base"][candidate] for row in mine]
                    axis.plot([row["rows"] for row in mine], values, marker="o", label=candidate)
            axis.axhline(1.0, color="black", linewidth=0.8)
            axis.set(xscale="log", yscale="log", title=f"{name}, {dtype}")
            axis.set_xticks([row["rows"] for row in mine], [str(row["rows"]) for row in mine])
        axes[line][0].set_ylabel("time / base product")
    for axis in axes[-1]:
        axis.set_xlabel("rows")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="results; those of other dtypes in it are kept")
    parser.add_argument("--plot", type=Path, help="draw what --json holds")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--populations", nargs="*", default=list(POPULATIONS))
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.3, help="a candidate")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    flush = torch.zeros(4 << 20)
    found = []
    print(f"{'dtype':9} {'population':10} {'rows':>4} {'base us':>8} " + " ".join(f"{c:>6}" for c in CANDIDATES))
    for dtype in (getattr(torch, name) for name in args.dtypes):
        torch.manual_seed(0)
        weight = torch.randn(args.size, args.size).to(dtype) / args.size**0.5
        factors = [
            (
                torch.randn(args.rank, args.size).to(dtype) / args.size**0.5,
                torch.randn(args.size, args.rank).to(dtype) / 4,
            )
            for _ in range(max(args.rows))
        ]
        peft = peft_model(factors, weight)
        for name in args.populations:
            for rows in args.rows:
                x, ids = torch.randn(rows, args.size).to(dtype), population(name, rows)
                calls = candidates(x, weight, factors, ids, peft)
                with torch.no_grad():
                    expected = calls["loop"]().float()
                    for call in (calls[c] for c in CANDIDATES if c in calls):
                        assert (call().float() - expected).norm() <= 0.02 * expected.norm()
                    over, alone = {}, []
                    for candidate in (c for c in CANDIDATES if c in calls):
                        base, own = medians([calls["base"], calls[candidate]], args.seconds, flush)
                        over[candidate] = own / base
                        alone.append(base)
                found.append(
                    {
                        "dtype": str(dtype).removeprefix("torch."),
                        "population": name,
                        "rows": rows,
                        "K": args.size,
                        "N": args.size,
                        "R": args.rank,
                        "base_us": statistics.median(alone) * 1e6,
                        "over_base": over,
                    }
                )
                cells = " ".join(f"{over[c]:6.2f}" if c in over else " " * 6 for c in CANDIDATES)
                print(f"{found[-1]['dtype']:9} {name:10} {rows:4} {found[-1]['base_us']:8.0f} {cells}", flush=True)
    if args.json:
        there = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
        new = {(row["dtype"], row["population"], row["rows"]) for row in found}
        found = [row for row in there if (row["dtype"], row["population"], row["rows"]) not in new] + found
        args.json.write_text(json.dumps({"conditions": conditions(), "rows": found}, indent=1) + "\n")
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
