"""VeLoRA's vectors, made of a batch ahead of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..names import named_modules
from ..nn.velora import Projecting


@torch.no_grad()
def velora_(model: nn.Module, batch: Any, run: Callable[[nn.Module, Any], Any]) -> list[str]:
    """Make v of every layer with ``velora`` from one batch: the mean of its sub-tokens, to unit length.

    Args:
        model: with such layers; runs in evaluation mode, without dropout, and without gradients.
        batch: what ``run`` takes; of a mapping with an "attention_mask" (batch, length), tokens whose entry is 0 do not
            count in layers whose x is (batch, length, K).
        run: ``run(model, batch)`` calls the model.

    Returns:
        Paths of the layers that still have no v: those that the model does not call, and those with a mean that is not
        finite. They take the first batch of training. Vectors that were made before stay as they are.

    Raises:
        ValueError: a model without such a layer.

    Under DistributedDataParallel call it before wrapping the model, on any batch: the wrapper gives rank 0's to all.
    """
    layers = {name: m for name, m in named_modules(model) if isinstance(m, Projecting) and m.velora is not None}
    if not layers:
        raise ValueError(f"velora_: expected a model with velora in its layers, found none in {type(model).__name__}")
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None

    def look(layer: Any, args: tuple[Tensor, ...]) -> None:
        (x,) = args
        layer.set_velora_vector_(x, mask if mask is not None and x.shape[:-1] == mask.shape else None)

    with ExitStack() as stack:
        for layer in layers.values():
            stack.callback(layer.register_forward_pre_hook(look).remove)
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        model.eval()
        run(model, batch)
    return [name for name, layer in layers.items() if not layer.velora_made]
