"""AdamW on the blocks of Sparse Matrix Tuning: the step and the write-back into W in one kernel a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..functional import block_adamw_, check_flag
from ..nn.block_sparse import BlockSparseLinear
from ..nn.sharded import is_dtensor
from .settings import check_betas, check_model, check_number


class BlockAdamW(torch.optim.Optimizer):
    """AdamW (decoupled weight decay) on ``blocks`` of every :class:`~lowrank_kernels.nn.BlockSparseLinear` of a model.

    m ← β₁ m + (1 - β₁) g, v ← β₂ v + (1 - β₂) g², p ← (1 - lr λ) p - lr m̂ / (√v̂ + ε), and W[block] ← p, in one kernel.
    The formula is that of ``torch.optim.AdamW``; m and v are float32 whatever p is.

    Args:
        model: a module with such layers in it; each must train its blocks, and nothing else of the model may train.
        lr, betas, eps, weight_decay: as of AdamW; the defaults are those of the SMT authors' runs, with a rate for
            models of any size.
        stochastic_rounding: round bfloat16 blocks up or down at random, unbiased, so that small steps are not lost
            without a float32 copy. For layers made with ``dtype=torch.bfloat16``.
        seed: of that randomness; with the step and the layer it gives every random number.

    Raises:
        ValueError: no such layer, or other parameters that train, by name; a setting out of its range.
        TypeError: stochastic rounding of blocks that are not bfloat16; a setting of the wrong kind.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        check_model("BlockAdamW", model)
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            check_number("BlockAdamW", name, value, wanted="in its range")
        check_betas("BlockAdamW", betas, wanted="in its range")
        check_flag("BlockAdamW", "stochastic_rounding", stochastic_rounding)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"BlockAdamW: expected seed to be an integer, got {seed!r}")
        self._layers = [m for m in model.modules() if isinstance(m, BlockSparseLinear) and m.blocks.requires_grad]
        if not self._layers:
            raise ValueError("BlockAdamW: expected a model with BlockSparseLinear layers that train, found none")
        ours = {id(layer.blocks) for layer in self._layers}
        others = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
        if others:
            raise ValueError(
                f"BlockAdamW: expected only blocks to train, and {', '.join(others[:3])} train too; freeze them, or "
                f"use torch.optim.AdamW for all"
            )
        if any(is_dtensor(p) for layer in self._layers for p in (layer.blocks, layer.base_layer.weight)):
            raise ValueError(
                "BlockAdamW: expected whole blocks, got shards (DTensor), which its kernel cannot write into W; use "
                "torch.optim.AdamW, which trains the blocks as well"
            )
        wrong = [layer.blocks.dtype for layer in self._layers if layer.blocks.dtype != torch.bfloat16]
        if stochastic_rounding and wrong:
            raise TypeError(f"BlockAdamW: expected bfloat16 blocks for stochastic rounding, got {wrong[0]}")
        self.seed = seed if stochastic_rounding else None
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([layer.blocks for layer in self._layers], defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only the constructor's own group: which layer blocks belong to is known of the model's alone."""
        if self.param_groups:
            raise ValueError(
                "BlockAdamW: expected no group beside the model's blocks in add_param_group; convert the layers first "
                "and make the optimizer over the whole model"
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_layers": self._layers, "seed": self.seed}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every layer whose blocks have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups
        for number, layer in enumerate(self._layers):
            p = layer.blocks
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                wide = torch.promote_types(p.dtype, torch.float32)
                state["step"] = 0
                state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, dtype=wide) for _ in range(2))
            state["step"] += 1
            seed = None
            if self.seed is not None:
                mixed = (self.seed * 1_000_003 + number) * 1_000_003 + state["step"]
                seed = torch.full((), mixed % 2**63, dtype=torch.int64, device=p.device)
            block_adamw_(
                p,
                p.grad,
                state["exp_avg"],
                state["exp_avg_sq"],
                layer.base_layer.weight,
                layer.block_index,
                step=state["step"],
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                seed=seed,
            )
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimizer; moments stay in their own dtype instead of taking the blocks'."""
        moments = {
            i: {k: v for k, v in s.items() if k in ("exp_avg", "exp_avg_sq")} for i, s in state_dict["state"].items()
        }
        super().load_state_dict(state_dict)
        for i, p in enumerate(self.param_groups[0]["params"]):
            for name, value in moments.get(i, {}).items():
                self.state[p][name] = value.to(p.device, torch.promote_types(p.dtype, torch.float32), copy=True)
