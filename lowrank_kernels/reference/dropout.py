"""Counter-based dropout: the mask is a function of (seed, row, column), so it is never stored."""

from __future__ import annotations

import torch
from torch import Tensor

# Philox-4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
_LOW32 = 0xFFFFFFFF


def keep_threshold(p: float) -> int:
    """The smallest 32-bit word that is kept: floor(p * 2**32)."""
    return int(p * 2.0**32)


def _multiply_high_low(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    # int64 wraps modulo 2**64, so the product of two 32-bit words keeps all of its bits.
    product = a * multiplier
    return (product >> 32) & _LOW32, product & _LOW32


def philox_words_ref(seed: Tensor, rows: int, columns: int, first_row: int = 0) -> Tensor:
    """The 32-bit words of Philox-4x32-10 for a (rows, columns) tile, as int64.

    key = (seed mod 2**32, seed >> 32), counter = (column // 4, row, 0, 0), word = output[column % 4].

    Args:
        seed: int64 scalar tensor.
        rows, columns: size of the tile, whose first row is ``first_row``; rows stay below 2**32.

    Returns:
        (rows, columns) int64 in [0, 2**32), on the seed's device.
    """
    device = seed.device
    c0 = torch.arange((columns + 3) // 4, device=device).expand(rows, -1)
    c1 = torch.arange(first_row, first_row + rows, device=device)[:, None].expand_as(c0)
    c2 = torch.zeros_like(c0)
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & _LOW32, (seed >> 32) & _LOW32
    for _ in range(PHILOX_ROUNDS):
        high0, low0 = _multiply_high_low(c0, PHILOX_MULTIPLIERS[0])
        high1, low1 = _multiply_high_low(c2, PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + PHILOX_WEYL[0]) & _LOW32, (k1 + PHILOX_WEYL[1]) & _LOW32
    return torch.stack((c0, c1, c2, c3), dim=-1).reshape(rows, 4 * c0.shape[1])[:, :columns]


def dropout_keep_mask_ref(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """Which elements of a (rows, columns) input survive dropout with probability ``p`` of being zeroed.

    keep[i, j] = word(seed, i, j) >= floor(p * 2**32), with the words of :func:`philox_words_ref`.

    Returns:
        (rows, columns) bool on the seed's device.
    """
    return philox_words_ref(seed, rows, columns) >= keep_threshold(p)
