"""``lowrank_kernels::merge_lora_``: schema, checks, backends, fake. It writes W and has no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _extension, tuned
from ..reference.merge import merge_lora_ref
from .backend import KERNEL_DTYPES, resolve_backend
from .library import define_in_place, unobserved
from .lora import Metadata
from .operands import check_scaling, factor, is_empty, unit_columns

_SCHEMA = (
    "merge_lora_(Tensor(a!) weight, Tensor lora_a, Tensor lora_b, float scaling, Tensor? before, Tensor? after, "
    "Tensor? seed, str backend) -> ()"
)
_BLOCK_ELEMENTS = 1 << 24  # of the reference: 64 MiB of float32 at a time, whatever the weight's size


def check_merge_lora(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, op: str = "merge_lora_") -> None:
    """Raise ValueError or TypeError, in the op's name, for operands that do not fit together."""
    check_scaling(op, scaling, getattr(weight, "dtype", torch.float32))
    for name, tensor in (("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{op}: expected {name} to be a tensor of a floating dtype, got {kind}")
        if tensor.dim() != 2:
            raise ValueError(f"{op}: expected {name} with 2 dimensions, got shape {tuple(tensor.shape)}")
    (n, k), r = weight.shape, lora_a.shape[0]
    if lora_a.shape != (r, k):
        raise ValueError(f"{op}: expected lora_a of shape (R, K) = ({r}, {k}), got {tuple(lora_a.shape)}")
    if lora_b.shape != (n, r):
        raise ValueError(f"{op}: expected lora_b of shape (N, R) = ({n}, {r}), got {tuple(lora_b.shape)}")
    if weight.numel() and any(
        size > 1 and stride == 0 for size, stride in zip(weight.shape, weight.stride(), strict=True)
    ):
        raise ValueError(f"{op}: expected a weight of its own memory, got an expanded one; merge into weight.clone()")


def _merge(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float,
    before: Tensor | None, after: Tensor | None, seed: Tensor | None, backend: str,
) -> None:  # fmt: skip
    if is_empty(weight):
        return
    name = resolve_backend("merge_lora_", backend, weight, tuned.factor_sizes, weight.shape, lora_a.shape)
    if name == "reference":
        return _merge_reference(weight, lora_a, lora_b, scaling, before, after, seed)
    lora_a, lora_b = factor(lora_a), factor(lora_b)
    if name == "triton":
        from ..kernels.merge import merge_lora_

        merge_lora_(weight, lora_a, lora_b, scaling, before, after, seed)
    else:
        _merge_on_cpu(weight, lora_a, lora_b, scaling, before, after, seed)


def _merge_on_cpu(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float,
    before: Tensor | None, after: Tensor | None, seed: Tensor | None,
) -> None:  # fmt: skip
    # As torch.set_float32_matmul_precision left it.
    exact = torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")  # type: ignore[attr-defined]
    if weight.dtype == torch.float32 and before is None and after is None and exact:
        # The library sums in float32 too then, and takes half the time of our kernel at 2048 x 2048.
        weight.addmm_(lora_b.float(), lora_a.float(), alpha=scaling)
        return
    adjacent = unit_columns(weight)
    torch.ops.lowrank_kernels.merge_rows_(adjacent, lora_a, lora_b, scaling, before, after, seed)
    if adjacent is not weight:
        weight.copy_(adjacent)


@tuned.remembered
def _fit_and_settled(forced: str | None, weight: Metadata, lora_a: Metadata, lora_b: Metadata) -> bool:
    """Whether such operands fit together on a CPU, and are not settled to run the reference."""
    (shape, dtype, device), rank = weight, lora_a[0][0]
    fit = (
        device.type == "cpu" and _extension.available()
        and len(shape) == 2 and lora_a[0] == (rank, shape[1]) and lora_b[0] == (shape[0], rank)
        and all(t[1] in KERNEL_DTYPES and t[2] == device for t in (weight, lora_a, lora_b))
    )  # fmt: skip
    if fit and forced == tuned.TABLE:
        forced = tuned.settled("merge_lora_", "cpu", dtype, tuned.factor_sizes, shape, lora_a[0])
    return fit and forced != "reference"


def merges_directly(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> bool:
    """Whether :func:`merge_lora_directly_` takes these operands: on a CPU, where nobody notices that it is not the op.

    They are checked and settled once for all of their metadata.
    """
    if not unobserved((weight, lora_a, lora_b)):
        return False
    try:
        taken = _fit_and_settled(
            tuned.forced.get("merge_lora_", tuned.TABLE), (weight.shape, weight.dtype, weight.device),
            (lora_a.shape, lora_a.dtype, lora_a.device), (lora_b.shape, lora_b.dtype, lora_b.device),
        )  # fmt: skip
    except (AttributeError, IndexError, TypeError, ValueError):
        return False
    return taken and weight.is_contiguous() and lora_a.is_contiguous() and lora_b.is_contiguous()


def merge_lora_directly_(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> None:
    """W ← W + s B A, rounded to nearest, past this package's op."""
    weight = weight.detach()
    _merge_on_cpu(weight, lora_a.detach(), lora_b.detach(), scaling, None, None, None)
    torch.autograd.graph.increment_version(weight)  # the kernel writes without torch's knowing


def _merge_reference(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float,
    before: Tensor | None, after: Tensor | None, seed: Tensor | None,
) -> None:  # fmt: skip
    rows = max(1, _BLOCK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        first, last = (None if scale is None else scale[part] for scale in (before, after))
        weight[part] = merge_lora_ref(
            weight[part], lora_a, lora_b[part],
            scaling=scaling, before=first, after=last, seed=seed, first_row=start,
        )  # fmt: skip


call_merge_lora_ = define_in_place(_SCHEMA, _merge)
