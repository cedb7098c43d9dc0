"""The rows of `lrk bench` as bars, against the roof, and over the tokens, ranks or adapters that they sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .cases import OPS
from .run import PROVIDERS, Row

_COLOURS = {"floor": "0.6", "plain": "tab:blue", "peft": "tab:orange", "compile": "tab:purple", "ours": "tab:green"}
_AXES = {"M": "tokens", "R": "rank", "G": "adapters in the batch"}


def draw_all(path: Path, rows: Sequence[Row], where: Mapping[str, str]) -> list[Path]:
    """Draw the pictures that there are rows enough for (bars, "-roof", "-sweeps") and return their files."""
    pictures = {"": draw, "-roof": draw_roof, "-sweeps": draw_sweeps}
    files = {path.with_stem(path.stem + name): picture for name, picture in pictures.items()}
    return [file for file, picture in files.items() if picture(file, rows, where)]


def _save(figure: Any, path: Path, where: Mapping[str, str]) -> bool:
    figure.suptitle(f"{where['device']}, torch {where['torch']}, commit {where['commit']}, {where['date']}", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return True


def _sizes(shape: str) -> dict[str, int]:
    return {name: int(value) for name, _, value in (pair.partition("=") for pair in shape.split())}


def draw_roof(path: Path, rows: Sequence[Row], where: Mapping[str, str]) -> bool:
    """FLOPs a second against FLOPs a byte, of every inference row, beside the measured roofs; a panel a dtype."""
    some = [r for r in rows if r.over_roof and r.median_us and r.provider != "floor"]
    if not some:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dtypes = list(dict.fromkeys(r.dtype for r in some))
    figure, grid = plt.subplots(1, len(dtypes), figsize=(6 * len(dtypes), 4.4), squeeze=False)
    for axes, dtype in zip(grid.flat, dtypes, strict=True):
        roofs: list[tuple[float, float, float]] = []  # (FLOPs a byte, bytes a second, FLOPs a second) at the roof
        for provider in [name for name in PROVIDERS if any(r.provider == name for r in some)]:
            points = []
            for r in some:
                if (r.dtype, r.provider) == (dtype, provider) and r.median_us and r.over_roof:
                    shape, bench = _sizes(r.shape), OPS[r.op]
                    flops = bench.flops(shape)
                    nbytes = bench.nbytes(shape, 4 if dtype == "float32" else 2)
                    points.append((flops / nbytes, flops / r.median_us / 1e3))
                    least = r.median_us / r.over_roof * 1e3
                    roofs.append((flops / nbytes, nbytes / least, flops / least))
            axes.plot(*zip(*points, strict=True), "o", markersize=4, label=provider, color=_COLOURS[provider])
        copied, product = max(r[1] for r in roofs), max(r[2] for r in roofs)
        edges = min(r[0] for r in roofs), product / copied, max(product / copied, *(r[0] for r in roofs))
        roof = [min(x * copied, product) for x in edges]
        axes.plot(edges, roof, color="black", linewidth=0.9, label="measured roof")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("FLOPs a byte of operands and result")
        axes.set_ylabel("GFLOP/s (more is better)")
        axes.set_title(f"every op, {dtype}, inference", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return _save(figure, path, where)


def _sweeps(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """(varied size, what all rows of a panel share) -> rows of shapes that differ in that size alone, three or more."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        sizes = _sizes(row.shape)
        for name in _AXES.keys() & sizes.keys():
            rest = " ".join(f"{k}={v}" for k, v in sizes.items() if k != name)
            found.setdefault((name, f"{row.op} {rest}, {row.dtype}, {row.mode}"), []).append(row)
    return {key: some for key, some in sorted(found.items()) if len({r.shape for r in some}) > 2}


def draw_sweeps(path: Path, rows: Sequence[Row], where: Mapping[str, str]) -> bool:
    """Cost over the floor against tokens or rank, and time against adapters, where three or more shapes differ so."""
    panels = _sweeps([r for r in rows if r.over_floor is not None and r.median_us])
    if not panels:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(lines, columns, figsize=(6.5 * columns, 3.8 * lines), squeeze=False)
    for axes, ((name, title), some) in zip(grid.flat, panels.items(), strict=False):
        for provider in [p for p in PROVIDERS if any(r.provider == p for r in some)]:
            mine = sorted((_sizes(r.shape)[name], r) for r in some if r.provider == provider)
            ratios = [(r.over_floor or 0.0) if name != "G" else (r.median_us or 0.0) for _, r in mine]
            spreads = [ratio * (r.spread or 0.0) for ratio, (_, r) in zip(ratios, mine, strict=True)]
            axes.errorbar(
                [size for size, _ in mine],
                ratios,
                spreads,
                fmt="o-",
                markersize=3,
                linewidth=1,
                capsize=2,
                label=provider,
                color=_COLOURS[provider],
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel(_AXES[name])
        axes.set_ylabel("µs (less is better)" if name == "G" else "time over the floor (less is better)")
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    return _save(figure, path, where)


def draw(path: Path, rows: Sequence[Row], where: Mapping[str, str]) -> bool:
    """Bars of the median over the floor's (1: no cost), with the spread; a panel an op and mode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    panels = list(dict.fromkeys((r.op, r.mode) for r in rows if r.over_floor is not None))
    if not panels:
        return False
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(lines, columns, figsize=(7.5 * columns, 3.6 * lines), squeeze=False)
    for axes, (op, mode) in zip(grid.flat, panels, strict=False):
        some = [r for r in rows if (r.op, r.mode) == (op, mode) and r.over_floor is not None]
        groups = list(dict.fromkeys((r.shape, r.dtype) for r in some))
        names = [n for n in PROVIDERS if any(r.provider == n for r in some)]
        for offset, name in enumerate(names):
            mine = {(r.shape, r.dtype): r for r in some if r.provider == name}
            places = [i + (offset + 0.5) / len(names) * 0.8 - 0.4 for i, g in enumerate(groups) if g in mine]
            values = [(mine[g].over_floor or 0.0, mine[g].spread or 0.0) for g in groups if g in mine]
            axes.barh(
                places,
                [ratio for ratio, _ in values],
                0.8 / len(names),
                label=name,
                color=_COLOURS[name],
                xerr=[ratio * spread for ratio, spread in values],
                error_kw={"linewidth": 0.8},
            )
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
    return _save(figure, path, where)
