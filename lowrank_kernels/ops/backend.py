"""Which backend runs an op, and the words for the one that cannot."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Hashable
from functools import cache

import torch
from torch import Tensor

from .. import _extension, tuned

logger = logging.getLogger("lowrank_kernels")

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _triton_missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "the package triton is not installed (pip install triton)"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


# Ops with a CUDA C++ kernel, which "auto" prefers to Triton's where it was compiled.
_CUDA_CPP = ("dora_weight_norm",)


def why_not(op: str, backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """The reason why a backend cannot run an op on such tensors; None when it can."""
    if backend == "reference":
        return None
    if dtype not in KERNEL_DTYPES:
        return f"its kernels take float32, bfloat16 and float16, not {dtype}; use backend='reference'"
    if backend == "cpu":
        if device_type != "cpu":
            return f"it takes CPU tensors, and these are on {device_type}"
        return None if _extension.available() else _extension.reason()
    if backend == "triton":
        if _triton_missing():
            return _triton_missing()
        if device_type == "cpu" and not _interpreted():
            return "it takes CUDA tensors; on a CPU it runs in Triton's interpreter alone (set TRITON_INTERPRET=1)"
        if device_type not in ("cpu", "cuda"):
            return f"it takes CUDA tensors, and these are on {device_type}"
        return None
    if op not in _CUDA_CPP:
        return f"{op} has no CUDA C++ kernel; use backend='triton'"
    if device_type != "cuda":
        return f"it takes CUDA tensors, and these are on {device_type}"
    return _extension.why_no_cuda() or None


@cache
def _say_once(message: str) -> None:
    logger.warning(message)


@cache
def automatic(op: str, device_type: str, dtype: torch.dtype) -> tuple[str, str | None]:
    """(what "auto" runs, why not what it would rather run; None where it runs that)."""
    candidates = ("cpu",) if device_type != "cuda" else ("cuda", "triton") if op in _CUDA_CPP else ("triton",)
    reasons = [why_not(op, backend, device_type, dtype) for backend in candidates]
    for backend, reason in zip(candidates, reasons, strict=True):
        if reason is None:
            return backend, reasons[0]
    return "reference", reasons[-1]


def resolve_backend(op: str, backend: str, x: Tensor, sizes: tuned.Sizes | None = None, *of: Hashable) -> str:
    """The backend that runs ``op`` on tensors like ``x``.

    "auto" takes Triton for CUDA tensors, or CUDA C++ where the op has it, and C++ for CPU tensors, unless `lrk tune`
    found another that runs here best for shapes of these ``sizes(*of)``; it falls back to "reference" with one log
    line. A named backend is taken or refused.

    Raises:
        ValueError: an unknown backend, or a named one that cannot run, with the reason.
    """
    if backend == "auto":
        chosen = None if sizes is None else tuned.choice(op, x, sizes, *of)
        if chosen in BACKENDS[1:] and why_not(op, chosen, x.device.type, x.dtype) is None:
            return chosen
        name, reason = automatic(op, x.device.type, x.dtype)
        if name == "reference":
            _say_once(f"{op}: backend 'auto' runs 'reference' here: {reason}")
        return name
    if backend not in BACKENDS:
        raise ValueError(f"{op}: expected backend to be one of {', '.join(BACKENDS)}, got {backend!r}")
    reason = why_not(op, backend, x.device.type, x.dtype)
    if reason is not None:
        raise ValueError(f"{op}: backend '{backend}' cannot run here: {reason}")
    return backend
