"""``merge_and_unload``: from an adapted model back to a plain one, with the corrections in its weights."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .adapt import forget_adaptation, trained_before, weight_owners
from .finite import all_finite
from .functional import stack_column_scale
from .fuse import unfuse
from .names import named_modules, named_parameters
from .nn.block_sparse import BlockSparseLinear
from .nn.coded import CodedLinear
from .nn.experts import LoRAExperts
from .nn.frozen import has_hooks
from .nn.lora import LoRALayer, check_requantize
from .nn.matrix import frozen_weight
from .nn.multi_lora import MultiLoRALinear
from .nn.sharded import is_dtensor, why_not_written
from .nn.svft import SVFTLinear
from .nn.velora import VeLoRALinear
from .weights import ROUNDINGS, FrozenWeight

_OP = "merge_and_unload"
logger = logging.getLogger("lowrank_kernels")


def merge_and_unload(model: nn.Module, *, adapter: int | None = None, requantize: str | None = None) -> nn.Module:
    """Merge every adapted layer into its weight and put the linears back, in place.

    W ← W + s B A for LoRA, g ∘ (W + s B A) for DoRA, W with its blocks for SMT, W + U M Vᵀ for SVFT; in float32,
    rounded once to W's dtype; and W as it is for VeLoRALinear. What PEFT's method of this name does for a PeftModel.

    The result is the model as it was before :func:`lowrank_kernels.adapt`, with other weights: the same linears, under
    the same names, so that ``save_pretrained``, ``from_pretrained`` and every other tool take it. Parameters require a
    gradient as they did before ``adapt``; in a model whose layers were put in by hand that stays as it is. What a
    report of ``adapt`` could undo is gone, and its ``undo()`` says so.

    Args:
        model: with layers of :mod:`lowrank_kernels.nn`, whoever put them there. A layer
            that is merged already stays merged with what it was merged with.
        adapter: which one, where there are MultiLoRALinears that are not merged yet.
        requantize: how weights that ``lk.quantize_`` stored in few bits are rounded to them again, as for
            ``LoRALinear.merge_``; what they keep of the updates is logged.

    Returns:
        The model; the linear itself where the model is one layer.

    Raises:
        ValueError: no such layer; a weight that another module or layer uses as well; factors that are not finite; a
            bias of B's and none to take it; MultiLoRALinears and no ``adapter``; a layer that carries hooks, which
            would no longer run; weights that are sharded or offloaded; a model in DistributedDataParallel (give its
            ``module``). Everything is checked before anything is changed.

    A chain or an optimizer that still holds the layers has to be dropped: it would go on with weights that are the
    model's.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_OP}: expected model to be a torch.nn.Module, got {type(model).__name__}")
    layers = {name: module for name, module in named_modules(model) if hasattr(module, "base_layer")}
    if not layers:
        raise ValueError(f"{_OP}: expected a model with adapted layers, found none in this {type(model).__name__}")
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(f"{_OP}: expected a model, got one in DistributedDataParallel; give its module")
    if requantize is not None and requantize not in ROUNDINGS:
        raise ValueError(f"{_OP}: expected requantize to be one of {', '.join(ROUNDINGS)}, got {requantize!r}")
    bases: dict[int, str] = {}
    for name, layer in layers.items():
        first = bases.setdefault(id(layer.base_layer), name)
        if first != name:
            raise ValueError(
                f"{_OP}: expected a base layer for each, but {first} and {name} have one; nothing has changed"
            )
    owners = weight_owners(model)
    merges: dict[int, Callable[[], Any]] = {}
    for name, layer in layers.items():
        try:
            merges[id(layer)] = _prepared(layer, adapter, owners, requantize)
        except ValueError as error:
            raise ValueError(f"{_OP}: {name or 'the model'}: {error}; nothing has changed") from None
    for merge in merges.values():
        merge()
    for name, layer in layers.items():
        report = getattr(layer, "requantized", None)
        if report is not None:
            logger.warning("%s: %s: %s", _OP, name or "the model", report)
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is not None and id(module) in merges:
                parent._modules[child] = _linear_of(module)
    if id(model) in merges:
        return _linear_of(model)
    for module in list(model.modules()):
        trained = trained_before(module)
        if trained is not None:
            for name, p in named_parameters(module):
                p.requires_grad = name in trained
    for module in list(model.modules()):
        forget_adaptation(module)
        module.__dict__.pop("trains_whole", None)
    unfuse(model)
    return model


def _linear_of(layer: nn.Module) -> nn.Module:
    base: Any = layer.base_layer
    return base.train(layer.training)


