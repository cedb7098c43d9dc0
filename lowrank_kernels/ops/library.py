"""How an op of this package is registered with torch: one record of arguments, one record of results, one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..weights import unpacked

NAMESPACE = "lowrank_kernels"
Written = Tensor
"""A tensor argument that the op changes in place."""
SymInt = int
"""A size, which torch.compile may trace as a symbol; where ``int`` is a constant of the trace."""
_SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Weight": "Tensor",
    "Tensor | None": "Tensor?",
    "float": "float",
    "bool": "bool",
    "int": "int",
    "SymInt": "SymInt",
    "str": "str",
    "torch.dtype": "ScalarType",
    "tuple[bool, ...]": "bool[]",
    "Sequence[int] | None": "int[]?",
}
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def kinds_of(record: Any) -> dict[str, str]:
    """The fields of a NamedTuple and their annotations, as they are written."""
    return {field: kind.__forward_arg__ for field, kind in record.__annotations__.items()}


def schema_of(name: str, record: type, results: int) -> str:
    """The torch schema of an op whose arguments are the fields of a NamedTuple, in order, and which returns tensors.

    A field with a default may be left out, and is None then.

    A ``Weight`` that is no dense tensor is carried by its parts: the first in the weight's place, the rest at the end.
    """
    arguments = []
    letters = iter("abcdefgh")
    for field, annotation in kinds_of(record).items():
        kind = f"Tensor({next(letters)}!)" if annotation == "Written" else _SCHEMA_TYPES[annotation]
        arguments.append(f"{kind} {field}" + "=None" * (field in record._field_defaults))  # type: ignore[attr-defined]
    if "Weight" in kinds_of(record).values():
        arguments += ["Tensor[]? weight_parts=None", "str weight_format=''"]
    returned = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"
    return f"{name}({', '.join(arguments)}) -> {returned}"


class _Carried:
    """A record as the dispatcher carries it: tensors, numbers and strings alone."""

    def __init__(self, record: Any) -> None:
        self.record, self.size = record, len(record._fields)
        places = [i for i, kind in enumerate(kinds_of(record).values()) if kind == "Weight"]
        self.place = places[0] if places else None

    def arguments(self, call: Any) -> tuple[Any, ...]:
        if self.place is None or isinstance(call[self.place], Tensor):
            return tuple(call)
        weight = call[self.place]
        first, *rest = weight.parts()
        values = [first if i == self.place else value for i, value in enumerate(call)]
        return *values, rest, f"{weight.format} {weight.settings()}"

    def call(self, *args: Any) -> Any:
        call = self.record(*args[: self.size])
        if self.place is None or len(args) <= self.size or not args[-1]:
            return call
        return call._replace(weight=unpacked(args[-1], [call[self.place], *args[self.size]]))


class Op:
    """An op: called with its record, past torch's dispatcher where nobody listens there.

    Each way through the dispatcher carries all arguments to C++ and back: 50 microseconds on cold caches.
    """

    def __init__(self, name: str, direct: Callable[..., Any], dispatched: Callable[..., Any]) -> None:
        self.name, self.direct, self.dispatched = name, direct, dispatched

    def __call__(self, call: Any, plan: Any = None, *, unseen: bool | None = None) -> Any:
        """The results of a call.

        Args:
            call: the op's record.
            plan: what was planned for such a call, where that is known.
            unseen: ``unobserved(call)``, where that is known.
        """
        # dY may be a batch of them (is_grads_batched) that looks like a plain tensor: the dispatcher knows what to do.
        first = call[0]
        if (unobserved(call) if unseen is None else unseen) and not (isinstance(first, Tensor) and _is_batched(first)):
            return self.direct(call, plan)
        return self.dispatched(_for_shards(self.name, call))


def define(
    name: str,
    record: Any,
    results: Any,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    save: Callable[..., None] | None = None,
    backward: Callable[..., tuple[Tensor | None, ...]] | None = None,
    autocast: Callable[[torch.dtype, Any], Any] | None = None,
    first_alone: bool = False,
) -> Op:
    """Define ``lowrank_kernels::<name>`` with one implementation for every device, a fake, and autograd.

    Args:
        record: NamedTuple of the arguments; the op's schema is made from its annotations.
        results: NamedTuple of tensors, or None for one tensor.
        implementation: ``implementation(call, plan)``, where ``plan`` may be None; never sees tensors that record
            gradients. It returns None for what is not wanted, which the dispatcher carries as an empty tensor.
        fake: ``fake(call)``: shapes, dtypes and layouts of the results, from metadata alone.
        save, backward: as those of ``torch.autograd.Function``, ``save(ctx, call, results)``; the first gradient is of
            the plan, and None. Autocast is off in both. Without them, differentiating the op raises.
        autocast: ``autocast(dtype, call)`` casts the arguments where autocast is on. The op itself always runs without
            it: what it computes, its own code casts.
        first_alone: a call that records gradients returns the first result alone; the others are for its backward.
    """
    carried = _Carried(record)
    if save is None or backward is None:
        save, backward = _no_double_backward(name).values()
    _library.define(
        schema_of(name, record, 1 if results is None else len(results._fields)),
        tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
    )

    def filled(*args: Any) -> Any:
        found = implementation(carried.call(*args), None)
        if results is None:
            return found
        return tuple(args[0].new_empty(0) if t is None else t for t in found)

    _library.impl(name, filled, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *args: fake(carried.call(*args)), lib=_library)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default

    def dispatched(call: Any) -> Any:
        found = op(*carried.arguments(call))
        return found if results is None else results(*found)

    def without_autocast(ctx: Any, *grads: Any) -> Any:
        # The gradients of a forward have its dtypes, wherever backward is called.
        if not torch._C._is_any_autocast_enabled():
            return backward(ctx, *grads)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return backward(ctx, *grads)

    def function_over(below: Callable[..., Any], *, alone: bool) -> Any:
        """An autograd function around ``below(call, plan)``; ``alone``: of its results, the first is returned.

        Does what ``torch.library.register_autograd`` does, for ops whose arguments are all positional and without
        default: at 16 tokens its bookkeeping cost as much as the correction itself (30 microseconds a call on a CPU).
        """

        def forward(ctx: Any, plan: Any, *args: Any) -> Any:
            call = record(*args)
            with torch._C._AutoDispatchBelowAutograd():
                found = below(call, plan)
            save(ctx, call, found)
            return found[0] if alone else found

        members = {"forward": staticmethod(forward), "backward": staticmethod(without_autocast)}
        function: Any = type(name, (torch.autograd.Function,), members)
        return function

    first_alone = first_alone and results is not None
    dispatched_function = function_over(lambda call, plan: dispatched(call), alone=False)
    direct_function = function_over(implementation, alone=first_alone)

    def above_autograd(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return dispatched_function.apply(None, *carried.call(*args))
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    def direct(call: Any, plan: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*call):
            found = direct_function.apply(plan, *call)
            return (found,) if first_alone else found if results is None else results(*found)
        with torch._C._AutoDispatchBelowAutograd():
            return implementation(call, plan)

    _library.impl(name, above_autograd, "Autograd")

    def cast(dtype: torch.dtype, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args if autocast is None else carried.arguments(autocast(dtype, carried.call(*args)))

    _register_autocast(name, op, cast)
    return Op(name, direct, dispatched)


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


def traced() -> bool:
    """True where operands have no plan: dynamo traces the call, or a transform does. They are checked at each call."""
    return torch.compiler.is_dynamo_compiling() or transformed()


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    if any(isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args):
        raise RuntimeError(
            f"{name}: the kernels have no forward-mode derivative; call the public function inside the dual level, "
            f"which then computes the plain formula"
        )


def _for_shards(name: str, call: Any) -> Any:
    """The call, once DTensors in it are known to have sharding rules (``ops/sharding.py``), with one dropout seed."""
    sharded: Any = next((a for a in call if isinstance(a, Tensor) and hasattr(a, "device_mesh")), None)
    if sharded is None:
        return call
    from .sharding import ready, same_seed

    if not ready(name.removesuffix("_backward")):
        raise TypeError(
            f"{name}: expected plain tensors, got a DTensor, for which there is no sharding rule; give each rank's own "
            f"part (to_local()), or the whole (full_tensor())"
        )
    seed = getattr(call, "dropout_seed", None)
    if seed is not None and not hasattr(seed, "device_mesh"):
        call = call._replace(dropout_seed=same_seed(seed, sharded))
    tensors = {field: a for field, a in zip(call._fields, call, strict=True) if isinstance(a, Tensor)}
    plain = [field for field, a in tensors.items() if not hasattr(a, "device_mesh")]
    if plain or (hasattr(call, "weight") and not isinstance(call.weight, Tensor)):
        what = f"a plain tensor for {plain[0]}" if plain else f"a weight stored as {call.weight.format}"
        raise TypeError(
            f"{name}: expected DTensors throughout where one operand is a DTensor, got {what}; distribute all of them "
            f"over the same mesh"
        )
    return call


def unobserved(args: tuple[Any, ...]) -> bool:
    """True where torch would do nothing with a call but hand it on: plain tensors, and :func:`unseen`."""
    if not unseen():
        return False
    for a in args:
        kind = type(a)
        if kind is Tensor or kind is _Parameter:
            if not (a.is_cpu or a.is_cuda):
                return False
        elif kind not in _NO_TENSOR and isinstance(a, Tensor):
            return False
    return True


def unseen() -> bool:
    """True where no dispatch mode, functorch transform, autocast, profiler or compiler is active."""
    return not (
        torch.compiler.is_dynamo_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _transforms()
        or forward_ad._current_level >= 0
        or _autocast()
        or _profiler()
    )


_Parameter = torch.nn.Parameter
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transforms, _autocast = torch._C._are_functorch_transforms_active, torch._C._is_any_autocast_enabled
_profiler = torch.autograd._profiler_enabled
_NO_TENSOR = frozenset((type(None), bool, int, float, str))


def define_in_place(name: str, record: Any, implementation: Callable[..., None]) -> Callable[..., None]:
    """Define an op that changes its ``Written`` arguments and returns nothing, for every device; it has no gradient.

    The version counters of the changed arguments are raised, as by any in-place operation of torch. Autocast is off
    inside.

    Returns:
        ``call(record, plan=None)``, past torch's dispatcher where nobody listens there.
    """
    schema = schema_of(name, record, 1).removesuffix("Tensor") + "()"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    written = [i for i, kind in enumerate(kinds_of(record).values()) if kind == "Written"]

    def direct(call: Any, plan: Any = None) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            implementation(call, plan)
        changed = [call[i] for i in written if not call[i].is_inference()]
        torch.autograd.graph.increment_version(changed)  # kernels write without torch's knowing

    _library.impl(name, lambda *args: direct(record(*args)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *args: None, lib=_library)
    _register_autocast(name, op, lambda dtype, args: args)

    def call_op(call: Any, plan: Any = None) -> None:
        if transformed():
            raise RuntimeError(
                f"{name}: it changes its arguments in place and has no derivative; call it outside of torch.func "
                f"transforms and of forward-mode differentiation"
            )
        if unobserved(call):
            direct(call, plan)
        else:
            op(*call)

    return call_op


def define_trained(
    name: str,
    record: Any,
    results: Any,
    backward: Any,
    gradients: Any,
    *,
    forward: tuple[Callable[..., Any], Callable[..., Any]],
    backwards: tuple[Callable[..., Any], Callable[..., Any]],
    keep: Callable[[Any, Any], dict[str, Any]],
    ahead: Callable[[dict[str, Any]], None] | None = None,
    autocast: Callable[[torch.dtype, Any], Any],
) -> Op:
    """Define an op whose gradients are made by an op of its own, ``<name>_backward``. See :func:`define`.

    Args:
        backward: NamedTuple of the backward's arguments: ``grad_y``; ``needs``, which of the gradients are wanted; and
            fields of the results or of the record by their names, which are kept for it. ``NAME_dtype`` is the dtype
            of the argument NAME.
        gradients: NamedTuple of gradients, by the names of their arguments. They are cast to the arguments' dtypes.
        forward, backwards: (implementation, fake) of the op and of its backward.
        keep: ``keep(call, results)`` gives what is kept in place of such fields, None for what is not needed.
        ahead: called ahead of the backward with all that is kept, and what ``keep`` gave as "ahead".
    """
    refused: dict[str, Any] = {**_no_double_backward(name)}
    call_backward = define(f"{name}_backward", backward, gradients, *backwards, **refused)
    kept = [field for field in backward._fields if field not in ("grad_y", "needs")] + ["ahead"] * (ahead is not None)
    trained = [record._fields.index(field) for field in gradients._fields]
    needs_at, size = backward._fields.index("needs") - 1, len(record._fields)

    def value_of(field: str, call: Any, found: Any) -> Any:
        value = getattr(found, field, None)
        if value is not None or hasattr(call, field):
            return getattr(call, field) if value is None else value
        of = getattr(call, field.removesuffix("_dtype"), None)
        return None if of is None else of.dtype

    def save(ctx: Any, call: Any, found: Any) -> None:
        ctx.set_materialize_grads(False)
        if results is None:
            found = (found,)
        ctx.mark_non_differentiable(*[t for t in found[1:] if t is not None])
        instead = keep(call, found)
        values = [instead[field] if field in instead else value_of(field, call, found) for field in kept]
        ctx.save_for_backward(*[value if isinstance(value, Tensor) else None for value in values])
        ctx.others = [None if isinstance(value, Tensor) else value for value in values]
        ctx.dtypes = [None if call[i] is None else call[i].dtype for i in trained]

    def backward_of(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        out: list[Tensor | None] = [None] * (size + 1)
        if grad_y is None:
            return tuple(out)
        values = [other if t is None else t for t, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
        if ahead is not None:
            ahead(dict(zip(kept, values, strict=True)))
            values.pop()
        need = ctx.needs_input_grad  # of the plan, and then of the record's fields
        needs = tuple([need[i + 1] for i in trained])
        found = call_backward(backward(grad_y, *values[:needs_at], needs, *values[needs_at:]))
        for i, grad, wanted, dtype in zip(trained, found, needs, ctx.dtypes, strict=True):
            if wanted:
                out[i + 1] = grad if grad.dtype is dtype else grad.to(dtype)
        return tuple(out)

    ours: dict[str, Any] = {"save": save, "backward": backward_of, "autocast": autocast}
    return define(name, record, results, *forward, **ours, first_alone=True)


def _no_double_backward(public_name: str) -> dict[str, Callable[..., Any]]:
    """Autograd of a backward op: differentiating it raises, in the name of the function that the user called."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{public_name}: gradients of gradients are not implemented; "
            f"compute them through the plain formula, lowrank_kernels.reference.{public_name}_ref"
        )

    return {"save": lambda ctx, call, results: None, "backward": backward}


def _register_autocast(name: str, op: Any, cast: Callable[..., tuple[Any, ...]]) -> None:
    """Run ``cast(dtype, args)`` on the arguments wherever autocast is on, then the op without autocast."""
    for device_type in ("cpu", "cuda"):
        key = "Autocast" + device_type.upper()

        def kernel(*args: Any, _device: str = device_type) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
                return op(*cast(torch.get_autocast_dtype(_device), args))

        _library.impl(name, kernel, key)
