"""``lowrank_kernels::lora_linear``: schema, checks, backends, fakes, autograd, autocast."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import _extension, tuned
from ..reference.lora import lora_linear_backward_ref, lora_linear_ref
from .backend import KERNEL_DTYPES, resolve_backend
from .library import define, no_double_backward, unobserved
from .operands import as_rows, check_number, check_optional_vector, factor, is_empty, like_rows_of, unit_columns, vector

_FORWARD = (
    "lora_linear(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor? gate, float scaling, "
    "float dropout_p, Tensor? dropout_seed, bool save_p, str backend) -> (Tensor, Tensor)"
)
_BACKWARD = (
    "lora_linear_backward(Tensor grad_y, Tensor? x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? gate, "
    "Tensor? p, float scaling, float dropout_p, Tensor? dropout_seed, bool[] needs, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
Needs = tuple[bool, bool, bool, bool, bool]
"""Which of the gradients of (x, lora_a, lora_b, bias, gate) to compute."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_lora_linear(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, gate: Tensor | None,
    dropout_p: float, op: str = "lora_linear",
) -> None:  # fmt: skip
    """Raise ValueError or TypeError, in the op's name, for operands that do not fit together."""
    for name, tensor in (("x", x), ("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: expected {name} to be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: expected {name} of a floating dtype, got {tensor.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"{op}: expected weight of shape (N, K), got {tuple(weight.shape)}")
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"{op}: expected x of shape (..., K) = (..., {k}), got {tuple(x.shape)}")
    if lora_a.dim() != 2 or lora_a.shape[1] != k:
        raise ValueError(f"{op}: expected lora_a of shape (R, K) = (R, {k}), got {tuple(lora_a.shape)}")
    r = lora_a.shape[0]
    if r == 0:
        raise ValueError(f"{op}: expected a rank of at least 1, got lora_a of shape {tuple(lora_a.shape)}")
    if lora_b.shape != (n, r):
        raise ValueError(f"{op}: expected lora_b of shape (N, R) = ({n}, {r}), got {tuple(lora_b.shape)}")
    for name, tensor in (("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b)):
        if tensor.device != x.device:
            raise ValueError(f"{op}: expected {name} on {x.device} like x, got {tensor.device}")
    check_optional_vector(op, "bias", "N", bias, n, x.device)
    check_optional_vector(op, "gate", "R", gate, r, x.device)
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"{op}: expected x and weight of one dtype, got {x.dtype} and {weight.dtype}; "
            f"cast x, or run under torch.autocast"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: expected a frozen weight, got one that requires grad; "
            f"call weight.requires_grad_(False), or train it with torch.nn.functional.linear"
        )
    check_number(op, "dropout_p", dropout_p, 0.0, 1.0)


Metadata = tuple[torch.Size, torch.dtype, torch.device]


def _fit(x: Metadata, weight: Metadata, a: Metadata, b: Metadata, bias: Metadata | None, gate: Metadata | None) -> bool:
    """Whether there is nothing to say of such operands, with a frozen weight: what nearly every call comes with.

    True promises that every check would pass; False promises nothing.
    """
    device, (n, k), r = x[2], weight[0], a[0][0]
    return (
        x[1] is weight[1] and x[0][-1] == k and a[0] == (r, k) and b[0] == (n, r) and r > 0
        and (bias is None or bias[0] == (n,)) and (gate is None or gate[0] == (r,))
        and all(t is None or (t[1] in _FLOATS and t[2] == device) for t in (x, weight, a, b, bias, gate))
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- backends


def _forward(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, gate: Tensor | None,
    scaling: float, dropout_p: float, dropout_seed: Tensor | None, save_p: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x2 = as_rows(x)
    p: Tensor | None
    name = resolve_backend("lora_linear", backend, x, tuned.product_sizes, x.shape, weight.shape)
    if name == "reference" or is_empty(x2, weight):
        y, p = lora_linear_ref(
            x2, weight, lora_a, lora_b, bias,
            scaling=scaling, gate=gate, dropout_p=dropout_p, dropout_seed=dropout_seed,
        )  # fmt: skip
    else:
        run = _cpu_forward if name == "cpu" else _triton_forward
        x2, lora_a, lora_b = unit_columns(x2), factor(lora_a), factor(lora_b)
        bias, gate = vector(bias), vector(gate)
        y, p = run(x2, weight, lora_a, lora_b, bias, gate, scaling, dropout_p, dropout_seed, save_p)
    if p is None or not save_p:
        p = x.new_empty(0)
    return like_rows_of(x, y), p


def _backward(
    grad_y: Tensor, x: Tensor | None, weight: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor | None,
    p: Tensor | None, scaling: float, dropout_p: float, dropout_seed: Tensor | None, needs: Needs, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    need_x, need_a, need_b, need_bias, need_gate = needs
    dy = unit_columns(as_rows(grad_y))
    name = resolve_backend("lora_linear", backend, grad_y)
    if name == "reference" or is_empty(dy, weight):
        grads: tuple[Tensor | None, ...] = lora_linear_backward_ref(
            dy, x, weight, lora_a, lora_b, p,
            scaling=scaling, gate=gate, dropout_p=dropout_p, dropout_seed=dropout_seed, needs=needs,
        )  # fmt: skip
    else:
        x2 = None if x is None else unit_columns(as_rows(x))
        run = _cpu_backward if name == "cpu" else _triton_backward
        grad_x, grad_a, grad_b, q = run(
            dy, x2, weight, factor(lora_a), factor(lora_b), vector(gate), p, scaling, dropout_p, dropout_seed,
            (need_x, need_a, need_b), need_gate,
        )  # fmt: skip
        grad_a, grad_b = in_dtype_of(grad_a, lora_a), in_dtype_of(grad_b, lora_b)
        grad_gate = None
        if need_gate:
            assert q is not None and p is not None and gate is not None
            grad_gate = (scaling * (q.float() * p.float()).sum(0)).to(gate.dtype)
        grads = (grad_x, grad_a, grad_b, dy.sum(0) if need_bias else None, grad_gate)
    grad_x = grads[0]
    if grad_x is not None:
        grad_x = like_rows_of(grad_y, grad_x)
    return tuple(grad_y.new_empty(0) if g is None else g for g in (grad_x, *grads[1:]))


def in_dtype_of(gradient: Tensor | None, of: Tensor) -> Tensor | None:
    """A gradient in its operand's dtype: kernels give float32 for float64."""
    return gradient if gradient is None or gradient.dtype == of.dtype else gradient.to(of.dtype)


def _triton_forward(*args: Any) -> tuple[Tensor, Tensor | None]:
    from ..kernels.lora import lora_linear_fwd

    return lora_linear_fwd(*args)


def _triton_backward(*args: Any) -> tuple[Tensor | None, ...]:
    from ..kernels.lora import lora_linear_bwd

    return lora_linear_bwd(*args)


# These rules were measured on two threads of a Xeon with AMX, those for lesser instruction sets too, with PyTorch, MKL
# and oneDNN held to the same. "generic", which serves other processors as well, is not measured: it leaves to the
# library what that can do.


def _library_is_faster(x: Tensor, inner: int, dropout_p: float = 0.0) -> bool:
    """Whether PyTorch's own thin products beat the extension's on this CPU: in float32, which MKL multiplies.

    They never do with dropout, which the extension draws while it reads.
    """
    if dropout_p != 0.0 or library_reads_past_rows(x, inner):
        return False
    return x.dtype == torch.float32 or _extension.cpu_isa() == "generic"


_ALL = 1 << 62
# Tokens (least, most) for which the extension's own product beats PyTorch's, whole correction included. Without tiles
# PyTorch multiplies bfloat16 and float16 an element at a time, or nearly.
_OWN_ROWS = {
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
_OWN_GRAD_ROWS = {
    ("amx", torch.bfloat16): (1, 8),
    ("amx", torch.float16): (1, 8),
    ("avx512", torch.bfloat16): (1, _ALL),
    ("avx512", torch.float16): (1, _ALL),
    ("avx2", torch.bfloat16): (1, _ALL),
    ("avx2", torch.float16): (1, _ALL),
}
# And for both, in products that are not wider than their reduction.
_OWN_MANY_ROWS = {("amx", torch.bfloat16): (512, 1024)}


def own_product(x: Tensor, weight: Tensor, op: str = "lora_linear") -> bool:
    """Whether the extension computes x Wᵀ too, with the correction in its accumulators."""
    if weight.stride(1) != 1:
        return False
    chosen = tuned.choice(op, x, tuned.product_sizes, x.shape, weight.shape)
    return library_reads_past_rows(x, weight.shape[1]) or own_by_rule(chosen, x.dtype, x.shape, weight.shape)


def own_by_rule(chosen: str | None, dtype: torch.dtype, x: torch.Size, weight: torch.Size) -> bool:
    """The same for shapes, after what was settled for them, or by the rule."""
    if chosen in ("own_product", "library_product"):
        return chosen == "own_product"
    rows, (n, k) = x[:-1].numel(), weight
    return _within(_OWN_ROWS, dtype, rows) or (n <= k and _within(_OWN_MANY_ROWS, dtype, rows))


@tuned.remembered
def _way(forced: str | None, records: bool, *metadata: Any) -> str | None:
    """One of "eager", "own_product" and "op" for such operands; None where they are not known to fit together."""
    x, weight, lora_a, lora_b = (metadata[i : i + 3] for i in range(0, 12, 3))
    bias, gate = metadata[12:]
    if not _fit(x, weight, lora_a, lora_b, bias, gate):
        return None
    (rows, dtype, device), rank = x, lora_a[0][0] if x[2].type == "cuda" else None
    if device.type not in ("cpu", "cuda") or 0 in weight[0]:
        return "op"
    op = "lora_linear_backward" if records else "lora_linear"
    chosen = forced
    if chosen == tuned.TABLE:
        chosen = tuned.settled(op, device.type, dtype, tuned.product_sizes, rows, weight[0], rank)
    (n, k) = weight[0]
    unsafe = _reads_past_rows(dtype, device.type, k) or _reads_past_rows(dtype, device.type, n)
    if chosen == "eager" and not unsafe and not _reads_past_rows(dtype, device.type, lora_a[0][0]):
        return "eager"
    own = (
        device.type == "cpu" and not records and _extension.available() and dtype in KERNEL_DTYPES
        and torch.float64 not in (lora_a[1], lora_b[1]) and chosen != "reference"
        and (unsafe or own_by_rule(chosen, dtype, rows, weight[0]))
    )  # fmt: skip
    return "own_product" if own else "op"


def lora_linear_way(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, gate: Tensor | None
) -> str | None:
    """How a call without dropout runs: "eager", "own_product", "op"; None where the operands are not known to fit.

    "eager", PyTorch's calls, where these are fastest: a call that records gradients asks what is over forward and
    backward, any other what is over the forward. Not under torch.compile or autocast, which were not measured.
    "own_product", the extension's in one call, where no gradient is recorded and nobody would notice that it is not
    this package's op. Operands are checked and settled once for all of their metadata: at one token, where the weight
    has emptied the caches, more Python takes longer than the correction.
    """
    if torch.compiler.is_dynamo_compiling() or type(x) is not Tensor:
        return None
    try:
        records = torch.is_grad_enabled() and (
            x.requires_grad or lora_a.requires_grad or lora_b.requires_grad
            or (bias is not None and bias.requires_grad) or (gate is not None and gate.requires_grad)
        )  # fmt: skip
        way = _way(
            tuned.forced.get("lora_linear_backward" if records else "lora_linear", tuned.TABLE), records,
            x.shape, x.dtype, x.device, weight.shape, weight.dtype, weight.device,
            lora_a.shape, lora_a.dtype, lora_a.device, lora_b.shape, lora_b.dtype, lora_b.device,
            None if bias is None else (bias.shape, bias.dtype, bias.device),
            None if gate is None else (gate.shape, gate.dtype, gate.device),
        )  # fmt: skip
    except (AttributeError, IndexError, TypeError, ValueError):  # no tensor, no matrix, a size that is no number
        return None
    if weight.requires_grad:
        return None
    if way == "eager":
        return "op" if torch._C._is_any_autocast_enabled() else way
    if way == "own_product":
        adjacent = x.is_contiguous() and weight.stride(1) == 1 and lora_a.is_contiguous() and lora_b.is_contiguous()
        return way if adjacent and unobserved((x, weight, lora_a, lora_b, bias, gate)) else "op"
    return way


def lora_linear_inference(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, gate: Tensor | None, scaling: float,
    column_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The formula without dropout in one call of the extension, for contiguous CPU tensors; records no gradient."""
    return torch.ops.lowrank_kernels.lora_linear_inference(x, weight, lora_a, lora_b, bias, gate, scaling, column_scale)


def lora_linear_eager(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, gate: Tensor | None, scaling: float
) -> Tensor:
    """The formula without dropout, as PyTorch's calls, which record their own gradients.

    The weight fills the caches, so that its product comes last: in the forward, or, where gradients are recorded, in
    the backward, whose order is the forward's reversed. At one token that is 4 % of the time.
    """
    lora_a, lora_b = _in_dtype_of(x, lora_a), _in_dtype_of(x, lora_b)
    bias = None if bias is None else _in_dtype_of(x, bias)
    base = linear(x, weight, bias) if torch.is_grad_enabled() else None
    correction = linear(_gated(linear(x, lora_a), gate), lora_b)
    return torch.add(linear(x, weight, bias) if base is None else base, correction, alpha=scaling)


def library_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias by PyTorch, which takes no bias of another dtype than x."""
    if library_reads_past_rows(x, weight.shape[1]):
        rows = unit_columns(as_rows(x))
        y = torch.ops.lowrank_kernels.frozen_linear(rows, unit_columns(weight), vector(bias))
        return like_rows_of(x, y)
    return linear(x, weight, None if bias is None else _in_dtype_of(x, bias))


def library_grad(grad_y: Tensor, weight: Tensor) -> Tensor:
    """dY W by PyTorch."""
    if library_reads_past_rows(grad_y, weight.shape[0]):
        return library_linear(grad_y, weight.T.contiguous(), None)
    return grad_y @ weight


def library_reads_past_rows(x: Tensor, inner: int) -> bool:
    """True where PyTorch's product of x must not be used: see :func:`_reads_past_rows`."""
    return _reads_past_rows(x.dtype, x.device.type, inner)


def _reads_past_rows(dtype: torch.dtype, device_type: str, inner: int) -> bool:
    """True where oneDNN reads an element beyond each row and multiplies it by zero: NaN, if that is no number.

    It does so in bfloat16 with an odd inner size on processors with AMX (torch 2.14.1).
    """
    return inner % 2 == 1 and dtype == torch.bfloat16 and device_type == "cpu" and _has_amx()


@cache
def _has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


def _in_dtype_of(x: Tensor, other: Tensor) -> Tensor:
    return other if other.dtype is x.dtype else other.to(x.dtype)  # Tensor.to costs microseconds to do nothing


def own_grad_product(grad_y: Tensor, weight: Tensor, op: str = "lora_linear") -> bool:
    """The same for dY W, the gradient of x."""
    if weight.stride(1) != 1:
        return False
    if library_reads_past_rows(grad_y, weight.shape[0]):
        return True
    chosen = tuned.choice(f"{op}_backward", grad_y, tuned.product_sizes, grad_y.shape, weight.shape)
    if chosen in ("own_product", "library_product"):
        return chosen == "own_product"
    n, k = weight.shape
    dtype, rows = grad_y.dtype, grad_y.numel() // max(1, n)
    return _within(_OWN_GRAD_ROWS, dtype, rows) or (k <= n and _within(_OWN_MANY_ROWS, dtype, rows))


def _within(tokens: dict[tuple[str, torch.dtype], tuple[int, int]], dtype: torch.dtype, rows: int) -> bool:
    least, most = tokens.get((_extension.cpu_isa() or "", dtype), (1, 0))
    return least <= rows <= most


def _gated(p: Tensor, gate: Tensor | None) -> Tensor:
    return p if gate is None else (p * gate).to(p.dtype)


def cpu_down(x: Tensor, factor: Tensor, rank_last: bool, dropout_p: float, dropout_seed: Tensor | None) -> Tensor:
    """drop(x) Aᵀ, or with ``rank_last`` x B: (M, R) in x's dtype."""
    if _library_is_faster(x, x.shape[1], dropout_p):
        return x @ (factor if rank_last else factor.T).to(x.dtype)
    return torch.ops.lowrank_kernels.lora_down(x, factor, rank_last, dropout_seed, dropout_p)


def cpu_up_(
    y: Tensor, p: Tensor, factor: Tensor, rank_last: bool, gate: Tensor | None, scaling: float,
    dropout_p: float, dropout_seed: Tensor | None,
) -> None:  # fmt: skip
    """y += drop'(s (p ∘ gate) factor), in place."""
    if _library_is_faster(y, p.shape[1], dropout_p):
        y.addmm_(_gated(p, gate), (factor.T if rank_last else factor).to(y.dtype), alpha=scaling)
    else:
        torch.ops.lowrank_kernels.lora_up_(y, p, factor, rank_last, gate, scaling, dropout_seed, dropout_p)


def cpu_grad(
    big: Tensor, p: Tensor, gate: Tensor | None, scaling: float, rank_last: bool,
    dropout_p: float, dropout_seed: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """s (p ∘ gate)ᵀ drop(big): (R, C), or with ``rank_last`` its transpose."""
    if _library_is_faster(big, big.shape[0], dropout_p) and dtype == big.dtype and not rank_last:
        return torch.mm(_gated(p, gate).T, big).mul_(scaling)
    return torch.ops.lowrank_kernels.lora_grad(big, p, gate, scaling, rank_last, dropout_seed, dropout_p, dtype)


def _cpu_forward(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, gate: Tensor | None,
    scaling: float, dropout_p: float, dropout_seed: Tensor | None, save_p: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The main product is the library's; the thin ones are whoever's is faster, and dropout is the extension's."""
    if own_product(x, weight):
        if dropout_p == 0.0 and not save_p:
            return lora_linear_inference(x, weight, lora_a, lora_b, bias, gate, scaling), None
        y, p, _ = torch.ops.lowrank_kernels.lora_linear_fused(
            x, weight, lora_a, lora_b, bias, gate, scaling, dropout_seed, dropout_p, None, False
        )
        return y, p
    p = cpu_down(x, lora_a, False, dropout_p, dropout_seed)
    y = library_linear(x, weight, bias)
    cpu_up_(y, p, lora_b, True, gate, scaling, 0.0, None)
    return y, p


def _cpu_backward(
    grad_y: Tensor, x: Tensor | None, weight: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor | None,
    p: Tensor | None, scaling: float, dropout_p: float, dropout_seed: Tensor | None,
    needs: tuple[bool, bool, bool], need_q: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    need_x, need_a, need_b = needs
    q = grad_x = grad_a = grad_b = None
    if need_x or need_a or need_q:
        if need_b:
            q, grad_b = torch.ops.lowrank_kernels.lora_down_grad(grad_y, lora_b, p, gate, scaling, lora_b.dtype)
        else:
            q = cpu_down(grad_y, lora_b, True, 0.0, None)
    elif need_b:
        assert p is not None
        grad_b = cpu_grad(grad_y, p, gate, scaling, True, 0.0, None, lora_b.dtype)
    if need_x:
        assert q is not None
        if own_grad_product(grad_y, weight):
            grad_x = torch.ops.lowrank_kernels.lora_grad_x(
                grad_y, q, weight, lora_a, gate, scaling, dropout_seed, dropout_p
            )
        else:
            grad_x = library_grad(grad_y, weight)
            cpu_up_(grad_x, q, lora_a, False, gate, scaling, dropout_p, dropout_seed)
    if need_a:
        assert q is not None and x is not None
        grad_a = cpu_grad(x, q, gate, scaling, False, dropout_p, dropout_seed, lora_a.dtype)
    return grad_x, grad_a, grad_b, q


# ------------------------------------------------------------------------------------------- registration with torch


def rows_in(x: Tensor) -> int:
    """M of x (..., K), from sizes that may be symbolic."""
    return math.prod(x.shape[:-1])


def _forward_fake(x, weight, lora_a, lora_b, bias, gate, scaling, dropout_p, dropout_seed, save_p, backend):  # type: ignore[no-untyped-def]
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, x.new_empty(rows_in(x), lora_a.shape[0]) if save_p else x.new_empty(0)


def _backward_fake(grad_y, x, weight, lora_a, lora_b, gate, p, scaling, dropout_p, dropout_seed, needs, backend):  # type: ignore[no-untyped-def]
    n, k = weight.shape
    shapes = (
        grad_y.new_empty(*grad_y.shape[:-1], k), torch.empty_like(lora_a, memory_format=torch.contiguous_format),
        torch.empty_like(lora_b, memory_format=torch.contiguous_format), grad_y.new_empty(n),
        grad_y.new_empty(0) if gate is None else torch.empty_like(gate),
    )  # fmt: skip
    return tuple(shape if need else grad_y.new_empty(0) for shape, need in zip(shapes, needs, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, lora_a, lora_b, bias, gate, scaling, dropout_p, dropout_seed, save_p, backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    need_a = lora_a.requires_grad
    ctx.save_for_backward(
        x if need_a else None, weight, lora_a, lora_b, gate, output[1] if save_p else None, dropout_seed
    )
    ctx.scaling, ctx.dropout_p, ctx.backend = scaling, dropout_p, backend
    ctx.bias_dtype = None if bias is None else bias.dtype


def _autograd_backward(ctx: Any, grad_y: Tensor | None, grad_p: None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 11
    x, weight, lora_a, lora_b, gate, p, seed = ctx.saved_tensors
    need_x, _, need_a, need_b, need_bias, need_gate = ctx.needs_input_grad[:6]
    needs = (need_x, need_a, need_b, need_bias, need_gate)
    grads = _call_backward(
        grad_y, x, weight, lora_a, lora_b, gate, p, ctx.scaling, ctx.dropout_p, seed, needs, ctx.backend
    )
    grad_x, grad_a, grad_b, grad_bias, grad_gate = (g if need else None for g, need in zip(grads, needs, strict=True))
    if grad_bias is not None:
        grad_bias = grad_bias.to(ctx.bias_dtype)
    return grad_x, None, grad_a, grad_b, grad_bias, grad_gate, None, None, None, None, None


def _autocast(dtype: torch.dtype, x, weight, lora_a, lora_b, bias, *rest):  # type: ignore[no-untyped-def]
    # Factors keep their dtype: the kernels round them, without a copy in memory.
    x, weight, bias = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, weight, bias))
    return x, weight, lora_a, lora_b, bias, *rest


call_lora_linear = define(
    _FORWARD, _forward, _forward_fake, setup_context=_setup_context, backward=_autograd_backward, autocast=_autocast
)
_call_backward = define(_BACKWARD, _backward, _backward_fake, **no_double_backward("lora_linear"))
