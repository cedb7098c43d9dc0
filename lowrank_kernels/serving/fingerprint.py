"""Whether a weight is bit for bit what it was: told by what is in it, not by counters that some writes leave alone."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_WORDS_AT_ONCE = 1 << 24


@cache
def _multipliers(words: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(words)
    return (torch.randint(2**62, (words,), generator=generator) * 2 + 1).to(device)


def fingerprint(weight: Tensor) -> Tensor:
    """(N,) int64: of each row of ``weight`` (N, K), Σ_j c_j w_j mod 2⁶⁴ over its 8-byte words w_j, random odd c_j.

    One word that changes always changes it; several do but for one chance in about 2⁶³. Reads the weight once.
    """
    rows = weight.detach()
    size = rows.shape[1] * rows.element_size()
    missing = -size % 8 // rows.element_size()
    if missing or not rows.is_contiguous() or rows.storage_offset() * rows.element_size() % 8:
        rows = (
            torch.nn.functional.pad(rows, (0, missing))
            if missing
            else rows.clone(memory_format=torch.contiguous_format)
        )
    words = rows.view(torch.int64)
    multipliers = _multipliers(words.shape[1], words.device)
    if words.device.type == "cpu":
        return words @ multipliers
    return _in_parts(words, multipliers, _WORDS_AT_ONCE)


def _in_parts(words: Tensor, multipliers: Tensor, at_once: int) -> Tensor:
    """The same where there is no product of integers, in little memory."""
    parts = words.split(max(1, at_once // max(1, words.shape[1])))
    return torch.cat([(part * multipliers).sum(1) for part in parts])
