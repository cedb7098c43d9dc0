"""``base_only``: a model's layers without their corrections, for reference logits."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .batches import Batch, Batches
from .frozen import AroundBase


class _BaseOnly(Batch):
    """An open context, and the ``id`` of each layer that it is about."""

    def __init__(self, layers: frozenset[int]) -> None:
        super().__init__("base_only", [])
        self.layers = layers


_OPEN = Batches[_BaseOnly]("base_only", "base_only(model)")
_lock = threading.Lock()


@contextmanager
def base_only(model: nn.Module) -> Iterator[None]:
    """Context in which the layers of a model compute what their base layers do, as PEFT's ``disable_adapter``.

    ``with lk.base_only(model), torch.no_grad(): reference = model(...)`` gives the reference logits of DPO or
    distillation without a second copy of the model. Nothing is moved, written or copied, but for SMT, whose weight
    without the blocks is a copy that lasts as long as a layer's product.

    It holds for its thread, for threads started in it, and for the backward of what ran in it, which must run before
    the context ends where it runs layers again (activation checkpointing). Contexts nest. A compiled model sees it in
    every thread.

    Args:
        model: with layers of this package of any kind. A model with an ``AdapterBank`` is
            the base model outside of its batches already; a PeftModel has ``disable_adapter`` of its own.

    Raises:
        TypeError: not a module.
        ValueError: no such layers; merged ones, whose weight holds the correction; weights that LoRA-GA's start or a
            chain has changed, biases that train, and modules_to_save, of which the base's own values are not at hand.
        RuntimeError: from a layer in an older thread, while the context is open: it may or may not belong to it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"base_only: expected model to be a torch.nn.Module, got {type(model).__name__}")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, AroundBase) and hasattr(m, "merged")}
    if not layers:
        raise ValueError(
            f"base_only: expected a model with layers of this package, found none in {type(model).__name__}"
        )
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"base_only: expected unmerged layers, got {merged[0]} merged; call its unmerge_()")
    for name, layer in layers.items():
        if why := getattr(layer, "weight_changed_by", None):
            raise ValueError(
                f"base_only: expected layers over the base's own weights, but that of {name} was changed by {why}"
            )
    configs = [vars(m).get("_lowrank_config") for m in model.modules()]
    of_all = any(getattr(config, "bias", "none") == "all" for config in configs)
    of_layers = any(getattr(config, "bias", "none") == "lora_only" for config in configs)
    if (of_all and any(f".{name}".endswith(".bias") for name, _ in model.named_parameters())) or (
        of_layers and any(layer.bias is not None for layer in layers.values())
    ):
        raise ValueError(
            "base_only: expected the base's own biases, got those of the adapter, which holds them whole; adapt the "
            "model with bias='none'"
        )
    trained = [name for name, layer in layers.items() if layer.bias is not None and layer.bias.requires_grad]
    if trained:
        raise ValueError(
            f"base_only: expected frozen biases, but that of {trained[0]} trains, and the base's own value is not at "
            f"hand; adapt the model with bias='none'"
        )
    whole = [name for name, m in model.named_modules() if getattr(m, "trains_whole", False)]
    if whole:
        raise ValueError(
            f"base_only: expected a model without modules_to_save, got {whole[0]}, which trains whole, and the base's "
            f"own is not at hand; keep a copy of the base"
        )
    around = _OPEN.current()
    own = frozenset(map(id, layers.values()))
    with _OPEN.open(_BaseOnly(own if around is None else own | around.layers)):
        _count(layers.values(), 1)
        try:
            yield
        finally:
            _count(layers.values(), -1)


def _count(layers: Iterable[AroundBase], step: int) -> None:
    with _lock:
        for layer in layers:
            layer.base_only_depth = (layer.base_only_depth or 0) + step


def runs_base_alone(layer: AroundBase) -> bool:
    """True in a :func:`base_only` of the layer's model, and where autograd repeats a forward that ran in one."""
    if torch.compiler.is_compiling():
        return bool(layer.base_only_depth)  # a compiled graph is guarded by it
    if not layer.base_only_depth and torch._C._current_graph_task_id() == -1:
        return False
    batch = _OPEN.current()
    return batch is not None and id(layer) in batch.layers
