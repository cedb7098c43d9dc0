"""Counts of magnitudes: their benchmark row, and what there is to tune."""

from __future__ import annotations

import torch
from torch import Tensor

import lowrank_kernels as lk

from ...kernels import roofline
from ...reference import magnitude_histogram_ref
from .bench import GPU_WIDTHS, REFERENCE, Bench, Inputs, Shape, Tunable, shapes_of


def _inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    return {"values": torch.randn(s["N"], s["K"], device=device).to(dtype)}


def _ours(i: Inputs, backend: str = "auto") -> Tensor:
    return lk.magnitude_histogram(i["values"], backend=backend).float()


def _plain(i: Inputs) -> Tensor:
    """The same counts by PyTorch: bits as integers, and bincount."""
    magnitude = i["values"].float().view(torch.int32) & 0x7FFFFFFF
    return torch.bincount((magnitude >> 19).flatten(), minlength=4096).float()


BENCHES = (
    Bench(
        name="magnitude_histogram",
        shapes=shapes_of((576, 576), (576, 1536), (2048, 2048), (1001, 999), names="K N"),
        gpu_shapes=shapes_of(*GPU_WIDTHS, names="K N"),
        make=_inputs,
        providers={"plain": _plain, "ours": _ours},
        exact=lambda i: magnitude_histogram_ref(i["values"]).double(),
        nbytes=lambda s, size: size * s["N"] * s["K"] + 8 * 4096,
        flops=lambda s: 3.0 * s["N"] * s["K"],
        launches=lambda t, s, dtype: ("", roofline.magnitude_histogram(t, s["N"] * s["K"], dtype.itemsize)),
    ),
)

_TUNABLE = (Tunable("magnitude_histogram", "magnitude_histogram", ("K", "N"), (REFERENCE,)),)
TUNABLES = {"cpu": _TUNABLE, "cuda": _TUNABLE}
