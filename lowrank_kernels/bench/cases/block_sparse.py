"""Gradients of blocks: the benchmark row, and what there is to tune."""

from __future__ import annotations

import torch
from torch import Tensor

import lowrank_kernels as lk

from ...kernels import roofline
from ...kernels.block_sparse_tiles import block_grad_tiles
from ...kernels.roofline import Work
from ...kernels.target import Target
from ...reference import block_sparse_weight_grad_ref
from .bench import REFERENCE, Bench, Inputs, Shape, Tunable, normal, shapes_of


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
        "x": normal(M, K, dtype=dtype, device=device),
        "grad_y": normal(M, N, dtype=dtype, device=device),
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


def _block_launches(target: Target, s: Shape, dtype: torch.dtype) -> tuple[str, tuple[Work, ...]]:
    M, blocks, size = (s[k] for k in ("M", "blocks", "size"))
    splits = block_grad_tiles(target, M, blocks, size, size, dtype).splits
    words = f"{splits} parts" if splits > 1 else "one part"
    return words, roofline.block_sparse_weight_grad(M, blocks, size, dtype.itemsize, distinct_blocks(s), splits)


BENCHES = (
    Bench(
        name="block_sparse_weight_grad",
        shapes=shapes_of(
            (1024, 4096, 4096, 41, 64),
            (1024, 2048, 2048, 10, 64),
            (512, 576, 1536, 12, 32),
            (256, 4096, 1024, 4, 256),
            names="M K N blocks size",
        ),
        gpu_shapes=shapes_of(
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
)

_OP, _SIZES = "block_sparse_weight_grad", ("M", "blocks", "size")
_TILES = {"BLOCK_M": 32}, {"BLOCK_M": 128}, {"num_warps": 8}, {"num_stages": 4}, {"splits": 1}
TUNABLES = {
    "cpu": (Tunable(_OP, _OP, _SIZES, (REFERENCE,)),),
    "cuda": (Tunable(_OP, _OP, _SIZES, (*_TILES, REFERENCE)),),
}
