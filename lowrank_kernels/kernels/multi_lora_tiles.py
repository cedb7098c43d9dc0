"""Tile choices of the kernels for many adapters: a pure function of shape, dtype and target."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .lora_tiles import DECODE_ROWS, MainTiles, main_tiles
from .roofline import multi_lora_forward, seconds
from .target import Target

MultiStrategy = Literal["one_kernel", "library"]

TILE_ROWS = 32
"""Rows of one adapter that a program takes, for every batch: one matrix instruction, and so one order of sums."""
DOWN_COLUMNS = 1024
"""A down-projection's sum is cut here, whether one program adds up the parts or several do."""


class AdapterRows(NamedTuple):
    """Whose the rows of a batch are, and what an adapter's correction is multiplied by, as the kernels read it.

    Attributes:
        table: (G, 3) int32: first row of the adapter's factors, rank, row of its magnitude or -1.
        scalings: (G,) float32.
        order: (M,), bounds: (G + 2,), tiles: (T, 3): of a :class:`~lowrank_kernels.ops.batch_plan.BatchPlan`.
        weights: (M,) float32, each row's share; None: 1.
        dropout_p: (G,) float64, None: no dropout.  dropout_seed: int64 scalar.
    """

    table: Tensor
    scalings: Tensor
    order: Tensor
    bounds: Tensor
    tiles: Tensor
    weights: Tensor | None = None
    dropout_p: Tensor | None = None
    dropout_seed: Tensor | None = None

    def kept(self) -> AdapterRows:
        """The same without dropout."""
        return self._replace(dropout_p=None, dropout_seed=None)


def tile_capacity(rows: int, adapters: int) -> int:
    """Tiles that a plan may need, whatever the ids are; as in csrc/batch_plan.h."""
    return -(-rows // TILE_ROWS) + min(rows, adapters + 1)


@dataclass(frozen=True)
class MultiLoRATiles:
    """BLOCK_R ranks, and BLOCK_K (reduction of the down-projection) or BLOCK_C (columns of the others) of the width.

    ``splits``: programs that share a down-projection's reduction.
    """

    BLOCK_K: int
    BLOCK_C: int
    BLOCK_R: int
    splits: int
    num_warps: int
    num_stages: int
    max_registers: int | None

    @property
    def options(self) -> dict[str, int]:
        """What the launch tells the compiler."""
        registers = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **registers}


def multi_lora_tiles(target: Target, tiles: int, width: int, max_rank: int, dtype: torch.dtype) -> MultiLoRATiles:
    """Tiles for a batch of ``tiles`` tiles and an operand of ``width`` columns.

    Only the number of splits depends on the batch, and the sums are cut at the same columns with any.
    """
    wide = dtype == torch.float32
    rank = 16 if wide or max_rank <= 16 else 32
    parts = -(-width // DOWN_COLUMNS)
    idle = tiles * -(-max_rank // rank) < target.num_sms
    return MultiLoRATiles(
        BLOCK_K=32 if wide else 64,
        BLOCK_C=64 if wide else 128,
        BLOCK_R=rank,
        splits=parts if idle else 1,
        num_warps=4,
        num_stages=3,
        # Left to itself the compiler spills a few words for an occupancy that these grids do not need.
        max_registers=255 if target.arch.startswith("sm_") else None,
    )


def multi_lora_main_tiles(target: Target, M: int, dtype: torch.dtype, aligned: bool = True) -> MainTiles:
    """Tiles of the base product that adds the correction to its accumulator; BLOCK_K is the same for any M.

    ``aligned``: rows of x and of the weight start at multiples of 16 bytes, with unit column stride.
    """
    # Pointers and values of BLOCK_R ranks of the factor are at hand beside the sums: few columns. One program a tile.
    main = main_tiles(target, M, 16, dtype, aligned, widest=64)
    return replace(main, BLOCK_R=4 if M <= DECODE_ROWS else 2, num_programs=None, flatten=False)


def multi_lora_seconds(
    target: Target, M: int, K: int, N: int, max_rank: int, adapters: int, dtype: torch.dtype
) -> dict[MultiStrategy, float]:
    """What the roofline (``roofline.multi_lora_forward``) gives each strategy."""
    strategies: tuple[MultiStrategy, ...] = ("one_kernel", "library")
    sizes = M, K, N, max_rank, adapters, dtype.itemsize
    return {s: seconds(target, multi_lora_forward(*sizes, strategy=s)) for s in strategies}


def choose_multi_strategy(
    target: Target,
    M: int,
    K: int,
    N: int,
    max_rank: int,
    adapters: int,
    dtype: torch.dtype,
    *,
    aligned: bool = True,
    settled: Any = None,
) -> MultiStrategy:
    """``settled``, or the strategy with the least predicted time; operands with unaligned rows go to the library."""
    if not aligned:  # every row of a tile reads its own row of a factor: one by one, the pointers would not fit
        return "library"
    if settled == "one_kernel" or settled == "library":
        return settled  # type: ignore[no-any-return]
    seconds = multi_lora_seconds(target, M, K, N, max_rank, adapters, dtype)
    return min(seconds, key=lambda s: seconds[s])
