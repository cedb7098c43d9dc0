"""Layers whose ranks are counted, cut and added while they train."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapt import config_of, replace_config
from ..config import LoRAConfig
from ..names import named_modules
from ..nn.lora import LoRALayer


def gated_layers(model: nn.Module, op: str) -> dict[str, LoRALayer]:
    """The layers of a model that have a gate, by path.

    Raises:
        TypeError: not a module.
        ValueError: no layer; one without a gate; one that is merged; a model under DistributedDataParallel.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: expected model to be a torch.nn.Module, got {type(model).__name__}")
    layers: dict[str, LoRALayer] = {}
    for path, module in named_modules(model):
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"{op}: expected a model that is not under DistributedDataParallel, which remembers the first shapes"
            )
        if isinstance(module, LoRALayer):
            if module.lora_gate is None:
                raise ValueError(f"{op}: expected layers with a gate, got none in {path}; adapt with gate=True")
            if module.merged:
                raise ValueError(f"{op}: expected layers that are not merged, got {path}; call unmerge_()")
            layers[path] = module
        elif hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            raise ValueError(
                f"{op}: expected layers with a gate, got a {type(module).__name__} in {path}, which has none; adapt "
                f"the model with lk.adapt and gate=True"
            )
    if not layers:
        raise ValueError(f"{op}: expected a model with LoRA layers, found none in {type(model).__name__}")
    return layers


class Ranks:
    """The ranks of a model's layers, which change while an optimizer steps them.

    Parameters stay the same objects. The optimizer's state of what is kept stays; that of a layer which gets new ranks
    starts anew, so that Adam's bias correction holds for them. The model's config follows, so that ``save_adapter`` and
    ``merge_and_unload`` go on; and a state dict of other ranks loads, the layers taking its shapes.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, LoRALayer], optimizer: torch.optim.Optimizer) -> None:
        self.model, self.layers, self.optimizer = model, layers, optimizer
        self.scaling = {path: layer.scaling for path, layer in layers.items()}
        for path, layer in layers.items():
            layer.register_load_state_dict_pre_hook(_Follow(self, path))

    def __len__(self) -> int:
        """Σ R."""
        return sum(layer.r for layer in self.layers.values())

    def by_layer(self) -> dict[str, int]:
        return {path: layer.r for path, layer in self.layers.items()}

    def change_(self, path: str, keep: Sequence[int], added: int = 0) -> None:
        """Keep some ranks of a layer and add others; see ``change_ranks_``."""
        layer = self.layers[path]
        old = layer.r
        layer.change_ranks_(keep, added, scaling=self.scaling[path])
        a, b = layer.factor_parameters()
        index = torch.as_tensor(list(keep), dtype=torch.long, device=a.device)
        for p, dim in ((a, 0), (b, 1), (layer.lora_gate, 0)):
            self._follow(p, dim, index, old, anew=added > 0)

    def _follow(self, p: Any, dim: int, index: Tensor, old: int, *, anew: bool) -> None:
        """Give the optimizer's state of a parameter its new shape, or drop it where it has one of another kind."""
        state = self.optimizer.state.pop(p, None)
        if state is None or anew:
            return
        shape = list(p.shape)
        shape[dim] = old
        sized = [t for t in state.values() if isinstance(t, Tensor) and t.dim() > 0]
        if all(list(t.shape) == shape for t in sized):
            self.optimizer.state[p] = {
                key: t.index_select(dim, index) if isinstance(t, Tensor) and t.dim() > 0 else t
                for key, t in state.items()
            }

    def write_down(self) -> None:
        """Have the model's config say the ranks and alphas that its layers have."""
        config = config_of(self.model)
        if isinstance(config, LoRAConfig):
            own = {path: "^" + re.escape(path) for path in self.layers}
            ranks = {own[path]: layer.r for path, layer in self.layers.items()}
            alphas = {own[path]: layer.alpha for path, layer in self.layers.items()}
            replace_config(self.model, replace(config, rank_pattern=ranks, alpha_pattern=alphas))


class _Follow:
    """Before a layer loads a state: take the rank of the factors in it."""

    def __init__(self, ranks: Ranks, path: str) -> None:
        self.ranks, self.path = ranks, path

    def __call__(self, layer: Any, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
        name, *_ = layer.shapes(layer.base_layer, layer.r)
        factor = state.get(prefix + name)
        if factor is not None and factor.dim() and factor.shape[0] not in (0, layer.r):
            self.ranks.change_(self.path, (), factor.shape[0])
            self.ranks.write_down()


def history_of(what: str, layers: Iterable[str]) -> dict[str, Any]:
    """An empty record of one number a layer, as :class:`~lowrank_kernels.rider.Rider` has it for a picture."""
    return {"what": what, "steps": [], "modules": list(layers), "values": []}


def note(history: dict[str, Any], step: int, values: Mapping[str, float]) -> None:
    """Add what is true from a step on; nothing where that step has an entry, or nothing has changed."""
    row = [values[path] for path in history["modules"]]
    if not history["steps"] or (history["steps"][-1] < step and history["values"][-1] != row):
        history["steps"].append(step)
        history["values"].append(row)


def check_score(op: str, value: Any, what: str) -> float:
    """A score as a number. Raises ValueError where it is not finite."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{op}: expected finite scores, got {number} of {what}; nothing has changed")
    return number
