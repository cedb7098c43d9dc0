"""Blocks of a model as one autograd node each: linears that share their input, and MLPs with their activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .functional import dora_linear, frozen_linear, lora_linear
from .ops.blocks import LoRAPart, check_part, lora_block
from .ops.library import transformed
from .ops.operands import backend_error, floats_error, number_error, raise_error, seed_tensor, under_autocast
from .reference.blocks import ACTIVATIONS, mlp_hidden_ref
from .weights import in_dtype, like


def qkv_lora(
    x: Tensor,
    parts: Sequence[LoRAPart],
    *,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """Linears of one x, such as Q, K and V: y_i = x W_iᵀ + bias_i + s_i drop(x) A_iᵀ B_iᵀ, or DoRA of it.

    Args:
        x: (..., K), as :func:`lowrank_kernels.lora_linear` takes it.
        parts: one :class:`lowrank_kernels.LoRAPart` a linear, of any N_i and R_i, adapted or not.
        dropout_p: as of ``lora_linear``; one mask for all parts.
        dropout_seed: int64 scalar; drawn from torch's generator where it is None.
        backend: "auto", "reference", "cpu" (C++) or "triton", of every part.

    Returns:
        The y_i (..., N_i), in order, in x's dtype.

    One autograd node: x is saved once, dX is summed in place, in the order of the parts. On a CPU, where PyTorch makes
    the products with W, the thin products of all LoRA parts with x are one, and so are their dA and correction of dX:
    results differ from those of separate calls by rounding. Otherwise each y_i is that of ``lora_linear`` or
    ``dora_linear`` (norms detached). Under autocast with DoRA, and in torch.func transforms, the parts are separate
    calls.

    Raises:
        ValueError, TypeError: no part; what ``lora_linear`` and ``dora_linear`` raise of a part, by its number.
    """
    op = "qkv_lora"
    names = [f"part {number}" for number in range(len(_parts(op, parts)))]
    return _block(op, x, parts, names, dropout_p=dropout_p, dropout_seed=dropout_seed, backend=backend)


def mlp_lora(
    x: Tensor,
    gate: LoRAPart | None,
    up: LoRAPart,
    down: LoRAPart,
    *,
    activation: str = "silu",
    dropout_p: float = 0.0,
    dropout_seed: Tensor | int | None = None,
    backend: str = "auto",
) -> Tensor:
    """An MLP: y = down(h), h = f(gate(x)) ∘ up(x); without a gate h = f(up(x)).

    Args:
        x: (..., K), as :func:`lowrank_kernels.lora_linear` takes it.
        gate, up: :class:`lowrank_kernels.LoRAPart` with weights (F, K). An ``up`` of (2F, K) without a gate, over a
            ``down`` of (N, F), holds both, the gate's rows first.
        down: with a weight (N, F).
        activation: f: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GeGLU), "relu_squared" (ReLU²).
        dropout_p: of the inputs of all corrections; gate and up share a mask, down has another.
        dropout_seed: int64 scalar; the mask of h is that of dropout_seed + 1.
        backend: "auto", "reference", "cpu" (C++) or "triton", of every part.

    Returns:
        y (..., N) in x's dtype.

    One autograd node, which saves x, the outputs of gate and up and each P: f and h are made again in the backward.
    See :func:`qkv_lora` for what gate and up share.

    Raises:
        ValueError, TypeError: sizes that do not fit together, an unknown activation; and what ``lora_linear`` and
            ``dora_linear`` raise of a part, named.

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202; ReLU²: So et al., "Primer", arXiv 2109.08668.
    """
    op = "mlp_lora"
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: expected activation to be one of {', '.join(ACTIVATIONS)}, got {activation!r:.60}")
    parts, names = ([up, down], ["up", "down"]) if gate is None else ([gate, up, down], ["gate", "up", "down"])
    _parts(op, parts)
    widths, hidden = [part.weight.shape[0] for part in parts[:-1]], down.weight.shape[-1]
    split = gate is None and widths[0] == 2 * hidden
    if not split and any(width != hidden for width in widths):
        raise ValueError(
            f"{op}: expected {' and '.join(names[:-1])} to give the {hidden} columns that down takes"
            f"{', or up twice as many' if gate is None else ''}; got {' and '.join(map(str, widths))}"
        )
    options = {"dropout_p": dropout_p, "dropout_seed": dropout_seed, "backend": backend}
    return _block(op, x, parts, names, activation=activation, split=split, **options)[0]


def _parts(op: str, parts: Sequence[LoRAPart]) -> Sequence[LoRAPart]:
    if not isinstance(parts, (list, tuple)) or isinstance(parts, LoRAPart) or not parts:
        raise ValueError(f"{op}: expected parts to be a list of one LoRAPart or more, got {parts!r:.60}")
    for part in parts:
        if not isinstance(part, LoRAPart):
            raise TypeError(f"{op}: expected parts to be LoRAPart, got {type(part).__name__}")
        raise_error(floats_error(op, weight=part.weight))
    return parts


def _block(
    op: str,
    x: Tensor,
    parts: Sequence[LoRAPart],
    names: Sequence[str],
    *,
    activation: str | None = None,
    split: bool = False,
    dropout_p: Any,
    dropout_seed: Any,
    backend: Any,
) -> tuple[Tensor, ...]:
    raise_error(
        floats_error(op, x=x) or backend_error(op, backend) or number_error(op, "dropout_p", dropout_p, 0.0, 1.0)
    )
    parts = [part._replace(weight=like(x, part.weight)) for part in parts]
    seed = None if dropout_p == 0.0 else seed_tensor(op, "dropout_seed", dropout_seed, x.device)
    for name, part in zip(names, parts, strict=True):
        of_h = activation is not None and name == names[-1]
        rows = x.new_empty(0, part.weight.shape[-1]) if of_h else x
        check_part(f"{op}: {name}", rows, part, dropout_p, seed, backend)
    autocast = under_autocast(x)
    if transformed() or (autocast and any(part.magnitude is not None for part in parts)):
        return _by_separate_calls(x, parts, activation, split, seed, dropout_p=dropout_p, backend=backend)
    if autocast:
        x, parts = _cast(torch.get_autocast_dtype(x.device.type), x, parts)
    return lora_block(x, parts, activation=activation, split=split, dropout_p=dropout_p, seed=seed, backend=backend)


def _cast(dtype: torch.dtype, x: Tensor, parts: Sequence[LoRAPart]) -> tuple[Tensor, Sequence[LoRAPart]]:
    """As autocast casts the operands of ``lora_linear``: all but the factors."""
    if x.dtype == torch.float64:
        return x, parts
    cast = [
        part._replace(weight=in_dtype(part.weight, dtype), bias=None if part.bias is None else part.bias.to(dtype))
        for part in parts
    ]
    return x.to(dtype), cast


def _by_separate_calls(
    x: Tensor, parts: Sequence[LoRAPart], activation: str | None, split: bool, seed: Tensor | None, **options: Any
) -> tuple[Tensor, ...]:
    """The same by the public functions of the parts."""
    of_x = parts if activation is None else parts[:-1]
    ys = [_linear(x, part, dropout_seed=seed, **options) for part in of_x]
    if activation is None:
        return tuple(ys)
    pair = ys[0].chunk(2, -1) if split else ys
    h = mlp_hidden_ref(activation, pair[0], pair[1] if len(pair) > 1 else None)
    return (_linear(h, parts[-1], dropout_seed=None if seed is None else seed + 1, **options),)


def _linear(x: Tensor, part: LoRAPart, **options: Any) -> Tensor:
    weight, a, b, bias, magnitude, weight_sq_norm, scaling = part
    if a is None or b is None:
        return frozen_linear(x, weight, bias)
    if magnitude is None:
        return lora_linear(x, weight, a, b, bias, scaling=scaling, **options)
    return dora_linear(x, weight, a, b, magnitude, bias, scaling=scaling, weight_sq_norm=weight_sq_norm, **options)


__all__ = ["LoRAPart", "mlp_lora", "qkv_lora"]