def _prepared(
    layer: nn.Module, adapter: int | None, owners: dict[int, list[str]], requantize: str | None
) -> Callable[[], Any]:
    """What merges this layer, once all that could stop it is known not to. ValueError says what would."""
    if isinstance(layer, LoRAExperts):
        return _prepared_experts(layer, owners)
    if not isinstance(layer, (LoRALayer, BlockSparseLinear, MultiLoRALinear, SVFTLinear, VeLoRALinear)):
        is_pefts = any(kind.__module__.startswith("peft.") for kind in type(layer).__mro__)
        cure = "; call the PeftModel's own merge_and_unload()" if is_pefts else ""
        raise ValueError(f"expected layers of this package, got a {type(layer).__name__}{cure}")
    base: nn.Linear = layer.base_layer
    if isinstance(layer, LoRALayer) and not layer.merged:
        check_requantize("merge_", base, requantize if isinstance(frozen_weight(base), FrozenWeight) else None)
    elif isinstance(frozen_weight(base), FrozenWeight) and not isinstance(layer, LoRALayer):
        raise ValueError(f"expected a dense weight to merge a {type(layer).__name__} into; lk.dequantize_ makes it so")
    stored = isinstance(base, CodedLinear)
    if stored:
        reason = None
    elif is_dtensor(base.weight) or getattr(base, "_is_fsdp_managed_module", False):
        raise ValueError("its weight is sharded; gather the model first, or merge layer by layer with merge_()")
    else:
        reason = why_not_written(base)
    if reason is not None:
        raise ValueError(reason)
    if has_hooks(layer):
        raise ValueError("it carries hooks or a replaced forward; remove them first")
    if isinstance(layer, VeLoRALinear):
        return _nothing  # what it has learnt is in W
    changed: list[Any] = [base.weight]
    if isinstance(layer, LoRALayer) and layer.lora_bias is not None:
        changed.append(base.bias)
    for p in changed:
        first, *others = owners.get(id(p), [""])
        if others:
            raise ValueError(
                f"expected weights of its own, but {first} is also {', '.join(others)}, which would change with it; "
                f"give one of them a copy"
            )
    if isinstance(layer, MultiLoRALinear):
        return _prepared_one_of_many(layer, adapter)
    if isinstance(layer, BlockSparseLinear):
        _check_finite("blocks", layer.blocks)
        return layer.merge_
    if isinstance(layer, SVFTLinear):
        _check_finite("values", layer.values)
        return _nothing if layer.merged else layer.write_
    return _prepared_lora(layer, requantize if stored else None)


def _prepared_lora(layer: LoRALayer, requantize: str | None = None) -> Callable[[], Any]:
    if layer.merged:
        return _nothing
    state = layer.prepare_merge(requantize=requantize)
    return lambda: layer.put_in_(state)


def _prepared_experts(layer: LoRAExperts, owners: dict[int, list[str]]) -> Callable[[], Any]:
    if has_hooks(layer):
        raise ValueError("it carries hooks or a replaced forward; remove them first")
    if layer.merged:
        return _nothing
    for name in layer.adapters:
        first, *others = owners.get(id(getattr(layer.base_layer, name)), [""])
        if others:
            raise ValueError(
                f"expected weights of its own, but {first} is also {', '.join(others)}, which would change with it; "
                f"give one of them a copy"
            )
    merges = layer.prepare_merge()
    return lambda: [merge() for merge in merges]


def _prepared_one_of_many(layer: MultiLoRALinear, adapter: int | None) -> Callable[[], Any]:
    if layer.merged and adapter in (None, layer.merged_adapter):
        return _nothing
    if layer.merged:
        raise ValueError(f"adapter {layer.merged_adapter} is merged; call unmerge_() first")
    if isinstance(adapter, bool) or not isinstance(adapter, int) or not 0 <= adapter < len(layer.places):
        raise ValueError(f"expected adapter to name one of its {len(layer.places)} adapters, got {adapter!r}")
    stack = layer.stack
    for of_slice in range(len(stack.slices)):
        for name, tensor in zip(("lora_A", "lora_B"), stack.factors(adapter, of_slice)[:2], strict=True):
            _check_finite(name, tensor)
    row = layer.places[adapter].magnitude
    if row >= 0:
        _check_finite("the column scale m / n", stack_column_scale(layer.weight.detach(), stack)[1][row])
    return lambda: layer.merge_(adapter)


def _nothing() -> None:
    pass


def _check_finite(name: str, tensor: Tensor) -> None:
    if not all_finite(tensor):
        raise ValueError(f"expected finite values, and {name} holds NaN or Inf")
