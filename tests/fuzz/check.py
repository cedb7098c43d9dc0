"""Makes the call of a seed, and says what is wrong with its results."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from lowrank_kernels import tuned

from .calls import FAMILIES, Call, Tensors
from .draw import F32, F64, Draw

ROUNDINGS = 16.0
"""Units in the last place of a result's size that it may be off: a few roundings on its way, each of the whole."""

CHUNK = 500
"""Seeds that a process of a long run takes at a time."""


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def faults(seed: int, backends: tuple[str, ...] = ("auto", "cpu", "reference")) -> list[str]:
    """What is wrong with the results of this seed's call; nothing, if nothing is. An exception is a fault too."""
    d = Draw(seed)
    names = list(FAMILIES)
    family = d.random.choices(names, [FAMILIES[name][0] for name in names])[0]
    try:
        call = FAMILIES[family][1](d)
    except Exception as error:
        return [f"seed {seed}: operands of {family}\n  -> {type(error).__name__}: {error}"]
    possible = [b for b in call.backends if b in backends] or ["reference"]
    backend = d.random.choice(
        possible if call.dtype != F64 else [b for b in possible if b in ("auto", "reference")] or ["reference"]
    )
    wanted = [name for name in call.trained if name in call.tensors and d.chance(0.6)]
    way = d.one_of("plain", "plain", "no_grad", "inference")
    fields = d.random.choice((None, *call.choices)) if call.tuned and backend == "auto" else None
    grad_layout = d.one_of("plain", "plain", "expanded", "laid out")
    words = (
        f"seed {seed}: {call.words}, backend {backend}, plan {fields}, {way}, gradients of {wanted}, "
        f"dY {grad_layout}\n"
        + "\n".join(f"  {n}: {tuple(t.shape)} {t.dtype} strides {t.stride()}" for n, t in call.tensors.items())
    )
    try:
        with poisoned_memory(), tuned.forcing(call.tuned) if call.tuned else nullcontext() as force:
            if force is not None:
                force(fields)
            found = _compare(call, d, backend, wanted, way, grad_layout)
    except Exception as error:  # a refusal of a valid call
        found = [f"{type(error).__name__}: {error}"]
    return [f"{words}\n  -> {fault}" for fault in found]


def faults_of_chunk(first: int) -> list[str]:
    """The faults of CHUNK seeds, in a process that does nothing else (which cannot import a package's __main__)."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    return [fault for seed in range(first, first + CHUNK) for fault in faults(seed)]


def _compare(call: Call, d: Draw, backend: str, wanted: list[str], way: str, grad_layout: str) -> list[str]:
    before = {name: t.clone() for name, t in call.tensors.items()}
    exact = {name: t.detach().to(F64).requires_grad_(name in wanted) for name, t in call.tensors.items()}
    tensors = {name: t.detach().requires_grad_(name in wanted) for name, t in call.tensors.items()}
    if way != "plain":
        with torch.inference_mode() if way == "inference" else torch.no_grad():
            y, oracle = call.run(tensors, backend), call.run(exact, "reference")
        return _differences(call, {"y": y}, {"y": oracle}, 0.0) + _changed(call.tensors, before)
    y, oracle = call.run(tensors, backend), call.run(exact, "reference")
    results, oracles, size = {"y": y.detach()}, {"y": oracle.detach()}, 0.0
    if wanted and y.requires_grad:
        grad_y = _grad_y(d, y, grad_layout)
        size = float(grad_y.to(F64).norm())
        leaves, exact_leaves = [tensors[n] for n in wanted], [exact[n] for n in wanted]
        grads = torch.autograd.grad(y, leaves, grad_y, allow_unused=True)
        exact_grads = torch.autograd.grad(oracle, exact_leaves, grad_y.to(F64), allow_unused=True)
        for name, ours, true in zip(wanted, grads, exact_grads, strict=True):
            if (ours is None) != (true is None):
                return [f"gradient of {name}: {ours} where the oracle has {true}"]
            if ours is not None and true is not None:
                results[name], oracles[name] = ours, true
    return _differences(call, results, oracles, size) + _changed(call.tensors, before)


def _grad_y(d: Draw, y: Tensor, layout: str) -> Tensor:
    if layout == "expanded":
        return torch.full((), 0.5, dtype=y.dtype).expand(y.shape)
    grad = d.normal(*y.shape, of=y.dtype)
    return d.laid_out_as_it_is(grad) if layout == "laid out" and grad.dim() > 1 else grad


def _differences(call: Call, results: Tensors, oracles: Tensors, grad_size: float) -> list[str]:
    found = []
    for name, ours in results.items():
        true, operand = oracles[name], call.tensors.get(name)
        dtype = call.dtype if name == "y" or operand is None else operand.dtype
        if ours.shape != true.shape or ours.dtype != dtype:
            found.append(f"{name}: {tuple(ours.shape)} {ours.dtype}, expected {tuple(true.shape)} {dtype}")
            continue
        if not ours.numel():
            continue
        # Products are rounded to x's dtype on the way, sums to float32.
        eps = max(torch.finfo(call.dtype).eps, torch.finfo(dtype).eps)
        allowed = (ROUNDINGS * eps + call.relative) * call.size(name, grad_size)
        allowed += 4 * torch.finfo(dtype).smallest_normal + 4 * torch.finfo(call.dtype).smallest_normal * (
            1 + grad_size
        )
        beyond = ours.isinf() & (ours * true > 0) & (true.abs() + allowed > torch.finfo(dtype).max)
        wrong = ~torch.isfinite(ours) & torch.isfinite(true) & ~beyond
        error = (ours.to(F64) - true).abs().masked_fill(beyond, 0.0).nan_to_num()
        if wrong.any():
            found.append(f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are NaN or infinite")
        elif error.max() > allowed:
            found.append(f"{name}: off by {float(error.max()):.3g}, allowed {allowed:.3g}")
    return found


def _changed(tensors: Tensors, before: Tensors) -> list[str]:
    return [f"{name} was changed" for name, t in tensors.items() if not torch.equal(t, before[name])]


__all__ = ["CHUNK", "F32", "faults", "faults_of_chunk", "poisoned_memory"]
