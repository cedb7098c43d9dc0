"""Whether a weight is bit for bit what it was: told by what is in it, not by counters that some writes leave alone."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..weights import FrozenWeight, Weight

_WORDS_AT_ONCE = 1 << 24
_WORDS_IN_CACHE = 1 << 17


@cache
def _multipliers(words: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(words)
    return (torch.randint(2**62, (words,), generator=generator) * 2 + 1).to(device)


def fingerprint(weight: Weight) -> Tensor:
    """(N,) int64: of each row of ``weight`` (N, K), Σ_j c_j f(w_j) mod 2⁶⁴ over its 8-byte words w_j, random odd c_j.

    f(w) is w with its upper half xored into the lower one: products carry bits up alone, so that without f two flipped
    signs would cancel. One word that changes always changes the sum; several do but for one chance in 2³³ or less.
    """
    if isinstance(weight, FrozenWeight):
        return torch.cat([fingerprint(part.reshape(1, -1)) for part in weight.parts()])
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
    on_cpu = words.device.type == "cpu"
    return _in_parts(words, multipliers, _WORDS_IN_CACHE if on_cpu else _WORDS_AT_ONCE, product=on_cpu)


def _in_parts(words: Tensor, multipliers: Tensor, at_once: int, *, product: bool) -> Tensor:
    """The sums in little memory; ``product`` where there is one of integers."""
    parts = words.split(max(1, at_once // max(1, words.shape[1])))
    folded = ((part >> 32).bitwise_xor_(part) for part in parts)
    return torch.cat([part @ multipliers if product else part.mul_(multipliers).sum(1) for part in folded])
