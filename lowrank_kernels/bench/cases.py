"""What is measured: ops, shapes, providers, and the bytes and FLOPs that no provider can do without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import lowrank_kernels as lk

from ..kernels import roofline
from ..kernels.block_sparse_tiles import block_grad_tiles
from ..kernels.lora_tiles import lora_tiles
from ..kernels.multi_lora_tiles import choose_multi_strategy, multi_lora_tiles, tile_capacity
from ..kernels.roofline import Work
from ..kernels.target import Target
from ..reference import (
    block_sparse_weight_grad_ref,
    dora_column_scale_ref,
    dora_weight_norm_ref,
    merge_lora_ref,
)

Shape = Mapping[str, int]
Inputs = dict[str, Any]
Provider = Callable[..., Tensor]
"""Inputs to result; that of an op of ours takes ``backend`` too."""


@dataclass(frozen=True)
class Problem:
    """One row's operands. ``trained`` names the inputs that get a gradient; none for inference."""

    shape: Shape
    dtype: torch.dtype
    training: bool


@dataclass(frozen=True)
class Bench:
    """One row of the table: an op, its shapes, what it is compared with, and what it costs by formula.

    Attributes:
        shapes: default shapes, small enough for a CPU; the long list of a GPU is ``gpu_shapes``.
        make: (shape, dtype, device) -> inputs.
        providers: name -> call; "floor" is what there would be without the op (the frozen linear), where there is such
            a thing, and is what others are compared with; else "plain" is.
        exact: the formula, for float64 inputs.
        trained: inputs that get a gradient in training; empty where the op has no backward.
        nbytes, flops: (shape, itemsize) and (shape,) -> those of the forward, each tensor once.
        launches: (target, shape, dtype) -> (the rule's choice in words, what our Triton kernels move and multiply):
            more than ``nbytes`` where an operand is read again, or an intermediate one is written.
    """

    name: str
    shapes: tuple[Shape, ...]
    gpu_shapes: tuple[Shape, ...]
    make: Callable[[Shape, torch.dtype, torch.device], Inputs]
    providers: Mapping[str, Provider]
    exact: Provider
    nbytes: Callable[[Shape, int], float]
    flops: Callable[[Shape], float]
    launches: Callable[[Target, Shape, torch.dtype], tuple[str, tuple[Work, ...]]]
    trained: tuple[str, ...] = ()


def _normal(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype)


# ------------------------------------------------------------------------------------------------- one adapter, linear


def _lora_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    M, K, N, R = (s[k] for k in "MKNR")
    return {
        "x": _normal(M, K, dtype=dtype, device=device),
        "weight": _normal(N, K, dtype=dtype, device=device, scale=K**-0.5),
        "lora_a": _normal(R, K, dtype=dtype, device=device, scale=K**-0.5),
        "lora_b": _normal(N, R, dtype=dtype, device=device, scale=R**-0.5),
    }


def _lora_plain(i: Inputs) -> Tensor:
    return linear(i["x"], i["weight"]) + 2.0 * linear(linear(i["x"], i["lora_a"]), i["lora_b"])


def _lora_peft(i: Inputs) -> Tensor:
    """The sequence of calls that PEFT's LoRA Linear makes."""
    result = linear(i["x"], i["weight"])
    dropped = i["x"].to(i["lora_a"].dtype)
    return (result + linear(linear(dropped, i["lora_a"]), i["lora_b"]) * 2.0).to(i["x"].dtype)


def _lora_bytes(s: Shape, size: int) -> float:
    M, K, N, R = (s[k] for k in "MKNR")
    return size * (M * K + N * K + M * N + R * (K + N))


def _lora_flops(s: Shape) -> float:
    M, K, N, R = (s[k] for k in "MKNR")
    return 2.0 * M * (N * K + R * (K + N))


# ------------------------------------------------------------------------------------------------------------- DoRA


def _dora_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    inputs = _lora_inputs(s, dtype, device)
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
    return dora_column_scale_ref(i["magnitude"], norm) * _lora_plain(i)


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
    return (i["magnitude"] / _factored_norm(i).detach()).to(i["x"].dtype) * _lora_plain(i)


