"""Who multiplies on a CPU, as measured: the rules of ``plan`` where `lrk tune` has settled nothing.

Measured on two threads of a Xeon with AMX, those for lesser instruction sets too, with PyTorch, MKL and oneDNN held to
the same set. "generic", which serves other processors as well, is not measured: it leaves to the library what that can
do.
"""

from __future__ import annotations

import torch

from .. import _extension
from ..weights.dense import library_reads_past_rows

_ALL = 1 << 62
_Rows = dict[tuple[str, torch.dtype], tuple[int, int]]

# Tokens (least, most) for which the extension's own product beats PyTorch's, whole correction included. Without tiles
# PyTorch multiplies bfloat16 and float16 an element at a time, or nearly.
OWN_PRODUCT_ROWS: _Rows = {
    ("amx", torch.bfloat16): (1, 128),
    ("amx", torch.float16): (1, 64),
    ("amx", torch.float32): (1, 64),
    ("avx512", torch.bfloat16): (1, _ALL),
    ("avx512", torch.float16): (1, _ALL),
    ("avx512", torch.float32): (1, 64),
    ("avx2", torch.bfloat16): (1, _ALL),
    ("avx2", torch.float16): (1, _ALL),
    ("avx2", torch.float32): (1, 32),
}
# The same for dY W, the gradient of x.
OWN_GRADIENT_ROWS: _Rows = {
    ("amx", torch.bfloat16): (1, 8),
    ("amx", torch.float16): (1, 8),
    ("avx512", torch.bfloat16): (1, _ALL),
    ("avx512", torch.float16): (1, _ALL),
    ("avx2", torch.bfloat16): (1, _ALL),
    ("avx2", torch.float16): (1, _ALL),
}
# And for both, in products that are not wider than their reduction.
OWN_MANY_ROWS: _Rows = {("amx", torch.bfloat16): (512, 1024)}


# dY W of few rows by a weight of few elements: what a call costs beside the product decides, and the extension makes
# the whole backward in one.
OWN_SMALL_GRADIENT = {("avx2", torch.float32): (8, 1 << 17)}
# Thin products over few rows, too.
OWN_THIN_ROWS = {("avx2", torch.float32): 8}


def own_forward(dtype: torch.dtype, rows: int, inner: int, width: int) -> bool:
    """True where the extension multiplies ``rows`` of x by W fastest, with the correction in its accumulators."""
    return _within(OWN_PRODUCT_ROWS, dtype, rows) or (width <= inner and _within(OWN_MANY_ROWS, dtype, rows))


def own_gradient(dtype: torch.dtype, rows: int, inner: int, width: int) -> bool:
    """The same of dY W, the gradient of x."""
    most_rows, most_elements = OWN_SMALL_GRADIENT.get((isa(), dtype), (0, 0))
    if rows <= most_rows and inner * width <= most_elements:
        return True
    return _within(OWN_GRADIENT_ROWS, dtype, rows) or (width <= inner and _within(OWN_MANY_ROWS, dtype, rows))


def library_thin(dtype: torch.dtype, rows: int, inner: int, dropout: bool) -> bool:
    """True where PyTorch's product with a factor is the faster one: in float32, which MKL multiplies.

    It never is with dropout, which the extension draws while it reads.
    """
    if dropout or library_reads_past_rows(dtype, "cpu", inner) or rows <= OWN_THIN_ROWS.get((isa(), dtype), 0):
        return False
    return dtype == torch.float32 or isa() == "generic"


def isa() -> str:
    """The instruction set that the rules are for; empty without the extension."""
    return _extension.cpu_isa() or ""


def _within(tokens: _Rows, dtype: torch.dtype, rows: int) -> bool:
    least, most = tokens.get((isa(), dtype), (1, 0))
    return least <= rows <= most
