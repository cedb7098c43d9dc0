"""GaLore's step: its benchmark row, and what there is to tune."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import lowrank_kernels as lk

from ...kernels import roofline
from ...reference import galore_adam_ref
from .bench import FACTORS, GPU_WIDTHS, REFERENCE, Bench, Inputs, Shape, Tunable, shapes_of

_SETTINGS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.01,
    "scale": 0.25,
    "step": 3,
}


def _inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    def normal(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=device).to(of)

    rank = min(s["R"], s["N"])
    basis = torch.linalg.qr(torch.randn(s["N"], rank)).Q.to(device)
    moments = normal(rank, s["K"]), normal(rank, s["K"]).square()
    return {
        "weight": normal(s["N"], s["K"], of=dtype),
        "grad": normal(s["N"], s["K"], of=dtype),
        "basis": basis,
        "exp_avg": moments[0],
        "exp_avg_sq": moments[1],
    }


def _ours(i: Inputs, backend: str = "auto") -> Tensor:
    lk.galore_adam_(**i, **_SETTINGS, backend=backend)
    weight: Tensor = i["weight"]
    return weight


def _plain(i: Inputs) -> Tensor:
    """As galore-torch's optimizer writes it: the step of W's size is made, scaled, and added."""
    low = i["basis"].to(i["grad"].dtype).T @ i["grad"]
    i["exp_avg"].mul_(0.9).add_(low, alpha=0.1)
    i["exp_avg_sq"].mul_(0.999).addcmul_(low, low, value=0.001)
    direction = i["exp_avg"] / i["exp_avg_sq"].sqrt().div_((1 - 0.999**3) ** 0.5).add_(1e-8)
    change = (i["basis"] @ direction) * 0.25
    weight: Tensor = i["weight"]
    weight.mul_(1 - 1e-5)
    return weight.add_(change.to(weight.dtype), alpha=-1e-3 / (1 - 0.9**3))


def _exact(i: Inputs) -> Tensor:
    galore_adam_ref(**i, **_SETTINGS)
    weight: Tensor = i["weight"]
    return weight


def _fresh(call):  # type: ignore[no-untyped-def]
    """Of copies: a step changes what it is given."""
    return lambda i, **named: call({name: t.clone() for name, t in i.items()}, **named)


BENCHES = (
    Bench(
        name="galore_adam_",
        shapes=shapes_of((1536, 576, 64), (576, 576, 64), (4096, 1024, 128), (2049, 1000, 7), names="K N R"),
        gpu_shapes=shapes_of(*((k, n, 128) for k, n in GPU_WIDTHS), names="K N R"),
        make=_inputs,
        providers={"plain": _fresh(_plain), "ours": _fresh(_ours)},
        exact=_fresh(_exact),
        nbytes=lambda s, size: size * 3 * s["N"] * s["K"] + 4 * s["R"] * (4 * s["K"] + s["N"]),
        flops=lambda s: 4.0 * s["N"] * s["K"] * s["R"],
        launches=lambda t, s, dtype: ("", roofline.galore_adam(s["K"], s["N"], s["R"], dtype.itemsize)),
    ),
)

_TUNABLE = (Tunable("galore_adam_", "galore_adam_", FACTORS, (REFERENCE,)),)
TUNABLES = {"cpu": _TUNABLE, "cuda": _TUNABLE}
