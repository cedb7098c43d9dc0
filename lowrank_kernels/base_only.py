"""``base_only``: a model's layers without their corrections, for reference logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .adapt import config_of
from .names import named_modules, named_parameters
from .nn.base_only import without_corrections
from .nn.frozen import AroundBase


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
        model: with layers of this package of any kind. A model with an ``AdapterBank`` is the base model outside of its
            batches already; a PeftModel has ``disable_adapter`` of its own.

    Raises:
        TypeError: not a module.
        ValueError: no such layers; merged ones, whose weight holds the correction; weights that LoRA-GA's start or a
            chain has changed, biases that train, and modules_to_save, of which the base's own values are not at hand.
        RuntimeError: from a layer in an older thread, while the context is open: it may or may not belong to it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"base_only: expected model to be a torch.nn.Module, got {type(model).__name__}")
    layers = {name: m for name, m in named_modules(model) if isinstance(m, AroundBase) and hasattr(m, "merged")}
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
    modes = {config.bias for m in model.modules() if (config := config_of(m)) is not None}
    biases = {
        "all": any(f".{name}".endswith(".bias") for name, _ in named_parameters(model)),
        "lora_only": any(layer.bias is not None for layer in layers.values()),
    }
    if any(biases.get(mode) for mode in modes):
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
    whole = [name for name, m in named_modules(model) if getattr(m, "trains_whole", False)]
    if whole:
        raise ValueError(
            f"base_only: expected a model without modules_to_save, got {whole[0]}, which trains whole, and the base's "
            f"own is not at hand; keep a copy of the base"
        )
    with without_corrections(layers.values()):
        yield
