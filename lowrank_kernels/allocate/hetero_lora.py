"""HeteroLoRA: which modules train, by a score of each (Zhang et al., arXiv 2406.14956)."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapt import replace_config
from ..names import named_modules
from ..nn.frozen import drop_compiled
from ..nn.matrix import frozen_weight, is_linear
from ..rider import Rider, check_integer, history_of, note
from .ranks import adapted_parts, check_score, evaluating, gated_layers, hold_gates_, over_processes

PROXIES = ("grad_norm", "snip", "synflow")


class HeteroLoRA(Rider):
    """After a warm-up of all modules: those with the best scores train on, within a budget; the others are off.

    The scores of a module, over its factors θ = (A, B) together, with every module on:

    - ``grad_norm``: ‖∂L/∂θ‖₂ of the mean loss on some batches.
    - ``snip``: Σ |θ ∂L/∂θ|, of the same.
    - ``synflow``: Σ θ ∂R/∂θ, R the sum of the model's outputs for an input of ones, every parameter |·|. No data.

    Modules are taken from the best score down, as long as they fit into what is left of the budget. A module that is
    off has gates of 0, and keeps its values: it adds nothing, gets no gradient and no step. At the start B = 0, so that
    ``snip`` and ``synflow`` are 0 everywhere, and ``grad_norm`` sees B alone: therefore the warm-up.

    Where torch.distributed runs several processes, sums that make a score are averaged over them, so that all choose
    the same modules, whatever batches each has.

    Args:
        model: adapted with ``gate=True``; gates say what is on, and do not train; trained ones are first put into B.
        optimizer: with all factors among its parameters.
        batches: for the scores, kept; may be empty for "synflow".
        loss: (model, batch) -> the loss, a scalar.
        budget: how many of the factors' parameters may train, or what share of them.
        proxy: one of the scores.
        warmup: steps before the first choice.
        every: choose anew after so many steps more (dynamic); None: once (static).
        outputs: model -> its outputs for an input of ones, for "synflow"; None: of a model of transformers, by
            ``inputs_embeds`` of one position.

    Attributes:
        steps: how many were taken.
        enabled: paths of the modules that are on.
        history: 1 where a module is on, by step, for a picture.

    Raises:
        TypeError, ValueError: no batches, a budget of nothing, of more than there is, or that no module fits into; a
            model without gates; weights of few bits for "synflow"; an optimizer that lacks a factor; and as
            :class:`~lowrank_kernels.rider.Rider`. At a choice: scores that are not finite, or all 0. Nothing has
            changed then.

    Source: Zhang et al., "Unlocking the Global Synergies in Low-Rank Adapters", arXiv 2406.14956.
    """

    key = "heterolora"
    history: dict[str, Any]

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Iterable[Any],
        loss: Callable[[Any, Any], Tensor],
        *,
        budget: float,
        proxy: str = "grad_norm",
        warmup: int = 10,
        every: int | None = None,
        outputs: Callable[[Any], Tensor] | None = None,
    ) -> None:
        name = "HeteroLoRA"
        super().__init__(optimizer, name)
        if proxy not in PROXIES:
            raise ValueError(f"{name}: expected proxy to be one of {', '.join(PROXIES)}, got {proxy!r}")
        check_integer(name, "warmup", warmup, 1)
        if every is not None:
            check_integer(name, "every", every, 1)
        self.model, self.batches, self._loss = model, list(batches), loss
        if not self.batches and proxy != "synflow":
            raise ValueError(f"{name}: expected batches to score by, got none")
        self.layers = gated_layers(model, name, optimizer)
        if proxy == "synflow":
            for path, module in named_modules(model):
                weight = frozen_weight(module) if is_linear(module) else None
                if weight is not None and not isinstance(weight, Tensor):
                    raise ValueError(
                        f"{name}: expected dense weights for proxy='synflow', which takes their sizes, got "
                        f"{weight.format} in {path}; use another proxy, or make them dense (lk.dequantize_)"
                    )
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for path, layer in self.layers.items():
            if not all(p.requires_grad and id(p) in stepped for p in layer.factor_parameters()):
                raise ValueError(f"{name}: expected an optimizer of all factors, got one without those of {path}")
        self.sizes = {path: sum(p.numel() for p in layer.factor_parameters()) for path, layer in self.layers.items()}
        self.budget = _parameters(budget, self.sizes, name)
        self.proxy, self.warmup, self.every, self._outputs = proxy, warmup, every, outputs
        self.steps = 0
        self.enabled = list(self.layers)
        hold_gates_(self.layers, may_be_off=True)
        self.history = history_of("on", self.layers)
        self.attach()

    def after_step(self) -> None:
        self.steps += 1
        later = self.steps - self.warmup
        if later == 0 or (self.every is not None and later > 0 and later % self.every == 0):
            self.choose()

    def choose(self) -> list[str]:
        """Score all modules, and turn on those that fit into the budget. Returns their paths."""
        scores = self.scores()
        if not any(scores.values()):
            raise ValueError(
                f"HeteroLoRA: expected scores that tell modules apart, got {self.proxy} of 0 for all; score after a "
                f"warm-up"
            )
        left, chosen = self.budget, set()
        for path in sorted(self.layers, key=lambda path: -scores[path]):
            if self.sizes[path] <= left:
                left -= self.sizes[path]
                chosen.add(path)
        self._turn([path for path in self.layers if path in chosen])
        note(self.history, self.steps + 1, {path: int(path in chosen) for path in self.layers})
        return self.enabled

    def scores(self) -> dict[str, float]:
        """The score of every module, with all of them on; the model is as before afterwards."""
        parameters = {path: layer.factor_parameters() for path, layer in self.layers.items()}
        was = self.enabled
        self._turn(list(self.layers))
        try:
            with evaluating(self.model), torch.enable_grad():
                of = self._synflow if self.proxy == "synflow" else self._by_gradients
                flat = of([p for pair in parameters.values() for p in pair])
        finally:
            self._turn(was)
        pairs = zip(flat[::2], flat[1::2], strict=True)
        sums = {path: float(a + b) for path, (a, b) in zip(parameters, pairs, strict=True)}
        means = zip(sums, over_processes(list(sums.values()), flat[0].device), strict=True)
        found = {path: check_score("HeteroLoRA", total, path) for path, total in means}
        return {path: total**0.5 for path, total in found.items()} if self.proxy == "grad_norm" else found

    def _by_gradients(self, parameters: list[Any]) -> list[Tensor]:
        """Σ g² or Σ |θ g| of each parameter, g the gradient of the mean loss."""
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        for batch in self.batches:
            loss = self._loss(self.model, batch) / len(self.batches)
            for total, grad in zip(sums, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                if grad is not None:
                    total += grad
        if self.proxy == "grad_norm":
            return [g.square().sum() for g in sums]
        return [(p.detach() * g).abs().sum() for p, g in zip(parameters, sums, strict=True)]

    def _synflow(self, parameters: list[Any]) -> list[Tensor]:
        """Σ θ ∂R/∂θ of each parameter, in a copy of all that is |·|."""
        absolute = {name: p.detach().abs() for name, p in self.model.named_parameters()}
        own = {id(p): name for name, p in self.model.named_parameters()}
        wanted = [absolute[own[id(p)]].requires_grad_() for p in parameters]
        outputs = torch.func.functional_call(_Called(self.model, self._outputs or _of_ones), _below(absolute), ())
        grads = torch.autograd.grad(outputs.sum(), wanted, allow_unused=True)
        zero = outputs.new_zeros(())
        return [zero if g is None else (p * g).sum().detach() for p, g in zip(wanted, grads, strict=True)]

    def _turn(self, on: list[str]) -> None:
        """Have these modules on, and no other."""
        self.enabled = on
        for path, layer in self.layers.items():
            is_on = path in set(on)
            layer.lora_gate.data.fill_(float(is_on))
            for p in layer.factor_parameters():
                p.requires_grad_(is_on)
                if not is_on:
                    p.grad = None

    def prune(self) -> list[str]:
        """Take the layers that are off out of the model, so that a saved adapter has those that are on alone.

        Returns:
            The paths that are left. The model's config names them. Detaches.
        """
        off: dict[int, Any] = {id(layer): layer for path, layer in self.layers.items() if path not in self.enabled}
        for parent in list(self.model.modules()):
            for child, module in list(parent._modules.items()):  # a layer may have several places
                if id(module) in off:
                    parent._modules[child] = off[id(module)].base_layer.train(off[id(module)].training)
        for prefix, part, config in adapted_parts(self.model):
            names = [re.escape(path.removeprefix(prefix)) for path in self.enabled if path.startswith(prefix)]
            replace_config(part, replace(config, target_modules="|".join(names) or (), exclude_modules=()))
        self.detach()
        return self.enabled

    def finish(self) -> None:
        self.prune()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "enabled": list(self.enabled), "history": copy.deepcopy(self.history)}

    def check_state(self, state: dict[str, Any]) -> None:
        unknown = set(state["enabled"]) - set(self.layers)
        if unknown:
            raise ValueError(f"HeteroLoRA: expected a state of this model's modules, got one of {min(unknown)}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.check_state(state)
        self.steps, self.history = state["steps"], copy.deepcopy(state["history"])
        self._turn(list(state["enabled"]))


def _parameters(budget: float, sizes: dict[str, int], op: str) -> int:
    """A budget as a number of parameters."""
    whole = sum(sizes.values())
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise TypeError(f"{op}: expected budget to be a number of parameters or a share of them, got {budget!r}")
    count = int(budget * whole) if isinstance(budget, float) and budget <= 1.0 else budget
    if not min(sizes.values()) <= count <= whole or count != int(count):
        raise ValueError(
            f"{op}: expected a budget of {min(sizes.values())}, the smallest module, to {whole} parameters, or a share "
            f"of them, got {budget!r}"
        )
    return int(count)


class _Called(nn.Module):
    """A model as a module whose forward is a function of it."""

    def __init__(self, model: nn.Module, function: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self) -> Tensor:
        return self.function(self.model)


def _below(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": t for name, t in tensors.items()}


def _of_ones(model: Any) -> Tensor:
    embeddings = getattr(model, "get_input_embeddings", None)
    if embeddings is None:
        raise ValueError(
            f"HeteroLoRA: expected outputs, a function that calls this {type(model).__name__} with an input of ones, "
            f"for proxy='synflow'"
        )
    weight: Tensor = embeddings().weight
    found: Tensor = model(inputs_embeds=torch.ones(1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device))[0]
    return found


def add_shortcuts_(model: nn.Module, modules: Iterable[str] = ("self_attn", "mlp")) -> list[str]:
    """Give modules a linear shortcut: y = module(x) + S x, S = 0 and frozen, for a LoRA of its own.

    S is an nn.Linear ``shortcut`` in each module whose path ends in one of the names, which ``lk.adapt`` takes like any
    other: name "shortcut" in target_modules. An adapter with shortcuts runs on a model that was given them.

    Args:
        model: changed in place, before ``lk.adapt``.
        modules: names of modules whose first input and output, or the first of their outputs, have one shape.

    Returns:
        The paths of the shortcuts.

    Raises:
        ValueError: no such module, one that has a shortcut, or nothing that tells its width.

    Source: the LoRA-adapted shortcuts of Zhang et al., arXiv 2406.14956, with a weight of 0 under the LoRA.
    """
    names = tuple(modules)
    found = {path: m for path, m in model.named_modules() if path.rpartition(".")[2] in names}
    if not found:
        raise ValueError(f"add_shortcuts_: expected modules named {', '.join(names)}, found none")
    widths: dict[str, Any] = {}
    for path, module in found.items():
        linears: list[Any] = [m for m in module.modules() if is_linear(m)]
        if hasattr(module, "shortcut") or not linears:
            raise ValueError(f"add_shortcuts_: expected linears and no shortcut yet in {path}")
        widths[path] = linears[0]
    for path, module in found.items():
        first = widths[path]
        weight = frozen_weight(first)
        like: Any = {"device": weight.device, "dtype": weight.dtype}
        shortcut = torch.nn.utils.skip_init(nn.Linear, first.in_features, first.in_features, bias=False, **like)
        nn.init.zeros_(shortcut.weight)
        module.shortcut = shortcut.requires_grad_(False)
        module.register_forward_hook(_add_shortcut, with_kwargs=True)
    drop_compiled()
    return [f"{path}.shortcut" for path in found]


def _add_shortcut(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    x = args[0] if args else next(iter(kwargs.values()))
    if isinstance(output, tuple):
        return output[0] + module.shortcut(x), *output[1:]
    return output + module.shortcut(x)
