"""What this package touches of Triton beyond its public API, in one place. Written for Triton 3.5 to 3.8.

Two things have no public way in. Recording what a launcher asks of the compiler, without a device: a stand-in driver
names the target, and the cache hook keeps the launch from being compiled. And watching the interpreter: its memory
operations and its grid loop are methods of one object and one class.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import triton
from torch.utils._python_dispatch import _disable_current_modes
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def gpu_target(arch: str) -> GPUTarget:
    """Triton's name of "sm_90", "gfx942", …"""
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def nvidia_tool(name: str) -> str:
    """Path of "cuobjdump", "nvdisasm" or "ptxas" as Triton carries it."""
    return str(getattr(knobs.nvidia, name).path)


class _NamedTarget:
    """A Triton driver that names a target and needs no device."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return f"{self._target.backend}:{self._target.arch}"  # Triton keys its kernels by it

    def get_current_stream(self, device: Any) -> int:
        return 0


class _NoDriver:
    """A Triton driver whose every use raises."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"Triton's driver was asked for {name!r}, and this code must run without a driver")


@contextmanager
def _driver(stand_in: Any) -> Iterator[None]:
    before = driver._active
    driver.set_active(stand_in)
    try:
        yield
    finally:
        driver._active = before


def without_driver() -> Any:
    """Context in which any use of Triton's driver raises RuntimeError."""
    return _driver(_NoDriver())


OnLaunch = Callable[[JITFunction, tuple[int, ...], tuple[Any, ...], dict[str, Any], dict[str, Any]], None]
"""(kernel, grid, arguments, keyword arguments, {"signature", "constants", "attributes"})"""


@contextmanager
def intercepted_launches(target: GPUTarget, on_launch: OnLaunch) -> Iterator[None]:
    """Context in which ``kernel[grid](...)`` calls ``on_launch`` with what the JIT would have compiled, and no more.

    Signature, constants and divisibility come from the JIT's own binder, so tensors may live on the meta device.
    """
    if INTERPRETED:
        raise RuntimeError("kernels defined under TRITON_INTERPRET=1 cannot be compiled; unset it and start again")
    request: dict[str, Any] = {}

    def keep_from_compiling(**kwargs: Any) -> bool:
        compile_ = kwargs["compile"]
        request.update(
            signature=compile_["signature"], constants=compile_["constants"], attributes=compile_["configs"][0]
        )
        return True

    run, hook = JITFunction.run, knobs.runtime.jit_cache_hook

    def recording_run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = dict(kwargs)  # run adds options of its own
        request.clear()
        run(self, *args, grid=grid, warmup=warmup, **kwargs)
        on_launch(self, grid, args, given, dict(request))

    JITFunction.run, knobs.runtime.jit_cache_hook = recording_run, keep_from_compiling
    try:
        with _driver(_NamedTarget(target)):
            yield
    finally:
        JITFunction.run, knobs.runtime.jit_cache_hook = run, hook


OnAccess = Callable[[str, Any, Any, int], None]
"""("read" | "write" | "atomic", addresses, mask, bytes an element)"""


@contextmanager
def watched_interpreter(
    on_launch: Callable[[str, dict[str, Any]], None], on_access: OnAccess, after_launch: Callable[[], None]
) -> Iterator[None]:
    """Context in which the interpreter reports every launch, with its arguments by name, and every memory access."""
    if not INTERPRETED:
        raise RuntimeError("watching kernels needs Triton's interpreter: set TRITON_INTERPRET=1 before importing them")
    from triton.runtime import interpreter

    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    call = executor.__call__

    def element_bytes(pointers: Any) -> int:
        return int(interpreter._get_np_dtype(pointers.get_element_ty()).itemsize)

    def masked_load(pointers: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
        on_access("read", pointers.data, mask.data, element_bytes(pointers))
        return load(pointers, mask, *rest, **kwargs)

    def masked_store(pointers: Any, value: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
        on_access("write", pointers.data, mask.data, element_bytes(pointers))
        return store(pointers, value, mask, *rest, **kwargs)

    def atomic(*args: Any, **kwargs: Any) -> Any:
        on_access("atomic", None, None, 0)

    def executed(self: Any, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():  # the interpreter's own tensor operations are nobody's
            on_launch(self.fn.__name__, {**dict(zip(self.arg_names, args, strict=False)), **kwargs})
            call(self, *args, **kwargs)
            after_launch()

    # Loads and stores of every kind, descriptors included, come down to the two masked ones.
    patches = {
        "create_masked_load": masked_load,
        "create_masked_store": masked_store,
        "create_atomic_rmw": atomic,
        "create_atomic_cas": atomic,
    }
    for name, patch in patches.items():
        setattr(builder, name, patch)
    executor.__call__ = executed
    # CPU tensors are worked on in place; copying each storage onto itself would touch all of it.
    restore = executor._restore_args_dev
    executor._restore_args_dev = lambda *args: None
    try:
        yield
    finally:
        for name in patches:
            delattr(builder, name)
        executor.__call__, executor._restore_args_dev = call, restore


TRITON_VERSION = triton.__version__
