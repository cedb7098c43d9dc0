"""Tile choices of the block-sparse kernels: a pure function of shape, dtype and target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from .lora_tiles import _cdiv, _power_of_two
from .target import Target


@dataclass(frozen=True)
class BlockGradTiles:
    """A program takes (BLOCK_R, BLOCK_C) of one block of W, BLOCK_M tokens at a time, over one of ``splits`` parts."""

    BLOCK_M: int
    BLOCK_R: int
    BLOCK_C: int
    splits: int
    num_warps: int
    num_stages: int


def block_grad_tiles(
    target: Target,
    M: int,
    n_blocks: int,
    bm: int,
    bn: int,
    dtype: torch.dtype,
    *,
    aligned: bool = True,
    settled: Mapping[str, Any] | None = None,
) -> BlockGradTiles:
    """Tiles for the gradients of n_blocks blocks of (bm, bn) from M tokens.

    Tokens are split where the blocks alone do not give every processor two programs, and never below 256 a part:
    the partial sums, written and read in float32, then stay below the operands in bytes for tiles of 32 and more.

    Args:
        aligned: rows of x and dY start at multiples of 16 bytes, with unit column stride.
        settled: by `lrk tune`, {"BLOCK_M": 32, "num_warps": 8}; measured with aligned rows, and taken for those alone.
    """
    wide = dtype == torch.float32
    # No matrix unit at full float32 precision, and loads one by one without alignment: smaller tiles keep in registers.
    widest = 32 if wide else 64 if not aligned else 128
    block_r, block_c = (min(widest, _power_of_two(size)) for size in (bm, bn))
    programs = n_blocks * _cdiv(bm, block_r) * _cdiv(bn, block_c)
    splits = max(1, min(_cdiv(M, 256), 2 * target.num_sms // max(1, programs)))
    tiles = BlockGradTiles(
        16 if wide else 32 if not aligned else 64,
        block_r,
        block_c,
        splits,
        num_warps=8 if block_r * block_c >= 128 * 128 else 4,
        num_stages=3,
    )
    changes = {f: value for f, value in (settled or {}).items() if f in BlockGradTiles.__dataclass_fields__}
    return replace(tiles, **changes) if aligned else tiles
