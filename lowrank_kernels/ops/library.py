"""How an op of this package is registered with torch: one call an op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

NAMESPACE = "lowrank_kernels"
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    autocast: Callable[..., tuple[Any, ...]] = lambda dtype, *args: args,
) -> Callable[..., Any]:
    """Define ``lowrank_kernels::<schema>`` with one implementation for every device, a fake, and autograd.

    Args:
        schema: torch schema with the op's name and no namespace.
        implementation: chooses its backend itself; never sees tensors that record gradients.
        fake: shapes, dtypes and layouts of the results, from metadata alone.
        setup_context, backward: as those of ``torch.autograd.Function``; backward runs ops, or raises
            (:func:`no_double_backward`). Autocast is off in both.
        autocast: ``autocast(dtype, *args)`` casts the arguments where autocast is on. The op itself always runs
            without it: what it computes, its own code casts.

    Returns:
        The op, called past torch's dispatcher where nobody listens there. Its arguments are all positional.
    """
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default

    _library.impl(name, _above_autograd(name, op, setup_context, backward), "Autograd")
    direct = _above_autograd(name, implementation, setup_context, backward)
    _register_autocast(name, op, autocast)

    def call(*args: Any) -> Any:
        # Each way through the dispatcher carries all arguments to C++ and back: 50 microseconds on cold caches.
        # dY may be a batch of them (is_grads_batched) that looks like a plain tensor: the dispatcher knows what to do.
        if unobserved(args) and not _is_batched(args[0]):
            return direct(*args)
        _refuse_shards(name, args)
        return op(*args)

    return call


def _above_autograd(
    name: str, below: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """``below`` with autograd above it.

    Does what ``torch.library.register_autograd`` does, for ops whose arguments are all positional and without default:
    at 16 tokens its bookkeeping cost as much as the correction itself (30 microseconds a call on a CPU).
    """

    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = below(*args)
        if ctx is not None:
            setup_context(ctx, args, output)
        return output

    def without_autocast(ctx: Any, *grads: Any) -> Any:
        # The gradients of a forward have its dtypes, wherever backward is called.
        if not torch._C._is_any_autocast_enabled():
            return backward(ctx, *grads)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return backward(ctx, *grads)

    function: Any = type(
        name,
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(without_autocast)},
    )

    def kernel(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args)
        return forward(None, *args)

    return kernel


_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def transformed() -> bool:
    """True inside a torch.func transform (grad, vjp, jvp, vmap, ...) or a level of forward-mode differentiation.

    The public functions then compute the plain formula, whose derivatives of every kind PyTorch knows.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    if any(isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args):
        raise RuntimeError(
            f"{name}: the kernels have no forward-mode derivative; call the public function inside the dual level, "
            f"which then computes the plain formula"
        )


def _refuse_shards(name: str, args: tuple[Any, ...]) -> None:
    if any(isinstance(a, Tensor) and hasattr(a, "device_mesh") for a in args):
        raise TypeError(
            f"{name}: expected plain tensors, got a DTensor, for which there is no sharding rule; give each rank's own "
            f"part (to_local()), or the whole (full_tensor())"
        )


def unobserved(args: tuple[Any, ...]) -> bool:
    """Whether torch would do nothing with a call but hand it on: plain tensors, no mode, no profiler, no compiler."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._is_any_autocast_enabled()
        or torch.autograd._profiler_enabled()
    ):
        return False
    for a in args:
        kind = type(a)
        if kind is Tensor or kind is torch.nn.Parameter:
            if not (a.is_cpu or a.is_cuda):
                return False
        elif kind not in _NO_TENSOR and isinstance(a, Tensor):
            return False
    return True


_NO_TENSOR = frozenset((type(None), bool, int, float, str))


def define_in_place(schema: str, implementation: Callable[..., None]) -> Callable[..., None]:
    """Define an op that changes arguments and returns nothing, for every device; it records no gradients.

    The version counters of the changed arguments are raised, as by any in-place operation of torch. Autocast is off
    inside.

    Returns:
        The op, called past torch's dispatcher where nobody listens there. Its arguments are all positional.
    """
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    written = [
        i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write
    ]  # fmt: skip

    def kernel(*args: Any) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            implementation(*args)
        changed = [args[i] for i in written if args[i] is not None and not args[i].is_inference()]
        torch.autograd.graph.increment_version(changed)  # kernels write without torch's knowing

    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *args: None, lib=_library)
    _register_autocast(name, op, lambda dtype, *args: args)

    def call(*args: Any) -> None:
        if transformed():
            raise RuntimeError(
                f"{name}: it changes its arguments in place and has no derivative; call it outside of torch.func "
                f"transforms and of forward-mode differentiation"
            )
        (kernel if unobserved(args) else op)(*args)

    return call


def no_double_backward(public_name: str) -> dict[str, Callable[..., Any]]:
    """Autograd of a backward op: differentiating it says so, in the name that the user called."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{public_name}: gradients of gradients are not implemented; "
            f"compute them through the plain formula, lowrank_kernels.reference.{public_name}_ref"
        )

    return {"setup_context": lambda ctx, inputs, output: None, "backward": backward}


def _register_autocast(name: str, op: Any, cast: Callable[..., tuple[Any, ...]]) -> None:
    """Run ``cast(dtype, *args)`` on the arguments wherever autocast is on, then the op without autocast."""
    for device_type in ("cpu", "cuda"):
        key = "Autocast" + device_type.upper()

        def kernel(*args: Any, _device: str = device_type) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
                return op(*cast(torch.get_autocast_dtype(_device), *args))

        _library.impl(name, kernel, key)
