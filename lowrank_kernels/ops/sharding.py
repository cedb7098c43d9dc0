"""How ops shard: for operands that are DTensors, which placements give which results without moving anything.

Imported where an op first meets a DTensor: ``torch.distributed.tensor`` takes half a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._op_schema import OpSchema, OpStrategy, RuntimeSchemaInfo
from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy

from .dora import (
    DoRALinear,
    DoRALinearBackward,
    DoRALinearGradients,
    DoRALinearResults,
    DoRAWeightNorm,
    DoRAWeightNormResults,
    call_dora_weight_norm,
)
from .frozen import FrozenLinear, FrozenLinearBackward, FrozenLinearGradients
from .library import NAMESPACE, kinds_of
from .lora import (
    LoRALinear,
    LoRALinearBackward,
    LoRALinearGradients,
    LoRALinearResults,
)

SUM = "sum"
"""Of a tensor: each rank holds a summand (``Partial``)."""


class Rule(NamedTuple):
    """One way to compute an op on the parts of one mesh dimension.

    Attributes:
        operands, results: by name, the dimension that is cut (-1: the last), or ``SUM``; what is not named is whole on
            every rank.
        fits: whether it is right for a call; None: for all.
    """

    operands: Mapping[str, int | str] = {}
    results: Mapping[str, int | str] = {}
    fits: Callable[[Any], bool] | None = None


def _undropped(call: Any) -> bool:
    """Rows and columns of x may be cut: dropout's mask is a function of their numbers, which each part counts anew."""
    return bool(call.dropout_p == 0.0)


def _given_norm(call: Any) -> bool:
    return _undropped(call) and call.norm is not None


def _through_given_norm(call: Any) -> bool:
    return _undropped(call) and bool(call.detach_norm)  # else the norm's part takes all of dm


WHOLE = Rule()
_ROWS_LORA = {"lora_a": SUM, "lora_b": SUM, "bias": SUM}
_RULES: dict[str, tuple[Any, Any, list[Rule]]] = {
    "frozen_linear": (
        FrozenLinear,
        ("y",),
        [
            Rule({"x": 0}, {"y": 0}),
            Rule({"weight": 0, "bias": 0}, {"y": -1}),
            Rule({"x": -1, "weight": 1, "bias": SUM}, {"y": SUM}),
        ],
    ),
    "frozen_linear_backward": (
        FrozenLinearBackward,
        FrozenLinearGradients._fields,
        [
            Rule({"grad_y": 0}, {"x": 0, "bias": SUM}),
            Rule({"grad_y": -1, "weight": 0}, {"x": SUM, "bias": 0}),
            Rule({"weight": 1}, {"x": -1}),
        ],
    ),
    "lora_linear": (
        LoRALinear,
        LoRALinearResults._fields,
        [
            Rule({"x": 0}, {"y": 0, "p": 0, "z": 0}, _undropped),
            Rule({"weight": 0, "lora_b": 0, "bias": 0}, {"y": -1}),
            Rule(
                {"x": -1, "weight": 1, "lora_a": 1, "bias": SUM},
                {"y": SUM, "p": SUM},
                lambda call: _undropped(call) and call.velora_vector is None,
            ),
        ],
    ),
    "lora_linear_backward": (
        LoRALinearBackward,
        LoRALinearGradients._fields,
        [
            Rule({"grad_y": 0, "x": 0, "p": 0, "z": 0}, {"x": 0, **_ROWS_LORA, "gate": SUM}, _undropped),
            Rule(
                {"grad_y": -1, "weight": 0, "lora_b": 0},
                {"x": SUM, "lora_a": SUM, "lora_b": 0, "bias": 0, "gate": SUM},
            ),
            # P stays cut into summands: dB is linear in it.
            Rule(
                {"x": -1, "weight": 1, "lora_a": 1, "p": SUM},
                {"x": -1, "lora_a": 1, "lora_b": SUM, "gate": SUM},
                lambda call: _undropped(call) and call.z is None,
            ),
        ],
    ),
    "dora_weight_norm": (
        DoRAWeightNorm,
        DoRAWeightNormResults._fields,
        [
            Rule(
                {"weight": 0, "lora_b": 0, "weight_sq_norm": 0, "magnitude": 0},
                {"norm": 0, "sq_norm": 0, "column_scale": 0},
            )
        ],
    ),
    "dora_linear": (
        DoRALinear,
        DoRALinearResults._fields,
        [
            Rule({"x": 0}, {"y": 0, "p": 0, "u": 0}, _undropped),
            Rule(
                dict.fromkeys(("weight", "lora_b", "magnitude", "weight_sq_norm", "norm", "column_scale", "bias"), 0),
                {"y": -1, "u": 1, "norm": 0, "column_scale": 0},
            ),
            Rule(
                {"x": -1, "weight": 1, "lora_a": 1, "bias": SUM},
                {"y": SUM, "p": SUM, "u": SUM},
                _given_norm,
            ),
        ],
    ),
    "dora_linear_backward": (
        DoRALinearBackward,
        DoRALinearGradients._fields,
        [
            Rule({"grad_y": 0, "x": 0, "p": 0, "u": 0}, {"x": 0, **_ROWS_LORA, "magnitude": SUM}, _undropped),
            Rule(
                {"grad_y": -1, "weight": 0, "lora_b": 0, "norm": 0, "column_scale": 0, "u": 1},
                {"x": SUM, "lora_a": SUM, "lora_b": 0, "magnitude": 0, "bias": 0},
            ),
            Rule(
                {"x": -1, "weight": 1, "lora_a": 1, "p": SUM, "u": SUM},
                {"x": -1, "lora_a": 1, "lora_b": SUM, "magnitude": SUM},
                _through_given_norm,
            ),
        ],
    ),
}
_registered: set[str] = set()


