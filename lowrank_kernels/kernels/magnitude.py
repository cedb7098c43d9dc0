"""Triton kernel that counts magnitudes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .target import Target

BLOCK = 4096
PROGRAMS = 4
"""A processor, at most."""


@triton.jit
def _magnitude_histogram_kernel(
    x_ptr,
    counts_ptr,
    elements,
    per_program,
    leading,
    BINS: tl.constexpr,
    SHIFT: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BINS counts of a program's own part of x: bits SHIFT to HIGH of each |x|, where the bits from HIGH on are
    ``leading``. HIGH is 31 for the first digit, where nothing lies above.

    Grid: (programs,); counts is (programs, BINS). No program writes what another does: nothing is added atomically.
    """
    first = tl.program_id(0).to(tl.int64) * per_program
    last = min(first + per_program, elements)
    counts = tl.zeros([BINS], dtype=tl.int32)
    for start in range(first, last, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        inside = offs < last
        x = tl.load(x_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        digit = (magnitude >> SHIFT) & (BINS - 1)
        counts += tl.histogram(digit, BINS, mask=inside & ((magnitude >> HIGH) == leading))
    tl.store(counts_ptr + tl.program_id(0).to(tl.int64) * BINS + tl.arange(0, BINS), counts)


def part_size(target: Target, elements: int) -> int:
    """Elements of a program: whole blocks, and no more programs than there are places for."""
    blocks = triton.cdiv(elements, BLOCK)
    return int(triton.cdiv(blocks, min(blocks, PROGRAMS * target.num_sms))) * BLOCK


def magnitude_histogram(values: Tensor, bits: int, shift: int, leading: int, target: Target) -> Tensor:
    """Counts (2^bits,) int64 of contiguous ``values``. One launch, one read of them; a sum adds up the parts."""
    elements = values.numel()
    size = part_size(target, elements)
    programs = triton.cdiv(elements, size)
    counts = values.new_empty(programs, 1 << bits, dtype=torch.int32)
    _magnitude_histogram_kernel[(programs,)](
        values,
        counts,
        elements,
        size,
        leading,
        BINS=1 << bits,
        SHIFT=shift,
        HIGH=bits + shift,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return counts.sum(0)
