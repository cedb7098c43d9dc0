"""The rows of `lrk bench` as bars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from .run import PROVIDERS, Row


def draw(path: Path, rows: Sequence[Row], where: Mapping[str, str]) -> None:
    """Bars of the median over the floor's (1: no cost), with the spread; a panel an op and mode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    panels = list(dict.fromkeys((r.op, r.mode) for r in rows if r.over_floor is not None))
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(lines, columns, figsize=(7.5 * columns, 3.6 * lines), squeeze=False)
    colours = {"floor": "0.6", "plain": "tab:blue", "peft": "tab:orange", "compile": "tab:purple", "ours": "tab:green"}
    for axes, (op, mode) in zip(grid.flat, panels, strict=False):
        some = [r for r in rows if (r.op, r.mode) == (op, mode) and r.over_floor is not None]
        groups = list(dict.fromkeys((r.shape, r.dtype) for r in some))
        names = [n for n in PROVIDERS if any(r.provider == n for r in some)]
        for offset, name in enumerate(names):
            mine = {(r.shape, r.dtype): r for r in some if r.provider == name}
            places = [i + (offset + 0.5) / len(names) * 0.8 - 0.4 for i, g in enumerate(groups) if g in mine]
            values = [(mine[g].over_floor or 0.0, mine[g].spread or 0.0) for g in groups if g in mine]
            axes.barh(
                places, [ratio for ratio, _ in values], 0.8 / len(names), label=name, color=colours[name],
                xerr=[ratio * spread for ratio, spread in values], error_kw={"linewidth": 0.8},
            )  # fmt: skip
        axes.set_yticks(range(len(groups)), [f"{shape}\n{dtype}" for shape, dtype in groups], fontsize=7)
        axes.invert_yaxis()
        ratios = [r.over_floor for r in some if r.over_floor is not None]
        if max(ratios) > 4 * min(ratios):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_minor_locator(NullLocator())
        axes.axvline(1.0, color="black", linewidth=0.8)
        floor = "the frozen linear" if any(r.provider == "floor" for r in some) else "plain PyTorch"
        if op == "block_sparse_weight_grad":
            floor = "the dense gradient"
        axes.set_xlabel(f"time over {floor} (less is better)")
        axes.set_title(op if [o for o, _ in panels].count(op) == 1 else f"{op}, {mode}", fontsize=10)
        axes.legend(fontsize=7, loc="lower left", bbox_to_anchor=(1.0, 0.0))
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(f"{where['device']}, torch {where['torch']}, commit {where['commit']}, {where['date']}", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
