"""Loads the compiled ops; the package works without them.

`import lowrank_kernels` never fails here. Whoever needs a compiled op asks for it by name, and then gets
it or the reason why it is not there.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.machinery
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["available", "build_info", "cpu_isa", "has_cuda", "has_op", "reason", "require", "why_no_cuda"]

_FOLDER = Path(__file__).resolve().parent
_NAMESPACE = "lowrank_kernels"
ISAS = ("generic", "avx2", "avx512", "amx")
"""Instruction sets of the CPU ops, each with all that the ones before it have."""

_library: ctypes.CDLL | None = None
_reason: str | None = None
_tried = False


def _path() -> Path | None:
    """The compiled ops, for any supported Python; the plain suffix is what some platforms give."""
    for suffix in (".abi3.so", *importlib.machinery.EXTENSION_SUFFIXES):
        candidate = _FOLDER / f"_C{suffix}"
        if candidate.exists():
            return candidate
    return None


def _load() -> None:
    global _library, _reason, _tried
    _tried = True
    if os.environ.get("LRK_DISABLE_EXTENSION", "0") not in ("", "0"):
        _reason = "it is switched off by LRK_DISABLE_EXTENSION"
        return
    isa = os.environ.get("LRK_CPU_ISA")
    if isa is not None and isa not in ISAS:
        _reason = f"expected LRK_CPU_ISA to be one of {', '.join(ISAS)}, got {isa!r}"
        return
    path = _path()
    if path is None:
        _reason = (
            f"_C is not in {_FOLDER}; build it with `pip install -e . --no-build-isolation` "
            "in the source tree, or install a wheel"
        )
        return
    try:
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))  # the same handle: it is loaded already
        library.lrk_build_info.restype = ctypes.c_char_p
        library.lrk_cpu_isa.restype = ctypes.c_char_p
    except (OSError, RuntimeError, AttributeError) as error:
        _reason = f"loading {path} failed: {error}"
        return
    _library = library


def available() -> bool:
    """Whether the compiled ops are loaded; loads them at the first call."""
    if not _tried:
        _load()
    return _library is not None


def reason() -> str | None:
    """Why the compiled ops are not available; None when they are."""
    available()
    return _reason


def has_op(op_name: str) -> bool:
    """Whether the compiled ops are loaded and have `lowrank_kernels::op_name`."""
    return available() and hasattr(getattr(torch.ops, _NAMESPACE), op_name)


def require(op_name: str) -> None:
    """Return when the op is there.

    Raises:
        RuntimeError: with the reason and the cure, when it is not.
    """
    if has_op(op_name):
        return
    why = _reason or f"{_path()} does not have it; it is older than this package: rebuild it"
    raise RuntimeError(f"{op_name}: the compiled extension is not available: {why}")


@cache
def cpu_isa() -> str | None:
    """The instruction set that the CPU ops run on: "generic", "avx2", "avx512" or "amx".

    LRK_CPU_ISA names a lower one; it is read once, when the first op runs or this is called.
    """
    if not available() or _library is None:
        return None
    return str(_library.lrk_cpu_isa().decode())


def why_no_cuda() -> str:
    """Why the compiled CUDA kernels are not available; empty when they are. Asks for no device."""
    if not available() or _library is None:
        return f"the compiled extension is not available: {_reason}"
    built = json.loads(_library.lrk_build_info().decode())
    if not built["cuda"]:
        return f"the extension was built without CUDA: {built['cuda_note']}; rebuild it where nvcc is"
    if torch.version.cuda is None:
        return "this torch has no CUDA support; install a CUDA build of torch"
    return ""


def has_cuda() -> bool:
    """Whether the loaded extension has CUDA kernels that this torch can launch; a device is another matter."""
    return not why_no_cuda()


def build_info() -> dict[str, Any]:
    """What was built, and what of it runs here.

    Keys: `available`, `reason`, `path`, `native` (whether the pybind11 module serves this Python), and from
    the build `compiler`, `build_type`, `processor`, `cuda` (bool), `cuda_note` (why or why not), `cuda_archs`,
    `torch` (headers built against), `torch_target` (oldest torch that it runs on), `python_abi`; `cpu_isa`, the
    instruction set that the CPU ops run on, or would if they were loaded.

    The pybind11 module needs no torch, so it tells these things where the compiled ops do not load too.
    """
    info: dict[str, Any] = {"available": available(), "reason": _reason}
    path = _path()
    info["path"] = str(path) if path else None
    try:
        native = importlib.import_module(f"{__package__}._native")
    except ImportError:
        # It is built for one Python version, while the ops run on many: its absence is no fault.
        native = None
    info["native"] = native is not None
    if native is not None:
        info.update(native.build_info())
    elif _library is not None:
        info.update(json.loads(_library.lrk_build_info().decode()))
    if info["available"]:
        info["cpu_isa"] = cpu_isa()
    elif native is not None:
        info["cpu_isa"] = native.cpu_isa()
    return info


_load()
