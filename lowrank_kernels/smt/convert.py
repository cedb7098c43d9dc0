"""The way back: plain linears with the tuned blocks in them."""

from __future__ import annotations

from torch import nn

from ..adapt import forget_adaptation
from ..names import named_modules
from ..nn.block_sparse import BlockSparseLinear


def to_linear(model: nn.Module) -> list[str]:
    """Replace every BlockSparseLinear by the linear that it wraps, tuned blocks written in. In place.

    The linears stay frozen; ``requires_grad_`` is the caller's. What a report's ``undo()`` would do instead is put the
    original values back.

    Returns:
        The paths of the modules that were replaced.

    Raises:
        ValueError: there is none.
    """
    found = [(name, m) for name, m in named_modules(model) if isinstance(m, BlockSparseLinear)]
    if not found or found[0][0] == "":
        raise ValueError(f"to_linear: expected a model with BlockSparseLinear layers in it, got {type(model).__name__}")
    replacement = {id(layer): layer.merge_().base_layer for _, layer in found}
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is not None and id(module) in replacement:
                parent._modules[child] = replacement[id(module)].train(module.training)
    forget_adaptation(model)
    return [name for name, _ in found]
