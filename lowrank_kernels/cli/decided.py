"""A picture of what a method decided, by module and time: a rider's ``history`` as heat maps."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw_beside(file: Path, history: Mapping[str, Any], title: str) -> Path | None:
    """Draw a history into the .png beside a file that was just written, and return its path.

    None: matplotlib is not installed, nothing was decided, or the file is no regular one, or a .png itself.
    """
    path = file.with_suffix(".png")
    if not history["steps"] or path == file or not file.is_file() or importlib.util.find_spec("matplotlib") is None:
        return None
    draw_history(path, history, title)
    return path


def draw_history(path: Path, history: Mapping[str, Any], title: str) -> None:
    """Heat maps of the values in a history: a panel a kind of module, layers from top to bottom, time to the right.

    Args:
        history: {"what": what the values are, "steps": the first step of each column, "modules": their paths,
            "values": a row of numbers a step, one a module; None where a module has none}.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    steps = history["steps"]
    panels = by_kind(history["modules"])
    columns = [[float("nan") if v is None else float(v) for v in row] for row in history["values"]]
    found = [v for row in columns for v in row if v == v]
    lowest, highest = min(found, default=0.0), max(found, default=1.0)
    highest = highest if highest > lowest else lowest + 1
    whole, colours = all(v == int(v) for v in found), plt.get_cmap("viridis")
    if whole and highest - lowest <= 16:
        colours = colours.resampled(int(highest - lowest) + 1)
        lowest, highest = lowest - 0.5, highest + 0.5
    rows = max(len(members) for members in panels.values())
    figure, grid = plt.subplots(
        1,
        len(panels),
        figsize=(1.5 + max(1.6, min(4.0, 0.12 * len(steps))) * len(panels), 1.6 + max(1.2, 0.13 * rows)),
        squeeze=False,
        layout="constrained",
    )
    for axes, (kind, members) in zip(grid.flat, panels.items(), strict=True):
        cells = [[row[column] for row in columns] for _, column in members]
        image = axes.imshow(cells, aspect="auto", interpolation="nearest", cmap=colours, vmin=lowest, vmax=highest)
        axes.set_title(kind, fontsize=9)
        axes.set_yticks(*_some(range(len(members)), [layer for layer, _ in members], 16), fontsize=7)
        axes.set_xticks(*_some(range(len(steps)), steps, 4), fontsize=7)
        axes.set_xlabel("from step", fontsize=8)
    grid.flat[0].set_ylabel("layer", fontsize=8)
    bar = figure.colorbar(image, ax=list(grid.flat), ticks=MaxNLocator(8, integer=whole), aspect=40, pad=0.01)
    bar.ax.tick_params(labelsize=7)
    bar.set_label(history["what"], fontsize=8)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def by_kind(modules: Sequence[str]) -> dict[str, list[tuple[str, int]]]:
    """(layer, place among the modules) of the modules of each kind: those whose paths differ in one number alone."""
    kinds: dict[str, list[tuple[str, int]]] = {}
    for place, module in enumerate(modules):
        parts = module.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        layer = "" if number is None else parts[number]
        kind = module if number is None else ".".join([*parts[:number], "*", *parts[number + 1 :]])
        kinds.setdefault(kind, []).append((layer, place))
    short = [kind.rpartition(".")[2] for kind in kinds]
    names = {kind: last if short.count(last) == 1 else kind for kind, last in zip(kinds, short, strict=True)}
    return {names[kind]: members for kind, members in kinds.items()}


def _some(places: Sequence[int], labels: Sequence[Any], most: int) -> tuple[list[int], list[str]]:
    """At most so many ticks, evenly spread."""
    every = -(-len(places) // most)
    return list(places)[::every], [str(label) for label in labels][::every]
