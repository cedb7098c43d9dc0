"""The DoRA linear and its norm: benchmark rows, and what there is to tune."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

import lowrank_kernels as lk

from ...kernels import roofline
from ...kernels.roofline import Work
from ...kernels.target import Target
from ...reference import dora_column_scale_ref, dora_weight_norm_ref
from .bench import (
    BASES,
    CPU_LINEAR,
    FACTORS,
    GPU_LINEAR,
    GPU_WIDTHS,
    PRODUCT,
    REFERENCE,
    Bench,
    Inputs,
    Shape,
    Tunable,
    shapes_of,
    strategies,
)
from .lora import lora_bytes, lora_flops, lora_inputs, lora_launches, lora_plain


def _dora_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    inputs = lora_inputs(s, dtype, device)
    weight = inputs["weight"].float()
    inputs |= {"magnitude": weight.norm(dim=1).to(dtype), "weight_sq_norm": weight.square().sum(1)}
    norm, scale, _ = lk.dora_column_scale(
        *(inputs[k] for k in ("weight", "lora_a", "lora_b", "magnitude")), scaling=2.0
    )
    return inputs | {"norm_and_scale": (norm, scale)}


def _dora_ours(i: Inputs, backend: str = "auto") -> Tensor:
    """The op as the layer calls it, with ‖W‖² kept between calls in training and g kept in inference."""
    training = i["lora_a"].requires_grad
    kept = {"weight_sq_norm": i["weight_sq_norm"]} if training else {"norm_and_scale": i["norm_and_scale"]}
    operands = (i[k] for k in ("x", "weight", "lora_a", "lora_b", "magnitude"))
    return lk.dora_linear(*operands, scaling=2.0, **kept, backend=backend)


def _dora_exact(i: Inputs) -> Tensor:
    norm = dora_weight_norm_ref(i["weight"], i["lora_a"], i["lora_b"], scaling=2.0)
    return dora_column_scale_ref(i["magnitude"], norm) * lora_plain(i)


def _dense_norm(i: Inputs) -> Tensor:
    """The norm as PEFT computes it: B A from a product with the identity, added to W, all in the weight's dtype."""
    identity = torch.eye(i["lora_a"].shape[1], dtype=i["weight"].dtype, device=i["weight"].device)
    dense = linear(linear(identity, i["lora_a"]), i["lora_b"]).T
    return torch.linalg.norm(i["weight"] + 2.0 * dense, dim=1).to(i["weight"].dtype)


def _factored_norm(i: Inputs) -> Tensor:
    """‖W‖² + 2 s B·(W Aᵀ) + s² B (A Aᵀ) Bᵀ in plain PyTorch, float32 where sums can cancel."""
    w, a, b = i["weight"], i["lora_a"], i["lora_b"].float()
    u = linear(w, a).float()
    gram = a.float() @ a.float().T
    square = w.float().square().sum(1) + 4.0 * (b * u).sum(1) + 4.0 * ((b @ gram) * b).sum(1)
    return square.clamp(min=0.0).sqrt()


def _dora_plain(i: Inputs) -> Tensor:
    return (i["magnitude"] / _factored_norm(i).detach()).to(i["x"].dtype) * lora_plain(i)


def _dora_peft(i: Inputs) -> Tensor:
    """The sequence of calls that PEFT's DoRA makes."""
    base = linear(i["x"], i["weight"])
    scale = (i["magnitude"] / _dense_norm(i).detach()).view(1, -1)
    return base + (scale - 1) * base + scale * linear(linear(i["x"], i["lora_a"]), i["lora_b"]) * 2.0


def _norm_bytes(s: Shape, size: int) -> float:
    K, N, R = (s[k] for k in "KNR")
    return size * (N * K + R * (K + N)) + 4 * N


def _dora_launches(target: Target, s: Shape, dtype: torch.dtype) -> tuple[str, tuple[Work, ...]]:
    return lora_launches(target, s, dtype, scaled=True)


BENCHES = (
    Bench(
        name="dora_linear",
        shapes=CPU_LINEAR,
        gpu_shapes=GPU_LINEAR,
        make=_dora_inputs,
        providers={
            "floor": lambda i: linear(i["x"], i["weight"]),
            "plain": _dora_plain,
            "peft": _dora_peft,
            "ours": _dora_ours,
        },
        exact=_dora_exact,
        nbytes=lambda s, size: lora_bytes(s, size) + 4 * s["N"],
        flops=lora_flops,
        launches=_dora_launches,
        trained=("x", "lora_a", "lora_b", "magnitude"),
    ),
    Bench(
        name="dora_weight_norm",
        shapes=shapes_of((2048, 2048, 16), (4096, 1024, 64), (1024, 4096, 384), (2048, 2048, 512), names="K N R"),
        gpu_shapes=shapes_of(*((k, n, r) for k, n in GPU_WIDTHS for r in (8, 16, 64, 256, 384, 512)), names="K N R"),
        make=lambda s, dtype, device: lora_inputs({"M": 1, **s}, dtype, device),
        providers={
            "plain": _factored_norm,
            "peft": _dense_norm,
            "ours": lambda i, backend="auto": lk.dora_weight_norm(
                i["weight"], i["lora_a"], i["lora_b"], scaling=2.0, backend=backend
            ),
        },
        exact=lambda i: dora_weight_norm_ref(i["weight"], i["lora_a"], i["lora_b"], scaling=2.0),
        nbytes=_norm_bytes,
        flops=lambda s: 2.0 * s["N"] * s["R"] * (s["K"] + s["R"]) + 2.0 * s["N"] * s["K"],
        launches=lambda t, s, dtype: ("", roofline.dora_weight_norm(s["K"], s["N"], s["R"], dtype.itemsize)),
    ),
)

TUNABLES = {
    "cpu": (
        Tunable("dora_linear", "dora_linear", PRODUCT, (*BASES, REFERENCE)),
        Tunable("dora_linear_backward", "dora_linear", PRODUCT, BASES, training=True),
        Tunable("dora_weight_norm", "dora_weight_norm", FACTORS, (REFERENCE,)),
    ),
    "cuda": (
        Tunable("dora_linear", "dora_linear", (*PRODUCT, "R"), strategies("fused", "two_kernel")),
        Tunable("dora_linear_backward", "dora_linear", (*PRODUCT, "R"), strategies("two_kernel"), training=True),
        Tunable(
            "dora_weight_norm", "dora_weight_norm", FACTORS, ({"clusters": False}, {"backend": "triton"}, REFERENCE)
        ),
    ),
}
