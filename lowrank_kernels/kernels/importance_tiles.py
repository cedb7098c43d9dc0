"""Tiles of the importance kernel: a pure function of the target and the weight's shape."""

from __future__ import annotations

from dataclasses import dataclass

from .target import Target

BLOCK_N, BLOCK_K = 32, 64


@dataclass(frozen=True)
class ImportanceTiles:
    """A program sums BLOCK_N rows over one of ``splits`` parts of their columns, BLOCK_K at a time."""

    splits: int
    arch: str


def importance_tiles(target: Target, N: int, K: int) -> ImportanceTiles:
    """Tiles for the sums over N rows of K elements.

    Columns are split where the rows alone do not give every processor two programs, and never below 4 tiles a part.
    """
    programs = -(-N // BLOCK_N)
    return ImportanceTiles(max(1, min(K // (4 * BLOCK_K), 2 * target.num_sms // programs)), target.arch)