def _dora_peft(i: Inputs) -> Tensor:
    """The sequence of calls that PEFT's DoRA makes."""
    base = linear(i["x"], i["weight"])
    scale = (i["magnitude"] / _dense_norm(i).detach()).view(1, -1)
    return base + (scale - 1) * base + scale * linear(linear(i["x"], i["lora_a"]), i["lora_b"]) * 2.0


def _norm_bytes(s: Shape, size: int) -> float:
    K, N, R = (s[k] for k in "KNR")
    return size * (N * K + R * (K + N)) + 4 * N


# ------------------------------------------------------------------------------------------------------ block-sparse


def _chosen_blocks(s: Shape) -> Tensor:
    """(row block, column block) of so many blocks of the weight, always the same ones of a shape."""
    across = s["K"] // s["size"]
    order = torch.randperm((s["N"] // s["size"]) * across, generator=torch.Generator().manual_seed(0))
    chosen = order[: s["blocks"]].sort().values
    return torch.stack([chosen // across, chosen % across], 1).to(torch.int32)


def distinct_blocks(s: Shape) -> tuple[int, int]:
    """How many distinct row blocks and column blocks the chosen blocks touch: what is read of dY and of x."""
    rows, columns = _chosen_blocks(s).unbind(1)
    return len(rows.unique()), len(columns.unique())


def _block_bytes(s: Shape, size: int) -> float:
    return size * s["size"] * (s["M"] * sum(distinct_blocks(s)) + s["blocks"] * s["size"]) + 8 * s["blocks"]


def _block_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    M, K, N, size = (s[k] for k in ("M", "K", "N", "size"))
    index = _chosen_blocks(s).to(device)
    return {
        "x": _normal(M, K, dtype=dtype, device=device),
        "grad_y": _normal(M, N, dtype=dtype, device=device),
        "block_index": index,
        "size": size,
    }


def _block_gathered(i: Inputs) -> Tensor:
    """Gather the rows and columns of every block, then one `bmm`."""
    size, index = i["size"], i["block_index"].long()
    dy = i["grad_y"].view(len(i["grad_y"]), -1, size)[:, index[:, 0]]
    x = i["x"].view(len(i["x"]), -1, size)[:, index[:, 1]]
    return torch.einsum("mbi,mbj->bij", dy, x)


def _block_dense(i: Inputs) -> Tensor:
    """The whole dYᵀ x, of which the blocks are read."""
    size, index = i["size"], i["block_index"].long()
    dense = i["grad_y"].T @ i["x"]
    return dense.view(dense.shape[0] // size, size, -1, size)[index[:, 0], :, index[:, 1]]


# ------------------------------------------------------------------------------------------------------ many adapters


def _multi_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    M, K, N, R, G = (s[k] for k in "MKNRG")
    one = _lora_inputs(s, dtype, device)
    all_a = _normal(G, R, K, dtype=dtype, device=device, scale=K**-0.5)
    all_b = _normal(G, N, R, dtype=dtype, device=device, scale=R**-0.5)
    return {
        "x": one["x"],
        "weight": one["weight"],
        "ids": torch.arange(M, device=device) % G,
        "all_a": all_a,
        "all_b": all_b,
        "stack": lk.LoRAStack.from_factors([(a, b, 2.0) for a, b in zip(all_a, all_b, strict=True)]),
    }


def _multi_gathered(i: Inputs) -> Tensor:
    """Copy each row's factors, then two `bmm`."""
    down = torch.bmm(i["all_a"][i["ids"]], i["x"].unsqueeze(2))
    return linear(i["x"], i["weight"]) + 2.0 * torch.bmm(i["all_b"][i["ids"]], down).squeeze(2)


def _multi_loop(i: Inputs) -> Tensor:
    """One adapter after the other, each on its rows: what PEFT's mixed batch does."""
    y = linear(i["x"], i["weight"])
    for adapter in i["ids"].unique().tolist():
        rows = torch.where(i["ids"] == adapter)[0]
        down = linear(i["x"][rows], i["all_a"][adapter])
        y[rows] += (linear(down, i["all_b"][adapter]) * 2.0).to(y.dtype)
    return y


def _multi_bytes(s: Shape, size: int) -> float:
    M, K, N, R, G = (s[k] for k in "MKNRG")
    return size * (M * K + N * K + M * N + min(G, M) * R * (K + N))


# ---------------------------------------------------------------------------------------------- launches of our kernels


def _lora_launches(target: Target, s: Shape, dtype: torch.dtype, scaled: bool = False) -> tuple[str, tuple[Work, ...]]:
    M, K, N, R = (s[k] for k in "MKNR")
    tiles = lora_tiles(target, M, K, N, R, dtype, False, scaled=scaled)
    launches = roofline.lora_forward(
        tiles.strategy, M, K, N, R, dtype.itemsize, -(-N // tiles.main.BLOCK_N), store_p=False, scaled=scaled
    )
    return tiles.strategy, launches


def _dora_launches(target: Target, s: Shape, dtype: torch.dtype) -> tuple[str, tuple[Work, ...]]:
    return _lora_launches(target, s, dtype, scaled=True)


def _block_launches(target: Target, s: Shape, dtype: torch.dtype) -> tuple[str, tuple[Work, ...]]:
    M, blocks, size = (s[k] for k in ("M", "blocks", "size"))
    splits = block_grad_tiles(target, M, blocks, size, size, dtype).splits
    words = f"{splits} parts" if splits > 1 else "one part"
    return words, roofline.block_sparse_weight_grad(M, blocks, size, dtype.itemsize, distinct_blocks(s), splits)


def _multi_launches(target: Target, s: Shape, dtype: torch.dtype) -> tuple[str, tuple[Work, ...]]:
    M, K, N, R, G = (s[k] for k in "MKNRG")
    splits = multi_lora_tiles(target, tile_capacity(M, G), K, R, dtype).splits
    aligned = all(width * dtype.itemsize % 16 == 0 for width in (K, N))
    strategy = choose_multi_strategy(target, M, K, N, R, G, dtype, aligned)
    launches = roofline.multi_lora_forward(M, K, N, R, G, dtype.itemsize, splits, strategy)
    return f"{strategy.replace('_', ' ')}, {splits} parts", launches


# ------------------------------------------------------------------------------------------------------------- table


def _shapes(*rows: tuple[int, ...], names: str = "M K N R") -> tuple[Shape, ...]:
    return tuple(dict(zip(names.split(), row, strict=True)) for row in rows)


_WIDTHS = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024), (8192, 28672), (28672, 8192))
_CPU_LINEAR = _shapes((16, 2048, 2048, 16), (1024, 2048, 2048, 16), (64, 4096, 1024, 64), (256, 1024, 4096, 8))
_GPU_LINEAR = _shapes(*((m, k, n, r) for k, n in _WIDTHS for m in (1, 16, 64, 2048, 8192) for r in (16, 64)))

OPS: dict[str, Bench] = {
    bench.name: bench
    for bench in (
        Bench(
            name="lora_linear",
            shapes=_CPU_LINEAR,
            gpu_shapes=_GPU_LINEAR,
            make=_lora_inputs,
            providers={
                "floor": lambda i: linear(i["x"], i["weight"]),
                "plain": _lora_plain,
                "peft": _lora_peft,
                "ours": lambda i, backend="auto": lk.lora_linear(
                    i["x"], i["weight"], i["lora_a"], i["lora_b"], scaling=2.0, backend=backend
                ),
            },
            exact=_lora_plain,
            nbytes=_lora_bytes,
            flops=_lora_flops,
            launches=_lora_launches,
            trained=("x", "lora_a", "lora_b"),
        ),
        Bench(
            name="dora_linear",
            shapes=_CPU_LINEAR,
            gpu_shapes=_GPU_LINEAR,
            make=_dora_inputs,
            providers={
                "floor": lambda i: linear(i["x"], i["weight"]),
                "plain": _dora_plain,
                "peft": _dora_peft,
                "ours": _dora_ours,
            },
            exact=_dora_exact,
            nbytes=lambda s, size: _lora_bytes(s, size) + 4 * s["N"],
            flops=_lora_flops,
            launches=_dora_launches,
            trained=("x", "lora_a", "lora_b", "magnitude"),
        ),
        Bench(
            name="dora_weight_norm",
            shapes=_shapes((2048, 2048, 16), (4096, 1024, 64), (1024, 4096, 384), (2048, 2048, 512), names="K N R"),
            gpu_shapes=_shapes(*((k, n, r) for k, n in _WIDTHS for r in (8, 16, 64, 256, 384, 512)), names="K N R"),
            make=lambda s, dtype, device: _lora_inputs({"M": 1, **s}, dtype, device),
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
        Bench(
            name="merge_lora_",
            shapes=_shapes((2048, 2048, 16), (4096, 1024, 64), (1024, 4096, 8), (2049, 1000, 7), names="K N R"),
            gpu_shapes=_shapes(*((k, n, r) for k, n in _WIDTHS for r in (16, 64)), names="K N R"),
            make=lambda s, dtype, device: _lora_inputs({"M": 1, **s}, dtype, device),
            providers={
                "plain": lambda i: (
                    i["weight"].clone().add_((2.0 * (i["lora_b"].float() @ i["lora_a"].float())).to(i["weight"].dtype))
                ),
                "ours": lambda i, backend="auto": lk.merge_lora_(
                    i["weight"].clone(), i["lora_a"], i["lora_b"], scaling=2.0, backend=backend
                ),
            },
            exact=lambda i: merge_lora_ref(i["weight"], i["lora_a"], i["lora_b"], scaling=2.0),
            nbytes=lambda s, size: size * (2 * s["N"] * s["K"] + s["R"] * (s["K"] + s["N"])),
            flops=lambda s: 2.0 * s["N"] * s["K"] * s["R"],
            launches=lambda t, s, dtype: ("", roofline.merge_lora(s["K"], s["N"], s["R"], dtype.itemsize)),
        ),
        Bench(
            name="block_sparse_weight_grad",
            shapes=_shapes(
                (1024, 4096, 4096, 41, 64),
                (1024, 2048, 2048, 10, 64),
                (512, 576, 1536, 12, 32),
                (256, 4096, 1024, 4, 256),
                names="M K N blocks size",
            ),
            gpu_shapes=_shapes(
                (8192, 4096, 4096, 41, 64),
                (8192, 4096, 4096, 3, 256),
                (8192, 4096, 14336, 144, 64),
                (2048, 8192, 28672, 31, 256),
                names="M K N blocks size",
            ),
            make=_block_inputs,
            providers={
                "floor": _block_dense,
                "plain": _block_gathered,
                "ours": lambda i, backend="auto": lk.block_sparse_weight_grad(
                    i["x"], i["grad_y"], i["block_index"], i["size"], backend=backend
                ),
            },
            exact=lambda i: block_sparse_weight_grad_ref(i["x"], i["grad_y"], i["block_index"], (i["size"], i["size"])),
            nbytes=_block_bytes,
            flops=lambda s: 2.0 * s["M"] * s["blocks"] * s["size"] ** 2,
            launches=_block_launches,
        ),
        Bench(
            name="multi_lora_linear",
            shapes=_shapes(
                (64, 2048, 2048, 16, 64),
                (64, 2048, 2048, 16, 8),
                (16, 2048, 2048, 64, 16),
                (256, 1024, 2049, 8, 4),
                names="M K N R G",
            ),
            gpu_shapes=_shapes(
                *((m, k, n, 16, g) for k, n in _WIDTHS[:4] for m, g in ((1, 1), (16, 16), (64, 64), (2048, 8))),
                names="M K N R G",
            ),
            make=_multi_inputs,
            providers={
                "floor": lambda i: linear(i["x"], i["weight"]),
                "plain": _multi_gathered,
                "peft": _multi_loop,
                "ours": lambda i, backend="auto": lk.multi_lora_linear(
                    i["x"], i["weight"], i["stack"], i["ids"], backend=backend
                ),
            },
            exact=_multi_gathered,
            nbytes=_multi_bytes,
            flops=_lora_flops,
            launches=_multi_launches,
        ),
    )
}