def ready(name: str) -> bool:
    """Register the rules of an op and of its backward; False where it has none."""
    if name not in _RULES:
        return False
    for op in (name, f"{name}_backward"):
        if op in _RULES and op not in _registered:
            _register(op)
            _registered.add(op)
    return True


def _register(name: str) -> None:
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    record, _, _ = _RULES[name]
    first_number = min(i for i, kind in enumerate(kinds_of(record).values()) if kind not in _TENSORS)
    # Everything from the first number on is told apart: a rule that is right for one switch may be wrong for another.
    info = RuntimeSchemaInfo(static_argnum=first_number, needs_pytree=True)
    DTensor._op_dispatcher.sharding_propagator.register_op_strategy(op, partial(_strategy, name), info)


_TENSORS = ("Tensor", "Weight", "Tensor | None")


def _strategy(name: str, schema: OpSchema) -> Any:
    record, results, rules = _RULES[name]
    given = [a.strategies[0].output_spec if isinstance(a, OpStrategy) else a for a in schema.args_schema]
    call = record(*given[: len(record._fields)])
    wanted = dict(zip(results, _wanted(name, call, results), strict=True))
    lines = []
    for rule in [WHOLE, *rules]:
        if rule.fits is not None and not rule.fits(call):
            continue
        found: list[Placement | None] = [
            _placement(rule.results.get(r), call[0].ndim) if wanted[r] else Replicate() for r in results
        ]
        for field, kind in kinds_of(record).items():
            value = getattr(call, field)
            if kind in _TENSORS and value is not None:
                found.append(_placement(rule.operands.get(field), value.ndim))
            else:
                found.append(None)
        lines.append(found + [None] * (len(given) - len(record._fields)))
    return expand_to_full_mesh_op_strategy(
        schema.get_mesh_from_args(), schema, lines, input_index=len(results), inplace_op=False
    )


def _wanted(name: str, call: Any, results: tuple[str, ...]) -> tuple[bool, ...]:
    """Which results are there: the others are empty tensors."""
    needs: tuple[bool, ...] = getattr(call, "needs", (True,) * len(results))
    return tuple(needs)


def _placement(cut: int | str | None, ndim: int) -> Placement:
    if cut is None:
        return Replicate()
    return Partial() if cut == SUM else Shard(int(cut) % ndim)


def with_norm(call: DoRALinear) -> DoRALinear:
    """The call with n and g where W is cut along K, so that no rank has whole rows; as it is elsewhere.

    n_i² is the sum over ranks of ‖W_i + s B_i A‖² of their columns: one all-reduce of N numbers.
    """
    weight: Any = call.weight
    if call.norm is not None or not isinstance(weight, DTensor) or not any(p.is_shard(1) for p in weight.placements):
        return call
    mesh = weight.device_mesh
    rows = [p if p.is_shard(0) else Replicate() for p in weight.placements]
    columns = [p if p.is_shard(1) else Replicate() for p in weight.placements]
    parts = weight, _placed(call.lora_a, mesh, columns), _placed(call.lora_b, mesh, rows)
    with torch.no_grad():
        w, a, b = (t.to_local() for t in parts)
        own: Tensor = call_dora_weight_norm(DoRAWeightNorm(w, a, b, call.scaling, None, None, call.backend))[0]
        summands = [Partial() if p.is_shard(1) else p for p in weight.placements]
        shape, stride = weight.shape[:1], (1,)
        squares = DTensor.from_local(own.square(), mesh, summands, run_check=False, shape=shape, stride=stride)
        norm = squares.redistribute(placements=rows).sqrt()
        magnitude = _placed(call.magnitude, mesh, rows).to(norm.dtype)
        scale = torch.where(norm == 0, torch.zeros_like(norm), magnitude / norm)
    return call._replace(norm=norm, column_scale=scale, weight_sq_norm=None)


def _placed(t: Any, mesh: Any, placements: Any) -> DTensor:
    if not isinstance(t, DTensor):
        raise TypeError(
            f"dora_linear: expected DTensors throughout, got a plain tensor of shape {tuple(t.shape)} beside a sharded "
            f"weight; distribute it over the same mesh"
        )
    whole: Any = t.detach()
    placed: DTensor = whole.redistribute(mesh, placements)
    return placed


def same_seed(seed: Tensor, like: DTensor) -> DTensor:
    """Rank 0's seed, for all ranks of the mesh."""
    mesh = like.device_mesh
    return DTensor.from_local(seed, mesh, [Replicate()] * mesh.ndim, run_check=True)
