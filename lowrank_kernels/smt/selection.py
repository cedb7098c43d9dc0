"""Phase two: which blocks, for which budget; and a picture of them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..finite import all_finite
from ..functional import block_index_error, check_block_size, raise_error

ATTENTION = r"(self_attn|self_attention|attention|attn)\..*"
"""A pattern for the matrices of attention, as most models call them."""
MLP = r"(mlp|feed_forward|ffn)\..*"
"""A pattern for the matrices of the MLP, as most models call them."""

Budget = int | float | Mapping[str, int | float]


@dataclass(frozen=True, eq=False)
class BlockSelection:
    """Chosen blocks by module: what :class:`~lowrank_kernels.SMTConfig` takes.

    Args:
        blocks: module path to (n, 2) integers, the (row block, column block) of each; modules without a block are
            left out.
        shapes: module path to (N, K).
        block_size: (bm, bn), or one number for both.

    Raises:
        ValueError, TypeError: blocks out of range or there twice, none at all, a block size that is no multiple of 16.
    """

    blocks: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, int]]
    block_size: tuple[int, int]

    def __post_init__(self) -> None:
        op = "BlockSelection"
        size = check_block_size(op, self.block_size)
        blocks = {
            name: torch.tensor(sorted(torch.as_tensor(index).tolist()), dtype=torch.int32)
            for name, index in self.blocks.items()
            if len(index)
        }
        if not blocks:
            raise ValueError(f"{op}: expected at least one block, got none")
        for name, index in blocks.items():
            if name not in self.shapes:
                raise ValueError(f"{op}: expected the shape of {name}, got those of {', '.join(self.shapes) or 'none'}")
            raise_error(block_index_error(f"{op}: {name}", index, size, self.shapes[name]))
        object.__setattr__(self, "block_size", size)
        object.__setattr__(self, "blocks", blocks)

    def __len__(self) -> int:
        """How many blocks."""
        return sum(len(index) for index in self.blocks.values())

    @property
    def elements(self) -> int:
        """How many numbers train: bm · bn a block."""
        return len(self) * self.block_size[0] * self.block_size[1]

    def heat_map(self) -> tuple[list[str], list[str], Tensor]:
        """(layers, matrices, share of the chosen blocks of each, NaN where a layer has no such matrix).

        A path's first number is its layer: "model.layers.3.mlp.up_proj" is "mlp.up_proj" of layer "3".
        """
        places = {name: _layer_and_matrix(name) for name in self.shapes}
        layers = list(dict.fromkeys(layer for layer, _ in places.values()))
        matrices = list(dict.fromkeys(matrix for _, matrix in places.values()))
        share = torch.full((len(layers), len(matrices)), math.nan)
        for name, (layer, matrix) in places.items():
            rows, columns = (-(-length // b) for length, b in zip(self.shapes[name], self.block_size, strict=True))
            chosen = len(self.blocks.get(name, ()))
            share[layers.index(layer), matrices.index(matrix)] = chosen / (rows * columns)
        return layers, matrices, share

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write the heat map as a picture (needs matplotlib)."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        layers, matrices, share = self.heat_map()
        figure, axes = plt.subplots(figsize=(2 + 0.9 * len(matrices), 1.6 + 0.22 * len(layers)))
        image = axes.imshow(100 * share.numpy(), aspect="auto", cmap="magma")
        axes.set_xticks(range(len(matrices)), matrices, rotation=30, ha="right")
        axes.set_yticks(range(len(layers)), layers)
        axes.set_ylabel("layer")
        bm, bn = self.block_size
        axes.set_title(f"{len(self)} blocks of {bm}×{bn}")
        figure.colorbar(image, label="chosen, % of the matrix")
        figure.tight_layout()
        figure.savefig(path, dpi=130)
        plt.close(figure)

    def __str__(self) -> str:
        bm, bn = self.block_size
        lines = [f"{len(self)} blocks of {bm}×{bn} ({self.elements:,} elements) in {len(self.blocks)} modules"]
        _, matrices, _ = self.heat_map()
        for matrix in matrices:
            found = [len(index) for name, index in self.blocks.items() if _layer_and_matrix(name)[1] == matrix]
            lines.append(f"  {matrix}: {sum(found)} in {len(found)} layers")
        return "\n".join(lines)

    __repr__ = __str__


def _layer_and_matrix(name: str) -> tuple[str, str]:
    found = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    return (found[1], found[2]) if found else ("", name)


def select_blocks(
    scores: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, int]],
    size: tuple[int, int],
    parameters: int,
    budget: Budget,
    of: str,
    per: str,
) -> BlockSelection:
    """The blocks with the highest scores; see :meth:`BlockScores.select`."""
    if of not in ("targets", "parameters"):
        raise ValueError(f"select: expected of to be 'targets' or 'parameters', got {of!r}")
    if per not in ("model", "matrix"):
        raise ValueError(f"select: expected per to be 'model' or 'matrix', got {per!r}")
    if per == "matrix" and of == "parameters":
        raise ValueError("select: expected of='targets' with per='matrix': each matrix gets its own share")
    broken = [name for name, s in scores.items() if not all_finite(s)]
    if broken:
        raise ValueError(f"select: expected finite scores, found NaN or Inf for {', '.join(broken[:5])}")
    chosen: dict[str, list[tuple[int, int]]] = {name: [] for name in scores}
    for names, wanted in _groups(list(scores), budget):
        for competing in [names] if per == "model" else [[name] for name in names]:
            ranked = _ranked(scores, competing)
            for name, i, j in ranked[: _count(wanted, len(ranked), of, parameters, size)]:
                chosen[name].append((i, j))
    if not any(chosen.values()):
        total = sum(s.numel() for s in scores.values())
        raise ValueError(
            f"select: budget={budget!r} selects nothing of the {total} blocks of {size[0]}×{size[1]}; "
            f"raise it, or make the blocks smaller"
        )
    return BlockSelection({n: torch.tensor(b).reshape(-1, 2) for n, b in chosen.items()}, dict(shapes), size)


def _groups(names: list[str], budget: Budget) -> list[tuple[list[str], int | float]]:
    """The modules that share each budget."""
    if not isinstance(budget, Mapping):
        return [(names, budget)]
    groups: dict[str, list[str]] = {pattern: [] for pattern in budget}
    for name in names:
        for pattern, members in groups.items():
            if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name):
                members.append(name)
                break
    empty = [pattern for pattern, members in groups.items() if not members]
    if empty:
        raise ValueError(f"select: budget has {empty[0]!r}, which matches no module; they are {', '.join(names[:10])}")
    return [(members, budget[pattern]) for pattern, members in groups.items()]


def _count(wanted: int | float, available: int, of: str, parameters: int, size: tuple[int, int]) -> int:
    if isinstance(wanted, bool) or not isinstance(wanted, (int, float)) or not wanted >= 0:
        raise ValueError(f"select: expected a budget of 0 or more, got {wanted!r}")
    if isinstance(wanted, float):
        # A hair is added so that a share that means whole blocks is not one short of them.
        whole = available if of == "targets" else parameters / (size[0] * size[1])
        wanted = int(wanted * whole + 1e-6) if math.isfinite(wanted) else available + 1
    if wanted > available:
        raise ValueError(f"select: expected a budget of at most the {available} blocks there are, got {wanted}")
    return wanted


def _ranked(scores: Mapping[str, Tensor], names: list[str]) -> list[tuple[str, int, int]]:
    """Every block of these modules, the highest score first; ties in the order of modules, rows and columns."""
    flat = torch.cat([scores[name].flatten() for name in names])
    places = [
        (name, i, j) for name in names for i in range(scores[name].shape[0]) for j in range(scores[name].shape[1])
    ]
    return [places[at] for at in flat.sort(descending=True, stable=True).indices.tolist()]
