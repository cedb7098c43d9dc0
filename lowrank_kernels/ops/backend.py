"""Which backends can run an op here, and why the others cannot."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch

from .. import _extension
from ..families import CUDA_CPP, has_triton

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _triton_missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "the package triton is not installed (pip install triton)"


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


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
        if not has_triton(op):
            return f"{op} has no Triton kernel; use backend='reference'"
        if _triton_missing():
            return _triton_missing()
        if device_type == "cpu" and not interpreted():
            return "it takes CUDA tensors; on a CPU it runs in Triton's interpreter alone (set TRITON_INTERPRET=1)"
        if device_type not in ("cpu", "cuda"):
            return f"it takes CUDA tensors, and these are on {device_type}"
        return None
    if op not in CUDA_CPP:
        return f"{op} has no CUDA C++ kernel; use backend='triton'"
    if device_type != "cuda":
        return f"it takes CUDA tensors, and these are on {device_type}"
    return _extension.why_no_cuda() or None


@cache
def automatic(op: str, device_type: str, dtype: torch.dtype) -> tuple[str, str | None]:
    """(what "auto" runs, the reason why it is not the first candidate, or None)."""
    candidates = ("cpu",) if device_type != "cuda" else ("cuda", "triton") if op in CUDA_CPP else ("triton",)
    reasons = [why_not(op, backend, device_type, dtype) for backend in candidates]
    for backend, reason in zip(candidates, reasons, strict=True):
        if reason is None:
            return backend, reasons[0]
    return "reference", reasons[-1]
