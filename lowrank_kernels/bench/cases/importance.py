"""LoRAPrune's importance: its benchmark row, and what there is to tune."""

from __future__ import annotations

import torch
from torch import Tensor

import lowrank_kernels as lk

from ...kernels import roofline
from ...kernels.importance_tiles import importance_tiles
from ...kernels.roofline import Work
from ...kernels.target import Target
from ...reference import lora_importance_ref
from .bench import FACTORS, GPU_WIDTHS, REFERENCE, Bench, Inputs, Shape, Tunable, shapes_of
from .lora import lora_inputs


def _inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    made, grads = (lora_inputs({"M": 1, **s}, dtype, device) for _ in range(2))
    factors = {name: made[name] for name in ("weight", "lora_a", "lora_b")}
    return factors | {"grad_a": grads["lora_a"], "grad_b": grads["lora_b"]}


def _exact(i: Inputs) -> Tensor:
    return lora_importance_ref(**i, scaling=2.0)


def _plain(i: Inputs) -> Tensor:
    """The dense formula, in float32 throughout: without units for bfloat16, PyTorch's own is slower in that."""
    w, a, b, grad_a, grad_b = (i[name].float() for name in ("weight", "lora_a", "lora_b", "grad_a", "grad_b"))
    update = grad_b @ a + b @ grad_a - grad_b @ grad_a
    return (update * (w + 2.0 * (b @ a))).square().sum(1)


def _launches(target: Target, s: Shape, dtype: torch.dtype) -> tuple[str, tuple[Work, ...]]:
    splits = importance_tiles(target, s["N"], s["K"]).splits
    choice = "" if splits == 1 else f"{splits} parts"
    return choice, roofline.lora_importance(s["K"], s["N"], s["R"], dtype.itemsize, splits)


BENCHES = (
    Bench(
        name="lora_importance",
        shapes=shapes_of((2048, 2048, 8), (576, 576, 8), (576, 1536, 8), (1536, 576, 8), names="K N R"),
        gpu_shapes=shapes_of(*((k, n, r) for k, n in GPU_WIDTHS for r in (8, 64)), names="K N R"),
        make=_inputs,
        providers={
            "plain": _plain,
            "ours": lambda i, backend="auto": lk.lora_importance(**i, scaling=2.0, backend=backend),
        },
        exact=_exact,
        nbytes=lambda s, size: size * (s["N"] * s["K"] + 2 * s["R"] * (s["K"] + s["N"])) + 4 * s["N"],
        flops=lambda s: 2.0 * s["N"] * s["K"] * (3 * s["R"] + 2),
        launches=_launches,
    ),
)

_TUNABLE = (Tunable("lora_importance", "lora_importance", FACTORS, (REFERENCE,)),)
TUNABLES = {"cpu": _TUNABLE, "cuda": _TUNABLE}
