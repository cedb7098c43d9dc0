"""Layers whose ranks are counted, cut and added while they train."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapt import config_of, replace_config
from ..config import LoRAConfig
from ..names import named_modules
from ..nn.lora import LoRALayer
from ..nn.sharded import is_dtensor

_SET_GATES = ("sora", "alora", "heterolora")


def gated_layers(model: nn.Module, op: str, optimizer: torch.optim.Optimizer | None = None) -> dict[str, LoRALayer]:
    """The layers of a model that have a gate, by path.

    Args:
        optimizer: that a rider, which sets the gates, is about to ride on.

    Raises:
        TypeError: not a module.
        ValueError: an optimizer with another rider that sets gates; no layer; one without a gate; one that is merged,
            or sharded; a model under DistributedDataParallel.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: expected model to be a torch.nn.Module, got {type(model).__name__}")
    for key in _SET_GATES:
        if getattr(optimizer, f"_lowrank_{key}", None) is not None:
            raise ValueError(
                f"{op}: expected an optimizer without another rider that sets gates, got one with {key}; call its "
                f"detach()"
            )
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
            if any(map(is_dtensor, module.factor_parameters())):
                raise ValueError(f"{op}: expected whole factors, got shards in {path}; allocate ranks before sharding")
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

    def follow_loads(self) -> list[Callable[[], None]]:
        """Have layers take the ranks of a state that they load. Returns what ends it."""
        return [
            layer.register_load_state_dict_pre_hook(_Follow(self, path)).remove for path, layer in self.layers.items()
        ]

    def __len__(self) -> int:
        """Σ R."""
        return sum(layer.r for layer in self.layers.values())

    def by_layer(self) -> dict[str, int]:
        return {path: layer.r for path, layer in self.layers.items()}

    def change_(self, path: str, keep: Sequence[int], added: int = 0, *, loading: bool = False) -> None:
        """Keep some ranks of a layer and add others; see ``change_ranks_``.

        Args:
            loading: they are about to be loaded, as the optimizer's state of them may have been.
        """
        layer = self.layers[path]
        old = layer.r
        layer.change_ranks_(keep, added, scaling=self.scaling[path])
        a, b = layer.factor_parameters()
        index = torch.as_tensor(list(keep), dtype=torch.long, device=a.device)
        for p, dim in ((a, 0), (b, 1), (layer.lora_gate, 0)):
            self._follow(p, dim, index, old, anew=added > 0 and not loading, loading=loading)

    def _follow(self, p: Any, dim: int, index: Tensor, old: int, *, anew: bool, loading: bool) -> None:
        """Give the optimizer's state of a parameter its new shape, or drop it where it has one of another kind."""
        state = self.optimizer.state.pop(p, None)
        if state is None or anew:
            return
        shape = list(p.shape)
        sized = [t for t in state.values() if isinstance(t, Tensor) and t.dim() > 0]
        if loading:
            if all(list(t.shape) == shape for t in sized):
                self.optimizer.state[p] = state
            return
        shape[dim] = old
        if all(list(t.shape) == shape for t in sized):
            self.optimizer.state[p] = {
                key: t.index_select(dim, index) if isinstance(t, Tensor) and t.dim() > 0 else t
                for key, t in state.items()
            }

    def write_down(self) -> None:
        """Have the model's config say the ranks and alphas that its layers have."""
        for prefix, part, config in adapted_parts(self.model):
            names = {
                path: "^" + re.escape(path.removeprefix(prefix)) for path in self.layers if path.startswith(prefix)
            }
            ranks = {name: self.layers[path].r for path, name in names.items()}
            alphas = {name: self.layers[path].alpha for path, name in names.items()}
            replace_config(part, replace(config, rank_pattern=ranks, alpha_pattern=alphas))


def adapted_parts(model: nn.Module) -> list[tuple[str, nn.Module, LoRAConfig]]:
    """(what its layers' paths begin with, module, config) of the model, or of each part, that a LoRAConfig adapted."""
    found = []
    for path, module in named_modules(model):
        config = config_of(module)
        if isinstance(config, LoRAConfig):
            found.append((f"{path}." if path else "", module, config))
    return found


@torch.no_grad()
def hold_gates_(layers: Mapping[str, LoRALayer], *, may_be_off: bool = False) -> None:
    """B ← B ∘ gate, gate ← 1, and no gate trains: the function stays.

    Args:
        may_be_off: a layer all of whose gates are 0 is one that was off, and keeps its B.
    """
    for layer in layers.values():
        gate: Any = layer.lora_gate.requires_grad_(False)
        _, b = layer.factor_parameters()
        if bool((gate != 1.0).any()) and (bool(gate.any()) or not may_be_off):
            b.copy_(layer.gated(b))
        gate.fill_(1.0)


class _Follow:
    """Before a layer loads a state: take the rank of the factors in it. A copy of the layer does so by itself, without
    the optimizer."""

    def __init__(self, ranks: Ranks | None, path: str) -> None:
        self.ranks, self.path = ranks, path

    def __getstate__(self) -> dict[str, Any]:
        return {"ranks": None, "path": self.path}

    def __call__(self, layer: Any, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
        name, *_ = layer.shapes(layer.base_layer, layer.r)
        factor = state.get(prefix + name)
        if factor is None or not factor.dim() or factor.shape[0] in (0, layer.r):
            return
        if self.ranks is None:
            layer.change_ranks_((), factor.shape[0])
        else:
            self.ranks.change_(self.path, (), factor.shape[0], loading=True)
            self.ranks.write_down()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and each of its modules as it was afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


def over_processes(values: list[float], device: torch.device) -> list[float]:
    """The mean of each value over the processes of torch.distributed, which all call this; the values where it does not
    run."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_world_size() == 1:
        return values
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(sums)
    return [float(v) for v in sums / torch.distributed.get_world_size()]


def check_score(op: str, value: Any, what: str) -> float:
    """A score as a number. Raises ValueError where it is not finite."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{op}: expected finite scores, got {number} of {what}; nothing has changed")
    return number
