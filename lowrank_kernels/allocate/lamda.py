"""LaMDA's schedule, which freezes B column by column, and LaMDA++'s ranks (Azizi et al., arXiv 2406.12832)."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from ..adapt import plan_adaptation
from ..config import LaMDAConfig
from ..finite import all_finite
from ..names import named_modules
from ..nn.lamda import LaMDALinear
from ..nn.matrix import frozen_weight
from ..rider import Rider, check_integer


class LaMDA(Rider):
    """In step t = 0, 1, ... of T the first min(R, ⌊R t / (η T)⌋) columns of each layer's B are constants.

    The columns are in the order of W's singular values, so that the leading directions are frozen first; from step η T
    on S alone trains. A frozen column has no gradient and is given no step at all: neither momentum nor weight decay
    moves it. Once all of a layer's are frozen, B requires no grad and its optimizer state is dropped.

    Args:
        model: adapted with :class:`~lowrank_kernels.LaMDAConfig`.
        optimizer: the one that steps B and S. Layers of which it steps neither are left alone, and a B that it does not
            step is a constant from the start.
        steps: T, the optimizer steps of the whole run.
        share: η, over which share of them B is frozen; 0: from the start, 1: over the whole run.

    Attributes:
        steps_taken: t.

    Resumes bit for bit with the model's and the optimizer's states.

    Raises:
        TypeError, ValueError: no LaMDALinear in the model, or none that the optimizer steps; a model in
            DistributedDataParallel, which expects a gradient of every parameter that had one at first; ``steps`` below
            1, ``share`` outside [0, 1]; and as :class:`~lowrank_kernels.rider.Rider`.

    Source: Azizi, Kundu and Pedram, "LaMDA", arXiv 2406.12832, section 3.
    """

    key = "lamda"

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, *, share: float = 0.3) -> None:
        super().__init__(optimizer, "LaMDA")
        if not isinstance(model, nn.Module):
            raise TypeError(f"LaMDA: expected model to be a torch.nn.Module, got {type(model).__name__}")
        if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
            raise ValueError(
                "LaMDA: expected a model that is not under DistributedDataParallel, which expects gradients of B to "
                "the end"
            )
        check_integer("LaMDA", "steps", steps, 1)
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0.0 <= share <= 1.0:
            raise ValueError(f"LaMDA: expected share to be a number from 0 to 1, got {share!r}")
        layers = {path: m for path, m in named_modules(model) if isinstance(m, LaMDALinear)}
        if not layers:
            raise ValueError("LaMDA: expected a model with LaMDALinear layers, got none; adapt it with LaMDAConfig")
        self._stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.layers = {p: m for p, m in layers.items() if {id(m.lamda_B), id(m.lamda_S)} & self._stepped}
        if not self.layers:
            raise ValueError("LaMDA: expected an optimizer of this model's B and S, got one that steps none of them")
        self.steps, self.share, self.steps_taken = steps, share, 0
        self._kept: list[tuple[Tensor, Tensor]] = []
        if not self.attach():
            self._freeze()

    def columns(self, layer: LaMDALinear) -> int:
        """How many columns of the layer's B are constants in the next step."""
        over = Fraction(str(self.share)) * self.steps  # 0.55 · 100 is more than 55 in floats, and a step late
        return layer.r if self.steps_taken >= over else int(layer.r * self.steps_taken / over)

    def _freeze(self) -> None:
        for layer in self.layers.values():
            layer.frozen_columns = self.columns(layer) if id(layer.lamda_B) in self._stepped else layer.r
            trains = layer.frozen_columns < layer.r
            layer.lamda_B.requires_grad_(trains)
            if not trains:
                layer.lamda_B.grad = None
                self.optimizer.state.pop(layer.lamda_B, None)

    def before_step(self) -> None:
        for layer in self.layers.values():
            if layer.frozen_columns and layer.lamda_B.requires_grad:
                b = layer.lamda_B.detach()
                self._kept.append((b, b[:, : layer.frozen_columns].clone()))

    def restore(self) -> None:
        while self._kept:
            b, columns = self._kept.pop()
            b[:, : columns.shape[1]] = columns

    def after_step(self) -> None:
        self.steps_taken += 1
        self._freeze()

    def state_dict(self) -> dict[str, Any]:
        return {"steps_taken": self.steps_taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps_taken = state["steps_taken"]
        self._freeze()


@torch.no_grad()
def spectral_ranks(model: nn.Module, config: LaMDAConfig, budget: int | None = None) -> LaMDAConfig:
    """LaMDA++: a rank for each module, more where W's spectrum is flat, under one budget.

    With p_{l,i} = σ²_{l,i} / Σ_j σ²_{l,j} of each targeted W_l, the ranks R_l maximise Σ_l Σ_{i ≤ R_l} p_{l,i} where
    Σ R_l = budget and 1 ≤ R_l ≤ min(N, K, 4 r): the largest p of all modules together, the first of equal ones.

    Args:
        model: not adapted yet.
        config: which modules, and r; each keeps the scaling that it has there.
        budget: Σ R_l; None: what ``config`` asks for in all.

    Returns:
        The config with ``rank_pattern`` and ``alpha_pattern`` of every module.

    Raises:
        ValueError: a budget of less than one rank a module, or of more than there are; weights that are not finite, or
            on the meta device.

    Source: Azizi, Kundu and Pedram, "LaMDA", arXiv 2406.12832. Of its section on LaMDA++ the abstract's words alone
    could be read: the maximum above is ours.
    """
    plan = plan_adaptation(model, config)
    spectra: dict[str, Tensor] = {}
    for path, module in plan.targets.items():
        weight: Any = frozen_weight(module)
        dense = weight if isinstance(weight, Tensor) else weight.dense()
        if dense.is_meta:
            raise ValueError(f"spectral_ranks: expected weights at hand, got {path} on the meta device; load it first")
        if not all_finite(dense):
            raise ValueError(f"spectral_ranks: expected finite weights, got NaN or Inf in {path}")
        energy = torch.linalg.svdvals(dense.to(torch.promote_types(dense.dtype, torch.float32))).square()
        total = float(energy.sum())
        spectra[path] = (energy / total if total else energy)[: 4 * config.r].cpu()
    budget = sum(config.rank_of(path) for path in spectra) if budget is None else budget
    check_integer("spectral_ranks", "budget", budget, len(spectra))
    most = sum(len(p) for p in spectra.values())
    if budget > most:
        raise ValueError(f"spectral_ranks: expected a budget of at most {most}, 4 r a module, got {budget}")
    ranks = dict.fromkeys(spectra, 1)
    rest = [(-p, at, path) for at, (path, energy) in enumerate(spectra.items()) for p in energy[1:].tolist()]
    for _, _, path in sorted(rest)[: budget - len(ranks)]:
        ranks[path] += 1
    names = {path: "^" + re.escape(path) for path in ranks}
    root = 0.5 if config.rslora else 1.0
    return replace(
        config,
        rank_pattern={names[path]: r for path, r in ranks.items()},
        alpha_pattern={names[path]: config.scaling_of(path) * r**root for path, r in ranks.items()},
    )
