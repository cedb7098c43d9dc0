"""Where the experiments put their results, and the one kind of plot that they make."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results" / "methods"


def lines_with_spread(
    curves: Mapping[str, Sequence[Sequence[float]]],
    path: Path,
    x: str,
    y: str,
    title: str,
    *,
    log: bool = False,
    first: int = 1,
) -> None:
    """A line a method, the mean of its seeds, and a band from its lowest seed to its highest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.6))
    for name, seeds in curves.items():
        steps = range(first, len(seeds[0]) + first)
        columns = list(zip(*seeds, strict=True))
        axes.plot(steps, [statistics.fmean(c) for c in columns], label=name, linewidth=1.6)
        if len(seeds) > 1:
            axes.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], alpha=0.15)
    if log:
        axes.set_yscale("log")
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
