"""Optimizer state that is wider than the parameters: AdamW's step on it, and how it is loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def wide_dtype(p: Tensor) -> torch.dtype:
    """Of the state beside a parameter: float32, float64 beside float64."""
    return torch.promote_types(p.dtype, torch.float32)


def step_adamw(optimizer: torch.optim.Optimizer, group: dict[str, Any], params: list[Tensor]) -> None:
    """AdamW's step on those of ``params`` that have a gradient, with the settings of their group."""
    params = [p for p in params if p.grad is not None]
    if not params:
        return
    for p in params:
        if not optimizer.state[p]:
            optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(p, dtype=wide_dtype(p)),
                "exp_avg_sq": torch.zeros_like(p, dtype=wide_dtype(p)),
            }
    states = [optimizer.state[p] for p in params]
    # AdamW's own step wants one dtype throughout: half-precision parameters are stepped as float32 copies.
    work = [p.to(wide_dtype(p)) for p in params]  # p itself where that is its own
    adamw(
        work,
        [p.grad.to(w.dtype) for p, w in zip(params, work, strict=True) if p.grad is not None],
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [],
        [s["step"] for s in states],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    for p, w in zip(params, work, strict=True):
        if w is not p:
            p.copy_(w)


def load_wide_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Give an optimizer that has loaded ``state_dict`` the state's own dtypes back, which the base class rounds."""
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    own = [p for group in optimizer.param_groups for p in group["params"]]
    for index, p in zip(saved, own, strict=True):
        for name, value in state_dict["state"].get(index, {}).items():
            if isinstance(value, Tensor):
                keep_on_cpu = name == "step" and value.dim() == 0
                optimizer.state[p][name] = value.clone() if keep_on_cpu else value.to(p.device, copy=True)
