"""Problems of the block-sparse linear and of its gradients alone, and their plain-PyTorch forms."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import lowrank_kernels as lk
from lowrank_kernels.functional import read_blocks

from . import Problem
from .lora import BF16, F16, F32


def random_index(n: int, k: int, size: tuple[int, int], share: float, seed: int = 0) -> Tensor:
    """A share of the blocks of an (n, k) weight, at least one, in random order; the last of all is among them."""
    rows, columns = -(-n // size[0]), -(-k // size[1])
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))
    flat = order[: max(1, int(share * rows * columns))]
    if share < 1:
        flat[0] = rows * columns - 1
    return torch.stack((flat // columns, flat % columns), 1).unique(dim=0).flip(0).to(torch.int32)


def block_tensors(
    M: int,
    K: int,
    N: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    block_dtype: torch.dtype | None = None,
    *,
    share: float = 0.3,
    bias: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random inputs whose products have about unit variance; the blocks hold what W holds there."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    weight, index = random(N, K, scale=K**-0.5), random_index(N, K, size, share, seed)
    blocks = read_blocks(weight, index, size).to(block_dtype or dtype)
    tensors = {"x": random(M, K).requires_grad_(), "weight": weight, "blocks": blocks.requires_grad_()}
    tensors["block_index"] = index
    if bias:
        tensors["bias"] = random(N).requires_grad_()
    return tensors


class _TakeBlocks(torch.autograd.Function):
    """W, of whose dense gradient the blocks get their slices, in W's dtype and then the blocks'."""

    @staticmethod
    def forward(ctx, weight, blocks, index):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(index)
        ctx.size, ctx.dtype = tuple(blocks.shape[1:]), blocks.dtype
        return weight.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (index,) = ctx.saved_tensors
        return None, read_blocks(grad, index, ctx.size).to(ctx.dtype), None


def eager_block_sparse_linear(
    x: Tensor, weight: Tensor, blocks: Tensor, block_index: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The dense linear; autograd makes its whole weight gradient, and the blocks take their part."""
    return torch.nn.functional.linear(x, _TakeBlocks.apply(weight, blocks, block_index), bias)


def linear_problem(name: str, tensors: dict[str, Tensor]) -> Problem:
    def run(t: dict[str, Tensor], backend: str) -> Tensor:
        return lk.block_sparse_linear(**t, backend=backend)

    def eager(t: dict[str, Tensor]) -> Tensor:
        return eager_block_sparse_linear(**t)

    return Problem(f"block_sparse: {name}", tensors, run, eager)


def grad_problem(
    name: str,
    M: int,
    K: int,
    N: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    *,
    share: float = 0.3,
    strided: bool = False,
) -> Problem:
    """The gradients alone, as an output."""
    generator = torch.Generator().manual_seed(1)
    x, grad_y = (torch.randn(M, width, generator=generator).to(dtype) for width in (K, N))
    if strided:
        x = torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0]
        grad_y = grad_y.T.contiguous().T
    # The rows are summed over: there is nothing to differentiate but a factor of the whole.
    tensors = {"x": x, "grad_y": grad_y, "index": random_index(N, K, size, share), "one": torch.ones((), dtype=dtype)}
    tensors["one"].requires_grad_()

    def run(t: dict[str, Tensor], backend: str) -> Tensor:
        return t["one"] * lk.block_sparse_weight_grad(t["x"], t["grad_y"], t["index"], size, backend=backend)

    def eager(t: dict[str, Tensor]) -> Tensor:
        return t["one"] * read_blocks(t["grad_y"].T @ t["x"], t["index"], size)

    return Problem(f"block_sparse_weight_grad: {name}", tensors, run, eager)


def problems() -> Iterator[Problem]:
    for dtype in (BF16, F16, F32):
        yield linear_problem(f"{dtype}", block_tensors(70, 128, 96, (32, 32), dtype))
    yield linear_problem("float32 blocks, bias", block_tensors(70, 128, 96, (32, 16), BF16, F32, bias=True, share=0.1))
    yield linear_problem("ragged", block_tensors(67, 131, 77, (48, 32), F32, bias=True))
    yield linear_problem("all blocks", block_tensors(70, 96, 72, (32, 32), BF16, share=1.0))
    yield linear_problem("one token", block_tensors(1, 128, 96, (32, 32), F32, share=0.1))
    yield linear_problem("no token", block_tensors(0, 128, 96, (32, 32), BF16))
    for dtype in (BF16, F16, F32):
        yield grad_problem(f"{dtype}", 300, 200, 136, (32, 64), dtype)
    yield grad_problem("large blocks", 530, 300, 280, (256, 144), BF16, share=1.0)
    yield grad_problem("many tokens, one block", 1100, 64, 64, (16, 16), BF16, share=0.01)
    yield grad_problem("strided", 70, 90, 80, (16, 16), F32, strided=True)
    yield grad_problem("strided, half", 70, 90, 80, (16, 48), BF16, strided=True)
