"""SVFT's linear: its benchmark row, and what there is to tune."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

import lowrank_kernels as lk

from ...kernels import roofline
from ...reference import svft_linear_ref, svft_matrix_ref
from .bench import GPU_WIDTHS, PRODUCT, REFERENCE, Bench, Inputs, Shape, Tunable, normal, shapes_of


def _rank(s: Shape) -> int:
    return min(s["N"], s["K"])


def _inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """E values on the diagonal and those beside it, the nearest first."""
    M, K, N, r = s["M"], s["K"], s["N"], _rank(s)
    band = range(-(-s["E"] // r) + 1)
    flat = dict.fromkeys(i * r + j for b in band for i in range(r) for j in (i - b, i + b) if 0 <= j < r)
    index = torch.tensor(sorted(list(flat)[: s["E"]]))
    return {
        "x": normal(M, K, dtype=dtype, device=device),
        "weight": normal(N, K, dtype=dtype, device=device, scale=K**-0.5),
        "u": normal(N, r, dtype=dtype, device=device, scale=r**-0.5),
        "vh": normal(r, K, dtype=dtype, device=device, scale=K**-0.5),
        "values": normal(len(index), dtype=torch.float32, device=device),
        "pattern": lk.svft_pattern(torch.stack([index // r, index % r]), r, r).to(device),
    }


def _index(i: Inputs) -> Tensor:
    pattern: Tensor = i["pattern"]
    return pattern[: 2 * len(i["values"])].view(2, -1)


def _exact(i: Inputs) -> Tensor:
    return svft_linear_ref(i["x"], i["weight"], i["u"], i["vh"], i["values"], _index(i))[0]


def _plain(i: Inputs) -> Tensor:
    """With a dense M."""
    x = i["x"]
    m = svft_matrix_ref(i["values"], _index(i), (i["u"].shape[1], len(i["vh"]))).to(x.dtype)
    return linear(x, i["weight"]) + ((x @ i["vh"].T) @ m.T) @ i["u"].T


def _bytes(s: Shape, size: int) -> float:
    M, K, N, r, e = s["M"], s["K"], s["N"], _rank(s), s["E"]
    return size * (M * K + N * K + M * N + r * (N + K)) + 4 * (2 * e + r + 1)


def _flops(s: Shape) -> float:
    return 2.0 * s["M"] * (s["N"] * s["K"] + _rank(s) * (s["N"] + s["K"]) + s["E"])


BENCHES = (
    Bench(
        name="svft_linear",
        shapes=shapes_of((1024, 576, 576, 576), (1024, 576, 1536, 5164), (16, 2048, 2048, 2048), names="M K N E"),
        gpu_shapes=shapes_of(
            *((m, k, n, 9 * min(k, n)) for k, n in GPU_WIDTHS[:4] for m in (16, 2048)), names="M K N E"
        ),
        make=_inputs,
        providers={
            "floor": lambda i: linear(i["x"], i["weight"]),
            "plain": _plain,
            "ours": lambda i, backend="auto": lk.svft_linear(**i, backend=backend),
        },
        exact=_exact,
        nbytes=_bytes,
        flops=_flops,
        launches=lambda t, s, dtype: ("", roofline.svft_forward(s["M"], s["K"], s["N"], s["E"], dtype.itemsize)),
        trained=("x", "values"),
    ),
)

_TUNABLE = (Tunable("svft_linear", "svft_linear", (*PRODUCT, "E"), (REFERENCE,)),)
TUNABLES = {"cpu": _TUNABLE, "cuda": _TUNABLE}
