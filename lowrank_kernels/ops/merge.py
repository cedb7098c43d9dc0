"""``lowrank_kernels::merge_lora_``: record, check, plan, backends, fake. It writes W and has no gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tuned
from ..cpp import cpp
from ..kernels.target import Target
from ..reference.merge import merge_lora_ref
from .library import Written, define_in_place
from .operands import backend_error, factor, unit_columns
from .planning import LIBRARY, OWN, Choosing, Plan, Planner

_BLOCK_ELEMENTS = 1 << 24  # of the reference: 64 MiB of float32 at a time, whatever the weight's size


class MergeLoRA(NamedTuple):
    """Arguments of the op: W ← after ∘ (before ∘ W + s B A); a ``seed`` rounds stochastically."""

    weight: Written
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    before: Tensor | None
    after: Tensor | None
    seed: Tensor | None
    backend: str


def check_merge_lora(call: MergeLoRA, op: str = "merge_lora_") -> Exception | None:
    """The error of operands that do not fit together; None where they do."""
    weight, lora_a, lora_b = call.weight, call.lora_a, call.lora_b
    for name, tensor in (("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            return TypeError(f"{op}: expected {name} to be a tensor of a floating dtype, got {kind}")
        if tensor.dim() != 2:
            return ValueError(f"{op}: expected {name} with 2 dimensions, got shape {tuple(tensor.shape)}")
    (n, k), r = weight.shape, lora_a.shape[0]
    if lora_a.shape != (r, k):
        return ValueError(f"{op}: expected lora_a of shape (R, K) = ({r}, {k}), got {tuple(lora_a.shape)}")
    if lora_b.shape != (n, r):
        return ValueError(f"{op}: expected lora_b of shape (N, R) = ({n}, {r}), got {tuple(lora_b.shape)}")
    if weight.numel() and any(
        size > 1 and stride == 0 for size, stride in zip(weight.shape, weight.stride(), strict=True)
    ):
        return ValueError(f"{op}: expected a weight of its own memory, got an expanded one; merge into weight.clone()")
    return backend_error(op, call.backend)


def _decide(call: Any, records: bool, target: Target | None) -> Plan:
    weight = call.weight
    c = Choosing("merge_lora_", weight, target)
    settled = c.settled("merge_lora_", tuned.factor_sizes(weight.shape, call.lora_a.shape))
    backend = c.backend(call.backend, *settled)
    if backend == "cpu":
        if weight.dtype == torch.float32 and call.before is None and call.after is None and _exact():
            c.take("base", LIBRARY, "rule: it sums in float32 too, in half the time of our kernel at 2048 x 2048")
        else:
            c.take("base", OWN, "rule: the sum is rounded once")
    elif backend == "triton":
        c.take("tiles", c.target, "rule: the target's", c.target.arch)
    return c.done()


def _exact() -> bool:
    """True where PyTorch multiplies float32 as float32 (as torch.set_float32_matmul_precision left it)."""
    return torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")  # type: ignore[attr-defined]


plan_merge_lora = Planner("merge_lora_", MergeLoRA, _decide, check_merge_lora, state=_exact)


def _merge(call: MergeLoRA, plan: Plan | None) -> None:
    weight, lora_a, lora_b, scaling, before, after, seed, _ = call
    if weight.numel() == 0:
        return
    plan = plan or plan_merge_lora.known(call)
    if plan.backend == "reference":
        return _merge_reference(call)
    lora_a, lora_b = factor(lora_a), factor(lora_b)
    if plan.backend == "triton":
        from ..kernels.merge import merge_lora_

        merge_lora_(weight, lora_a, lora_b, scaling, plan.tiles, before=before, after=after, seed=seed)
    elif plan.base == LIBRARY:
        weight.addmm_(lora_b.float(), lora_a.float(), alpha=scaling)
    else:
        adjacent = unit_columns(weight)
        cpp.merge_rows_(adjacent, lora_a, lora_b, scaling, before, after, seed)
        if adjacent is not weight:
            weight.copy_(adjacent)


def _merge_reference(call: MergeLoRA) -> None:
    weight, lora_a, lora_b, scaling, before, after, seed, _ = call
    rows = max(1, _BLOCK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        first, last = (None if scale is None else scale[part] for scale in (before, after))
        weight[part] = merge_lora_ref(
            weight[part],
            lora_a,
            lora_b[part],
            scaling=scaling,
            before=first,
            after=last,
            seed=seed,
            first_row=start,
        )


call_merge_lora_ = define_in_place("merge_lora_", MergeLoRA, _merge)
