"""Sums of weight gradients over batches, with about one layer of gradients alive at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def summed_gradients(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    reduce: Callable[[Tensor], Tensor] | None = None,
    to_cpu: bool = False,
    step: Callable[[nn.Parameter], None] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Σ reduce(dL/dW) in float32 over every backward pass in the block, for each of some weights of a model.

    A gradient is taken as soon as backward has finished it, and freed. No other parameter gets one, unless ``step`` is
    given. The model's ``requires_grad`` flags and gradients are put back at the end, also after an error.

    Args:
        weights: parameters of the model by any name; one that has two names is summed under both.
        reduce: what is summed instead of the gradient itself; it is given float32.
        to_cpu: keep the sums on the CPU.
        step: called with each parameter that trains, in ``weights`` or not, while its gradient is there: an optimizer
            that steps inside backward.

    Yields:
        The sums by name, which grow with each backward pass. A weight that none has reached has no entry.
    """
    names: dict[int, list[str]] = {}
    for name, weight in weights.items():
        names.setdefault(id(weight), []).append(name)
    sums: dict[str, Tensor] = {}

    def take(p: Tensor) -> None:
        assert p.grad is not None
        for name in names.get(id(p), ()):
            part = p.grad.detach().float()
            part = part if reduce is None else reduce(part)
            part = part.cpu() if to_cpu else part
            if name in sums:
                sums[name] += part
            else:
                # A float32 gradient is itself here, and an optimizer may write to it.
                sums[name] = part.clone() if part.data_ptr() == p.grad.data_ptr() else part
        if step is not None:
            step(p)  # type: ignore[arg-type]
        p.grad = None

    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    hooks: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for p, trains, _ in before:
            p.grad = None
            p.requires_grad_(id(p) in names or (trains and step is not None))
            if p.requires_grad:
                hooks.append(p.register_post_accumulate_grad_hook(take))
        yield sums
    finally:
        for hook in hooks:
            hook.remove()
        for p, trains, grad in before:
            p.grad = None
            p.requires_grad_(trains)
            p.grad = grad
